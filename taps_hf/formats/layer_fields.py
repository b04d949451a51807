"""From a foreign configuration to the `layer_config` of a drafter's layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Scalings of rotary positions that stay the same within a text, as transformers names them.
_SCALINGS = ("default", "linear", "llama3", "yarn")


def llama_fields(
    config: Mapping[str, Any], where: str, family: str, max_positions: int
) -> dict[str, Any]:
    """The fields of a one-layer Llama-like model.

    Args:
        config: sizes and rotary positions by the names that transformers gives them.
        where: the file, for messages.
        family: `model_type` of the layer.
        max_positions: of the target: a drafter goes as far, whatever its file says.

    Raises:
        ValueError: if sizes are missing or make no sense, or positions scale in a way that is not
            known, or that changes within a text.
    """
    sizes = {
        name: _size(config, name, where)
        for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    }
    heads = sizes["num_attention_heads"]
    if config.get("head_dim") is None and sizes["hidden_size"] % heads:
        raise ValueError(
            f"{where} has `hidden_size` {sizes['hidden_size']} and `num_attention_heads` {heads}, "
            "expected a multiple of it, or `head_dim`."
        )
    shared = config.get("num_key_value_heads") is None
    return {
        "model_type": family,
        **sizes,
        "num_key_value_heads": heads if shared else _size(config, "num_key_value_heads", where),
        "head_dim": (
            sizes["hidden_size"] // heads
            if config.get("head_dim") is None
            else _size(config, "head_dim", where)
        ),
        "hidden_act": config.get("hidden_act") or "silu",
        "rms_norm_eps": _number(config, "rms_norm_eps", 1e-6, where),
        "rope_parameters": rope_parameters(config, where),
        "max_position_embeddings": max_positions,
        "num_hidden_layers": 1,
        # The embedding is built only to be dropped: make it as small as can be, with ids within.
        "vocab_size": 1,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "sliding_window": None,
    }


def rope_parameters(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Rotary positions as transformers 5 writes them, from either spelling.

    A base that is missing is 10000, never the target's: that is what trainers of drafters default
    to. `rope_parameters`, the newer spelling, wins over the older one.

    Raises:
        ValueError: for scalings that are not known, or change within a text.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{where} has rotary positions {rope!r}, expected an object.")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "mrope":  # of text alone all three positions are the same
        kind = "default"
        rope = {k: v for k, v in rope.items() if k == "rope_theta"}
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ValueError(
            f"{where} scales rotary positions by {kind!r}, expected one of {', '.join(_SCALINGS)}."
        )
    partly = [given.get("partial_rotary_factor") for given in (rope, config)]
    if any(factor not in (None, 1) for factor in partly):
        raise ValueError(f"{where} rotates a part of each head only, expected the whole of it.")
    theta = _number(config, "rope_theta", 10000.0, where)
    theta = _number(rope, "rope_theta", theta, where)
    kept = {k: v for k, v in rope.items() if k not in ("type", "partial_rotary_factor")}
    return {**kept, "rope_type": kind, "rope_theta": theta}


def _size(config: Mapping[str, Any], name: str, where: str) -> int:
    value = config.get(name)
    if type(value) is not int or not 0 < value < 2**24:
        raise ValueError(f"{where} has `{name}` {value!r}, expected a positive integer.")
    return value


def _number(config: Mapping[str, Any], name: str, default: float, where: str) -> float:
    value = config.get(name)
    if value is None:
        return default
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not 0 < value < 1e12:
        raise ValueError(f"{where} has `{name}` {value!r}, expected a positive number.")
    return float(value)


def flag(config: Mapping[str, Any], name: str, where: str) -> bool:
    """A truth value; False where there is none.

    Raises:
        ValueError: if it is something else.
    """
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{where} has `{name}` {value!r}, expected true or false.")
    return bool(value)
