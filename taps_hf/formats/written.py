"""A drafter in another format, and what all formats have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..drafters.modeling_feature import FeatureDrafter

LAYER = "trunk.layers.0."


@dataclass
class Written:
    """A drafter in another format.

    Args:
        config: what config.json says.
        tensors: by name.
        token_map: (K,) int64 of a file of their own, or None.
        notes: what a user should know.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    token_map: torch.Tensor | None = None
    notes: list[str] = field(default_factory=list)


def window_notes(drafters: Mapping[str, FeatureDrafter]) -> list[str]:
    """That engines do not know `context_window`, if any of some drafters has one."""
    found = [name for name, one in drafters.items() if one.config.context_window is not None]
    said = f"the context windows of {', '.join(found)} have no place there: the whole context is"
    return [f"{said} looked at"] if found else []


def refuse(to: str, **reasons: str | None) -> None:
    """Raise `ValueError` for the first reason that there is."""
    for reason in reasons.values():
        if reason is not None:
            raise ValueError(f"The drafter cannot be exported to {to}: {reason}.")


def layer_of(drafter: FeatureDrafter, target: PreTrainedModel) -> dict[str, Any]:
    """The fields of config.json that say what the layer is, with both spellings of positions."""
    layer = drafter.trunk.config
    own = target.config.get_text_config(decoder=True)
    rope = dict(getattr(layer, "rope_parameters", None) or {})
    theta = rope.get("rope_theta", 10000.0)
    scaling = None
    if rope.get("rope_type", "default") != "default":
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        scaling["type"] = rope["rope_type"]  # as older stacks call it
    heads = layer.num_attention_heads
    return {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": drafter.config.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "head_dim": getattr(layer, "head_dim", None) or layer.hidden_size // heads,
        "hidden_act": layer.hidden_act,
        "rms_norm_eps": layer.rms_norm_eps,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": rope,
        "max_position_embeddings": getattr(own, "max_position_embeddings", None)
        or layer.max_position_embeddings,
        "initializer_range": 0.02,
        "vocab_size": drafter.config.vocab_size,
        "bos_token_id": getattr(own, "bos_token_id", None),
        "eos_token_id": getattr(own, "eos_token_id", None),
        "pad_token_id": getattr(own, "pad_token_id", None),
        "pretraining_tp": 1,
        "use_cache": True,
        "tie_word_embeddings": False,
    }


def ours_of(drafter: FeatureDrafter) -> dict[str, Any]:
    """What our own reader would not know otherwise."""
    config, tokens = drafter.config, drafter.draft_token_ids
    found: dict[str, Any] = {
        "backbone": config.backbone,
        "target": config.target_name_or_path,
        "tokenizer_fingerprint": config.tokenizer_fingerprint,
        "training_data": config.training_data,
    }
    if tokens is not None and not drafter.has_own_head:
        found["draft_token_ids"] = tokens.tolist()
    return found


def common_reasons(drafter: FeatureDrafter, families: tuple[str, ...]) -> dict[str, str | None]:
    """Why an engine that has layers of some families cannot serve a drafter: for [`refuse`]."""
    layer = drafter.trunk.config
    act = getattr(layer, "hidden_act", None)
    return {
        "family": None
        if layer.model_type in families
        else f"its layer is of the family {layer.model_type!r}, and only those of "
        f"{', '.join(families)} can be served",
        "act": None if act == "silu" else f"its MLP has {act!r}, and only silu can be served",
        "mlp": None
        if not getattr(layer, "mlp_bias", False)
        else "its MLP has biases, which have no place there",
    }


def check_reference_rope(drafter: FeatureDrafter) -> None:
    """Raise `ValueError` for rotary positions that the papers' own code does not have."""
    rope = getattr(drafter.trunk.config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    plain = kind == "default" or (kind == "linear" and rope.get("rope_theta") == 10000.0)
    if not plain:
        refuse("eagle", rope=f"its rotary positions are scaled by {kind!r}, which it has not")
