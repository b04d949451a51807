"""Reading EAGLE-1, EAGLE-2, HASS and TAPS heads, which have one format.

`fc` reads [embedding; feature], and layer 0 has no norm before its attention. The reference's own
configurations do not tell the truth about the bias of `fc`, so tensors decide. What the speculators
project once wrote of the same heads differs by names only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..drafters.configuration_eagle import EagleDrafterConfig
from .checkpoint import Checkpoint
from .layer_fields import llama_fields
from .reading import EXTRA, Found, Target, ours_in
from .tensors import check_copy, check_tensors, check_vocabulary

_COPIES = ("embed_tokens.weight", "lm_head.weight")
_ATTENTION = ("q_proj", "k_proj", "v_proj")
# By which heads of the same family are told apart that do more than this format says.
_FOREIGN = {
    "embed_layernorm": "norms of the embedding, the feature and the head (a TTT head)",
    "hidden_layernorm": "norms of the embedding, the feature and the head (a TTT head)",
    "lm_head_layernorm": "norms of the embedding, the feature and the head (a TTT head)",
    "embedding_layernorm": "norms of the embedding, the feature and the head (`layernorms`)",
    "pre_lm_head_layernorm": "norms of the embedding, the feature and the head (`layernorms`)",
    "norm": "a final norm (Mistral's EAGLE)",
    "layers.1": "more than one layer",
}


def read(checkpoint: Checkpoint, target: Target) -> Found:
    """What an EAGLE-2 or HASS checkpoint says, for our drafter.

    Raises:
        ValueError: naming file, tensor, found and expected.
    """
    for name in checkpoint.headers:
        for start, what in _FOREIGN.items():
            if name.startswith(f"{start}."):
                raise ValueError(
                    f"{checkpoint.where(name)}: heads with {what} are not supported, expected "
                    "EAGLE-2's or HASS' own layout."
                )
    where = str(checkpoint.config_file)
    config = _layer_settings(checkpoint)
    has_bias = [f"layers.0.self_attn.{n}.bias" in checkpoint.headers for n in _ATTENTION]
    family = "qwen2" if any(has_bias) else "llama"
    fields = llama_fields(config, where, family, target.max_positions)
    fc_bias = "fc.bias" in checkpoint.headers
    check_tensors(checkpoint, _expected(fields, fc_bias, any(has_bias)), _COPIES)
    if fields["hidden_size"] != target.hidden_size:
        raise ValueError(
            f"{where} has `hidden_size` {fields['hidden_size']}, but the target's is "
            f"{target.hidden_size}: the head was made for another target."
        )
    if "vocab_size" in config:
        check_vocabulary(checkpoint, config["vocab_size"], target.vocab_size, "`vocab_size`")
    if "embed_tokens.weight" in checkpoint.headers:
        check_copy(checkpoint, "embed_tokens.weight", target.embedding, "embedding")
    if "lm_head.weight" in checkpoint.headers:
        check_copy(checkpoint, "lm_head.weight", target.head, "LM head")
    notes = []
    said = config.get("bias")
    if said is not None and bool(said) != fc_bias:
        notes.append(
            f"config.json says `bias` {said}, but fc.bias {'exists' if fc_bias else 'is missing'}: "
            "the tensors were followed"
        )
    tokens = _draft_tokens(checkpoint)
    ours = EagleDrafterConfig(
        layer_config=fields,
        hidden_size=fields["hidden_size"],
        vocab_size=target.vocab_size,
        backbone=_backbone(checkpoint),
        fc_bias=fc_bias,
        draft_vocab_size=None if tokens is None else len(tokens),
        target_name_or_path=target.name,
        **ours_in(checkpoint.config),
    )
    names = {
        name.replace("layers.", "trunk.layers.", 1): name
        for name in checkpoint.headers
        if name not in _COPIES
    }
    state = {new: checkpoint.tensor(old) for new, old in names.items()}
    if tokens is not None:
        state["draft_token_ids"] = tokens
    return Found(ours, state, notes)


def _extra(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What is there of ours, if we exported it."""
    found = checkpoint.config.get(EXTRA)
    return found if isinstance(found, Mapping) else {}


def _backbone(checkpoint: Checkpoint) -> str:
    """By what it was trained: files do not say, but for ours; names often do."""
    guess = "hass" if "hass" in checkpoint.source.lower() else "eagle2"
    return _extra(checkpoint).get("backbone", guess)


def _draft_tokens(checkpoint: Checkpoint) -> torch.Tensor | None:
    """(K,) int64: which tokens are scored, where we exported it with a draft vocabulary."""
    tokens = _extra(checkpoint).get("draft_token_ids")
    if tokens is None:
        return None
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        raise ValueError(
            f"{checkpoint.config_file} has `{EXTRA}.draft_token_ids` {tokens!r:.40}, expected a "
            "list of token ids."
        )
    return torch.tensor(tokens)


def _layer_settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The configuration of the layer: all of the file, or, of old speculators, a part."""
    config = checkpoint.config
    inner = config.get("transformer_layer_config")
    return (
        config if not isinstance(inner, Mapping) else {**inner, "bias": config.get("fusion_bias")}
    )


def _expected(
    fields: Mapping[str, Any], fc_bias: bool, attention_bias: bool
) -> dict[str, tuple[int, ...]]:
    width, middle, size = fields["hidden_size"], fields["intermediate_size"], fields["head_dim"]
    queries, keys = fields["num_attention_heads"] * size, fields["num_key_value_heads"] * size
    layer = "layers.0."
    expected = {
        "fc.weight": (width, 2 * width),
        f"{layer}self_attn.q_proj.weight": (queries, width),
        f"{layer}self_attn.k_proj.weight": (keys, width),
        f"{layer}self_attn.v_proj.weight": (keys, width),
        f"{layer}self_attn.o_proj.weight": (width, queries),
        f"{layer}mlp.gate_proj.weight": (middle, width),
        f"{layer}mlp.up_proj.weight": (middle, width),
        f"{layer}mlp.down_proj.weight": (width, middle),
        f"{layer}post_attention_layernorm.weight": (width,),
    }
    if fc_bias:
        expected["fc.bias"] = (width,)
    if attention_bias:
        for name, rows in zip(_ATTENTION, (queries, keys, keys)):
            expected[f"{layer}self_attn.{name}.bias"] = (rows,)
    return expected
