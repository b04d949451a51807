"""Writing EAGLE-2 and HASS heads."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..drafters.modeling_eagle import EagleDrafter
from .reading import EXTRA
from .written import LAYER, Written, check_reference_rope, common_reasons, layer_of, ours_of, refuse


def _eagle_tensors(drafter: EagleDrafter) -> dict[str, torch.Tensor]:
    state = drafter.state_dict()
    state.pop("draft_token_ids", None)
    return {name.removeprefix("trunk."): x for name, x in state.items()}


def _eagle_config(drafter: EagleDrafter, target: PreTrainedModel, kind: str) -> dict[str, Any]:
    qkv_bias = f"{LAYER}self_attn.q_proj.bias" in drafter.state_dict()
    return {
        "architectures": [kind],
        **layer_of(drafter, target),
        "bias": drafter.config.fc_bias,
        "qkv_bias": qkv_bias,
        EXTRA: ours_of(drafter),
    }


def _check_eagle(to: str, drafter: EagleDrafter, families: tuple[str, ...]) -> None:
    layer, config = drafter.trunk.config, drafter.config
    heads = layer.num_attention_heads
    size = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    output_bias = f"{LAYER}self_attn.o_proj.bias" in drafter.state_dict()
    refuse(
        to,
        **common_reasons(drafter, families),
        norm="it normalises the layer's input (`input_norm`), which layer 0 has no norm for there"
        if config.input_norm
        else None,
        size=f"its heads have size {size}, not hidden_size / heads = {layer.hidden_size / heads:g}"
        if size * heads != layer.hidden_size
        else None,
        bias="its attention has a bias on the output" if output_bias else None,
    )


def _whole_head(drafter: EagleDrafter, found: Written) -> Written:
    if drafter.draft_token_ids is not None:
        found.notes.append(
            f"the draft vocabulary of {drafter.num_scored_tokens} tokens has no place there: all "
            f"{drafter.config.vocab_size} of the target's will be scored, which takes longer"
        )
    return found


def to_eagle(drafter: EagleDrafter, target: PreTrainedModel) -> Written:
    """As the reference reads it: with a copy of the target's embedding."""
    _check_eagle("eagle", drafter, ("llama", "mistral", "qwen2"))
    check_reference_rope(drafter)
    config = _eagle_config(drafter, target, "LlamaForCausalLM")
    tensors = _eagle_tensors(drafter)
    tensors["embed_tokens.weight"] = target.get_input_embeddings().weight
    return _whole_head(drafter, Written(config, tensors))


def to_sglang(drafter: EagleDrafter, target: PreTrainedModel) -> Written:
    """For SGLang: with a bias, and the draft vocabulary in a file of its own."""
    _check_eagle("sglang", drafter, ("llama", "mistral", "qwen2"))
    biased = drafter.trunk.config.model_type == "qwen2"
    kind = "Qwen2ForCausalLMEagle" if biased else "LlamaForCausalLMEagle"
    found = Written(_eagle_config(drafter, target, kind), _eagle_tensors(drafter))
    if "fc.bias" not in found.tensors:  # there it exists always, and what is not loaded is random
        found.tensors["fc.bias"] = torch.zeros(drafter.config.hidden_size)
        found.config["bias"] = True
        found.notes.append("fc.bias was written as zeros: SGLang's projection always has one")
    if drafter.draft_token_ids is not None:
        found.token_map = drafter.draft_token_ids.detach().cpu()
        found.notes.append(
            "the draft vocabulary is in token_map.pt: start SGLang with "
            "--speculative-token-map FOLDER/token_map.pt"
        )
    return found


def to_vllm(drafter: EagleDrafter, target: PreTrainedModel) -> Written:
    """For vLLM: without any bias, and over the whole vocabulary."""
    _check_eagle("vllm", drafter, ("llama", "mistral"))
    if drafter.config.fc_bias:
        refuse(
            "vllm",
            bias="its projection has a bias (`fc.bias`), which vLLM's has not; train it without "
            "(the default now), or serve it with SGLang",
        )
    config = _eagle_config(drafter, target, "LlamaForCausalLM")
    return _whole_head(drafter, Written(config, _eagle_tensors(drafter)))
