"""Writing EAGLE-3 heads. All of them get sorted offsets as a draft vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..drafters.configuration_eagle3 import default_layer_ids
from ..drafters.modeling_eagle3 import Eagle3Drafter
from .reading import EXTRA
from .written import LAYER, Written, check_reference_rope, common_reasons, layer_of, ours_of, refuse


def _eagle3_tensors(drafter: Eagle3Drafter, layer: str) -> dict[str, torch.Tensor]:
    """With offsets for token ids: token i of the head is i + d2t[i]."""
    state = drafter.state_dict()
    tokens = state.pop("draft_token_ids", None)
    tensors = {name.replace(LAYER, layer, 1): x for name, x in state.items()}
    size, rows = drafter.config.vocab_size, drafter.num_scored_tokens
    ids = torch.arange(rows) if tokens is None else tokens.cpu()
    tensors["d2t"] = ids - torch.arange(rows)
    tensors["t2d"] = torch.zeros(size, dtype=torch.bool).index_fill_(0, ids, True)
    return tensors


def _eagle3_flags(drafter: Eagle3Drafter) -> dict[str, Any]:
    names = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    flags = {name: getattr(drafter.config, name) for name in names}
    return {**flags, "draft_vocab_size": drafter.num_scored_tokens}


def _eagle3_reasons(
    drafter: Eagle3Drafter, families: tuple[str, ...], own_size: bool, attention_bias: bool
) -> dict[str, str | None]:
    layer, heads = drafter.trunk.config, drafter.trunk.config.num_attention_heads
    return {
        **common_reasons(drafter, families),
        "size": "its heads are not of size hidden_size / heads"
        if not own_size and layer.head_dim * heads != layer.hidden_size
        else None,
        "bias": "its attention has biases, which have no place there"
        if layer.attention_bias and not attention_bias
        else None,
        "features": "it reads one layer only, of which the projection would be skipped there"
        if len(drafter.config.layer_ids) == 1
        else None,
    }


def to_eagle(drafter: Eagle3Drafter, target: PreTrainedModel) -> Written:
    """As the original reads it, which has one dialect."""
    config = drafter.config
    layers = target.config.get_text_config(decoder=True).num_hidden_layers
    flags = [name for name, value in _eagle3_flags(drafter).items() if value is True]
    usual = layers >= 7 and default_layer_ids(layers) == config.layer_ids
    refuse(
        "eagle",
        **_eagle3_reasons(drafter, ("llama",), own_size=False, attention_bias=False),
        flags=f"it is of a dialect that the original has not ({', '.join(flags)})"
        if flags
        else None,
        layers=f"it reads hidden_states {config.layer_ids}, and the original always 2, n // 2 and "
        f"n - 3 of n layers (the target has {layers})"
        if not usual
        else None,
    )
    check_reference_rope(drafter)
    fields = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **layer_of(drafter, target),
        "bias": False,
        "draft_vocab_size": drafter.num_scored_tokens,
        EXTRA: ours_of(drafter),
    }
    return Written(fields, _eagle3_tensors(drafter, "midlayer."))


def to_sglang(drafter: Eagle3Drafter, target: PreTrainedModel) -> Written:
    """For SGLang, whose ids of layers count outputs."""
    refuse(
        "sglang",
        **_eagle3_reasons(drafter, ("llama",), own_size=True, attention_bias=False),
        residual="its residual is the normalised feature (`norm_before_residual`), which SGLang's "
        "layer has not; vLLM's has"
        if drafter.config.norm_before_residual
        else None,
    )
    # There, ids count the layers whose outputs are read, and not what the next ones read.
    outputs = [layer - 1 for layer in drafter.config.layer_ids]
    fields = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **layer_of(drafter, target),
        "bias": False,
        "attention_bias": False,
        **_eagle3_flags(drafter),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": outputs,
            "use_aux_hidden_state": True,
        },
        EXTRA: ours_of(drafter),
    }
    return Written(fields, _eagle3_tensors(drafter, "midlayer."))


def _check_sorted(to: str, drafter: Eagle3Drafter) -> None:
    ids = drafter.config.layer_ids
    if ids != sorted(set(ids)):
        refuse(
            to,
            order=f"it reads hidden_states {ids}, and vLLM sorts them and drops those that are "
            "there twice",
        )


def to_vllm(drafter: Eagle3Drafter, target: PreTrainedModel) -> Written:
    """For vLLM's plain folders, whose layers are Llama's."""
    if drafter.trunk.config.model_type == "qwen3":
        refuse("vllm", family="its layer is Qwen3's; expected `speculators`, which vLLM reads too")
    reasons = _eagle3_reasons(drafter, ("llama",), own_size=True, attention_bias=True)
    refuse("vllm", **reasons)
    _check_sorted("vllm", drafter)
    fields = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **layer_of(drafter, target),
        "attention_bias": drafter.trunk.config.attention_bias,
        **_eagle3_flags(drafter),
        "eagle_aux_hidden_state_layer_ids": drafter.config.layer_ids,
        EXTRA: ours_of(drafter),
    }
    return Written(fields, _eagle3_tensors(drafter, "midlayer."))


# Families of targets of which llama.cpp gives a drafter the inputs of layers (its src/models).
_TARGETS_OF_LLAMA_CPP = (
    "llama",
    "mistral",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "gpt_oss",
    "lfm2",
    "minimax_m2",
    "nemotron_h",
)


def to_llama_cpp(drafter: Eagle3Drafter, target: PreTrainedModel) -> Written:
    """For llama.cpp's `convert_hf_to_gguf.py`, which makes one file of it for llama.cpp.

    Flags that it does not know it ignores, so that the drafter would be served as another; and of
    what the target's last layer gives it reads zeros.
    """
    config, own = drafter.config, target.config.get_text_config(decoder=True)
    unknown = [name for name in ("fc_norm", "norm_output") if getattr(config, name)]
    kind = (drafter.trunk.config.rope_parameters or {}).get("rope_type", "default")
    refuse(
        "llama.cpp",
        **_eagle3_reasons(drafter, ("llama",), own_size=True, attention_bias=False),
        flags=f"it is of a dialect that llama.cpp has not ({', '.join(unknown)})"
        if unknown
        else None,
        layers=f"it reads {len(config.layer_ids)} layers, and llama.cpp's three"
        if len(config.layer_ids) != 3
        else None,
        last=f"it reads hidden_states {config.layer_ids}, of which llama.cpp has the last "
        f"({own.num_hidden_layers}) not"
        if max(config.layer_ids) >= own.num_hidden_layers
        else None,
        target=f"its target is of the family {own.model_type!r}, of whose layers llama.cpp gives "
        f"no states; expected one of {', '.join(_TARGETS_OF_LLAMA_CPP)}"
        if own.model_type not in _TARGETS_OF_LLAMA_CPP
        else None,
        rope=f"its rotary positions are scaled by {kind!r}, and only llama3's scaling was compared"
        if kind not in ("default", "llama3")
        else None,
    )
    fields = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **layer_of(drafter, target),
        **_eagle3_flags(drafter),
        "eagle_aux_hidden_state_layer_ids": config.layer_ids,
        EXTRA: ours_of(drafter),
    }
    return Written(fields, _eagle3_tensors(drafter, "midlayer."))


def to_speculators(drafter: Eagle3Drafter, target: PreTrainedModel) -> Written:
    """As the speculators project writes it, which vLLM serves by itself.

    With a copy of the target's embedding, as it writes one: without, its loader (0.9.0) leaves
    memory as it finds it, and fetches the target's only if there happens to be a NaN in it.
    """
    reasons = _eagle3_reasons(drafter, ("llama", "qwen3"), own_size=True, attention_bias=True)
    refuse("speculators", **reasons)
    _check_sorted("speculators", drafter)
    layer = layer_of(drafter, target)
    layer["model_type"] = drafter.trunk.config.model_type
    layer["attention_bias"] = drafter.trunk.config.attention_bias
    for old_spelling in ("rope_theta", "rope_scaling", "pretraining_tp"):
        del layer[old_spelling]
    fields = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        **_eagle3_flags(drafter),
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": drafter.config.layer_ids,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": 3,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "default_proposal_method": "greedy",
            "verifier": {
                "name_or_path": target.config.name_or_path or drafter.config.target_name_or_path,
                "architectures": [type(target).__name__],
            },
        },
        EXTRA: ours_of(drafter),
    }
    tensors = _eagle3_tensors(drafter, "layers.0.")
    if drafter.draft_token_ids is None:  # a whole vocabulary has no maps there
        del tensors["d2t"], tensors["t2d"]
    tensors["embed_tokens.weight"] = target.get_input_embeddings().weight
    return Written(fields, tensors)
