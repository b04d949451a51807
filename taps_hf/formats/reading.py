"""What readers of formats are given, and what they find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..drafters.configuration_feature import FeatureDrafterConfig

EXTRA = "taps_hf"
"""The key of config.json under which our own data is, which engines ignore."""
_FIELDS = ("tokenizer_fingerprint", "training_data")


@dataclass(frozen=True)
class Target:
    """What a reader must know of the target.

    Args:
        name: path or Hub name, if it has one.
        hidden_size, num_layers, max_positions: of its decoder.
        embedding, head: its modules, with a `weight` (rows, hidden) each.
    """

    name: str | None
    hidden_size: int
    num_layers: int
    max_positions: int
    vocab_size: int
    embedding: nn.Module
    head: nn.Module

    @classmethod
    def of(cls, model: PreTrainedModel) -> Target:
        """Of a loaded model."""
        config = model.config.get_text_config(decoder=True)
        return cls(
            model.config.name_or_path or None,
            config.hidden_size,
            config.num_hidden_layers,
            getattr(config, "max_position_embeddings", None) or 2048,
            config.vocab_size,
            model.get_input_embeddings(),
            model.get_output_embeddings(),
        )


@dataclass(frozen=True)
class Found:
    """A drafter as it was read.

    Args:
        config: ours.
        state: weights by the names of our modules, as they were saved.
        notes: what a user should know: where files contradict themselves, what was assumed.
    """

    config: FeatureDrafterConfig
    state: dict[str, torch.Tensor]
    notes: list[str] = field(default_factory=list)


def ours_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a file that we exported says under a key of our own, as fields of our configurations."""
    extra = config.get(EXTRA)
    if not isinstance(extra, Mapping):
        return {}
    return {name: extra.get(name) for name in _FIELDS if extra.get(name) is not None}
