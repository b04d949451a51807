"""Tiny random targets of several families, and drafters for them that are sometimes right."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from taps_hf import Eagle3Drafter, EagleDrafter

VOCAB = 16
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
    # Larger than usual, so that random models have preferences and drafters can be wrong.
    "initializer_range": 0.4,
}
# Families of which transformers 5.0 itself makes no model, of a tiny configuration or without data.
_NOT_MADE_BY_5_0 = {"apertus", "jetmoe"}
FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {
        "initializer_range": 0.1,
        "sliding_window": 10,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


# An older torch must be refused, not passed over; and by version: should a newer one no longer have
# Muon, these tests are to fail.
needs_muon = pytest.mark.xfail(
    Version(torch.__version__) < Version("2.9"),
    raises=ValueError,
    strict=True,
    reason="torch has Muon since 2.9",
)


def needs_family(family: str) -> None:
    """Skip a test about a family that the transformers installed here does not have."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    if family in _NOT_MADE_BY_5_0 and transformers.__version__.startswith("5.0."):
        pytest.skip(f"transformers {transformers.__version__} cannot make a tiny {family}")


@functools.cache
def tiny_target(
    family: str = "llama", dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> PreTrainedModel:
    """A random target. Cached: do not change it."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.generation_config.eos_token_id = None
    return model.eval()


@functools.cache
def tiny_drafters(
    count: int = 2,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    draft_vocab: int | None = None,
) -> tuple[EagleDrafter, ...]:
    """Random drafters for the tiny target of a family. Cached: do not change them.

    With 16 tokens in the vocabulary a wide tree holds the right one often enough to be accepted
    several levels deep.
    """
    drafters = []
    with torch.random.fork_rng():
        for seed in range(count):
            torch.manual_seed(seed)
            ids = None if draft_vocab is None else torch.randperm(VOCAB)[:draft_vocab]
            drafter = EagleDrafter.from_target(tiny_target(family), draft_token_ids=ids)
            drafters.append(drafter.to(dtype).eval())
    return tuple(drafters)


# The dialects in which EAGLE-3 heads come.
DIALECTS: dict[str, dict] = {
    "original": {},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_fc": {"norm_before_fc": True, "norm_before_residual": True},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True, "fc_norm": True},
    "qwen3": {"family": "qwen3"},
}


@functools.cache
def tiny_eagle3(
    count: int = 1,
    family: str = "llama",
    dialect: str = "original",
    draft_vocab: int | None = 12,
    dtype: torch.dtype = torch.float32,
) -> tuple[Eagle3Drafter, ...]:
    """Random EAGLE-3 drafters for the tiny target of a family. Cached: do not change them."""
    drafters = []
    with torch.random.fork_rng():
        for seed in range(count):
            torch.manual_seed(seed)
            ids = None if draft_vocab is None else torch.randperm(VOCAB)[:draft_vocab]
            drafter = Eagle3Drafter.from_target(
                tiny_target(family, dtype), ids, layer_ids=[1, 2], **DIALECTS[dialect]
            )
            for name, weight in drafter.named_parameters():
                if "norm" in name:  # new ones are all alike: none would be missed
                    weight.data.uniform_(0.5, 1.5)
            drafters.append(drafter.eval())
    return tuple(drafters)


def prompt(length: int = 9, seed: int = 0) -> torch.Tensor:
    """(1, length) int64 random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (1, length), generator=generator)


def refused(match: str, target=None, inputs=None, **kwargs) -> None:
    """Expect a ValueError of `generate`, with drafters, before the target has run."""
    target = target or tiny_target()
    kwargs.setdefault("assistant_models", tiny_drafters(2))
    passes = []
    # Both prefill and passes over trees go through the decoder.
    handle = target.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(ValueError, match=match):
            target.generate(prompt() if inputs is None else inputs, max_new_tokens=5, **kwargs)
    finally:
        handle.remove()
    assert not passes, "the target ran before the error"
