"""The configuration of a drafter's one decoder layer, from that of its target.

A layer with a mixture of experts would read a large part of all experts' weights for a tree's few
nodes. So a drafter's is dense: the family's own dense layer where it has one, else that of the
family whose attention is nearest. It is as wide as what the target activates for a token.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PretrainedConfig

# Keys of a target's configuration that say nothing about the shape of one decoder layer.
_NOT_OF_THE_LAYER = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "per_layer_config",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# What makes a family's first layer a dense one, by the name of the field that says so.
_DENSE = {
    "mlp_layer_types": ["dense"],
    "mlp_only_layers": [0],
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layers": [],
    "moe_layer_start_index": 1,
    "moe_layer_freq": [0],
}
# Families without a dense layer of their own, and the one whose layer is nearest without experts.
_SIBLINGS = {
    "aria_text": "llama",
    "cohere2_moe": "cohere2",
    "ernie4_5_moe": "ernie4_5",
    "flex_olmo": "llama",
    "gpt_oss": "llama",
    "granitemoe": "granite",
    "granitemoe_swa": "granite",
    "granitemoeshared": "granite",
    "hunyuan_v1_moe": "hunyuan_v1_dense",
    "jetmoe": "llama",
    "minimax_m2": "llama",
    "mixtral": "mistral",
    "olmoe": "llama",
    "phimoe": "llama",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen3",
    "solar_open": "llama",
}
ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


def layer_config(config: PretrainedConfig, dense: bool = True) -> dict[str, Any]:
    """The fields of a one-layer model of a target's family, `model_type` among them.

    Args:
        config: of the target's text decoder.
        dense: leave out mixtures of experts.

    Raises:
        ValueError: if the family's layers are mixtures of experts and no dense one is known, or if
            the family's code cannot make a model of one layer.
    """
    sparse_only = dense and config.model_type in _SIBLINGS
    fields = _sibling(config) if sparse_only else _own(config, dense)
    fields.update(
        num_hidden_layers=1,
        # The embedding is built only to be dropped: make it as small as can be, with ids within.
        vocab_size=1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    # A drafter always attends to everything: its one layer is cheap, and its cache small.
    window = getattr(config, "sliding_window", None)
    if fields.get("layer_types") is not None:
        fields["layer_types"] = ["full_attention"]
        # Some families with layer types insist on a window even where no layer slides.
        window = window and config.max_position_embeddings
    else:
        window = None
    fields["sliding_window"] = window
    for name in ("use_sliding_window", "max_window_layers"):
        fields.pop(name, None)
    if dense and (experts := _experts(build_trunk(fields, "meta"))):
        raise ValueError(
            f"The layers of the target's family ({config.model_type}) are mixtures of experts "
            f"({experts}) and no dense one is known for it; `dense=False` makes a drafter of such "
            "a layer."
        )
    return fields


def _own(config: PretrainedConfig, dense: bool) -> dict[str, Any]:
    """The target's own fields, lists with an entry a layer cut to one."""
    fields = {k: v for k, v in config.to_diff_dict().items() if k not in _NOT_OF_THE_LAYER}
    fields["model_type"] = config.model_type
    every = config.to_dict()
    types = every.get("layer_types") or ["full_attention"]
    layer = types.index("full_attention") if "full_attention" in types else 0
    for name, value in every.items():  # defaults too: theirs would be those of many layers
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            fields[name] = value[layer : layer + 1]
    if dense:
        fields.update({k: copy.copy(v) for k, v in _DENSE.items() if every.get(k) is not None})
    return fields


def _sibling(config: PretrainedConfig) -> dict[str, Any]:
    """What a dense family makes of the target's fields."""
    kind = _SIBLINGS[config.model_type]
    every = config.to_dict()
    known = AutoConfig.for_model(kind).to_dict().keys() - _NOT_OF_THE_LAYER
    fields = {name: copy.deepcopy(every[name]) for name in known & every.keys()}
    fields["model_type"] = kind
    if "kv_channels" in every:  # jetmoe
        fields["head_dim"] = config.kv_channels
    if kind == "llama" and isinstance(rope := fields.get("rope_parameters"), dict):
        rope.pop("partial_rotary_factor", None)  # Llama's attention rotates whole heads
    if "moe_intermediate_size" not in every:  # then `intermediate_size` is one expert's
        active = next((every[name] for name in ACTIVE_EXPERTS if every.get(name)), 1)
        active = max(active) if isinstance(active, list) else active
        fields["intermediate_size"] = config.intermediate_size * active
    return fields


def _experts(trunk: nn.Module) -> str | None:
    """The name of a module with experts' weights, if there is one."""
    for name, module in trunk.named_modules():
        stacked = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
        if name.rpartition(".")[2] == "experts" or (stacked and not isinstance(module, nn.Conv1d)):
            return name
    return None


def build_trunk(
    fields: dict[str, Any], device: torch.device | str | None = None, attention: str = "sdpa"
) -> nn.Module:
    """The one-layer model that a layer's configuration describes.

    Args:
        fields: see [`layer_config`].
        device: where its weights are made; None for torch's current one.
        attention: its attention implementation; eager where the family has no sdpa.

    Raises:
        ValueError: if the family's code refuses the fields in whatever way, or makes something
            that is not built like Llama.
    """
    family = fields.get("model_type")
    try:
        config = build_config(fields)
        if attention == "sdpa" and not MODEL_MAPPING[type(config)]._supports_sdpa:
            attention = "eager"
        with torch.device(device if device is not None else torch.get_default_device()):
            trunk = AutoModel.from_config(config, attn_implementation=attention)
    except ValueError:
        raise
    except Exception as error:  # a configuration is data: any error of a family's code refuses it
        raise ValueError(
            f"A one-layer model of the family {family!r} cannot be made of `layer_config`: "
            f"{type(error).__name__}: {error}"
        ) from error
    missing = [name for name in ("embed_tokens", "layers", "norm") if not hasattr(trunk, name)]
    if missing:
        raise ValueError(
            f"Drafters for the family {family!r} are not supported: its transformers model has no "
            f"{', '.join(missing)} (expected a Llama-like one)."
        )
    if len(trunk.layers) != 1:
        raise ValueError(
            f"Drafters for the family {family!r} are not supported: its transformers model makes "
            f"{len(trunk.layers)} layers of a configuration of one."
        )
    return trunk


def build_config(fields: dict[str, Any]) -> PretrainedConfig:
    """The transformers configuration of a drafter's one-layer trunk.

    Raises:
        ValueError: if `model_type` is missing, or if the family's configuration refuses the fields.
    """
    fields = copy.deepcopy(fields)  # some families change nested fields in place
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ValueError(
            "`layer_config` has no `model_type`; build the configuration with "
            "EagleDrafterConfig.from_target(target.config)."
        )
    try:
        return AutoConfig.for_model(model_type, **fields)
    except ValueError:
        raise
    except Exception as error:  # as in `build_trunk`
        raise ValueError(
            f"`layer_config` is not a configuration of the family {model_type!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
