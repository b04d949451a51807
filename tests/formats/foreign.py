"""Folders as others write them, of random weights, for a tiny target."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..drafters.reference import Shape

VOCAB, WIDTH, MIDDLE, HEADS, SHARED, LAYERS = 24, 32, 40, 4, 2, 8
TOKENS = [1, 2, 5, 7, 8, 11, 13, 14, 20, 23]  # of a draft vocabulary
Tensors = dict[str, torch.Tensor]


@functools.cache
def target() -> PreTrainedModel:
    """A random Llama of eight layers. Cached: do not change it."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=SHARED,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = None
    return model.eval()


def random(shape: tuple[int, ...], seed: int, norm: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if norm:
        return torch.rand(shape, generator=generator) + 0.5
    return torch.randn(shape, generator=generator) * 0.25


def made(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    return {
        name: random(shape, i, norm="norm" in name)
        for i, (name, shape) in enumerate(shapes.items())
    }


def _layer(prefix: str, read: int, size: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}self_attn.q_proj.weight": (HEADS * size, read),
        f"{prefix}self_attn.k_proj.weight": (SHARED * size, read),
        f"{prefix}self_attn.v_proj.weight": (SHARED * size, read),
        f"{prefix}self_attn.o_proj.weight": (WIDTH, HEADS * size),
        f"{prefix}mlp.gate_proj.weight": (MIDDLE, WIDTH),
        f"{prefix}mlp.up_proj.weight": (MIDDLE, WIDTH),
        f"{prefix}mlp.down_proj.weight": (WIDTH, MIDDLE),
        f"{prefix}post_attention_layernorm.weight": (WIDTH,),
    }


def eagle(bias: bool = False, qkv_bias: bool = False, embedding: bool = True) -> Tensors:
    """What EAGLE-1, EAGLE-2, HASS and TAPS save."""
    tensors = made({"fc.weight": (WIDTH, 2 * WIDTH), **_layer("layers.0.", WIDTH, 8)})
    if bias:
        tensors["fc.bias"] = random((WIDTH,), 90)
    if qkv_bias:
        for i, (name, rows) in enumerate((("q", HEADS), ("k", SHARED), ("v", SHARED))):
            tensors[f"layers.0.self_attn.{name}_proj.bias"] = random((rows * 8,), 91 + i)
    if embedding:
        tensors["embed_tokens.weight"] = target().get_input_embeddings().weight.detach().clone()
    return tensors


EAGLE_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": WIDTH,
    "intermediate_size": MIDDLE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": SHARED,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": VOCAB,
}
# No `rope_theta`: 10000, whatever the target's is.
EAGLE_SHAPE = Shape(HEADS, SHARED, 8, 1e-5, 10000.0)


def eagle3(
    prefix: str = "midlayer.", size: int = 8, features: int = 3, extra: Mapping[str, Any] = {}
) -> Tensors:
    """What EAGLE-3's authors, SpecForge, NVIDIA and speculators save."""
    shapes = {
        "fc.weight": (WIDTH, features * WIDTH),
        **_layer(prefix, 2 * WIDTH, size),
        f"{prefix}input_layernorm.weight": (WIDTH,),
        f"{prefix}hidden_norm.weight": (WIDTH,),
        "norm.weight": (WIDTH,),
        "lm_head.weight": (len(TOKENS), WIDTH),
        **extra,
    }
    chosen = torch.tensor(TOKENS)
    maps = {
        "d2t": chosen - torch.arange(len(TOKENS)),
        "t2d": torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, chosen, True),
    }
    return {**made(shapes), **maps}


EAGLE3_CONFIG: dict[str, Any] = {
    **{k: v for k, v in EAGLE_CONFIG.items() if k != "rms_norm_eps"},
    "architectures": ["LlamaForCausalLMEagle3"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000.0,
    "draft_vocab_size": len(TOKENS),
}
EAGLE3_SHAPE = Shape(HEADS, SHARED, 8, 1e-6, 5000.0)

SPECULATORS_CONFIG: dict[str, Any] = {
    "architectures": ["Eagle3Speculator"],
    "speculators_model_type": "eagle3",
    "speculators_version": "0.9.0",
    "draft_vocab_size": len(TOKENS),
    "norm_before_residual": True,
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
    "target_hidden_size": None,
    "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
    "embed_requires_grad": False,
    "transformer_layer_config": {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": MIDDLE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": SHARED,
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "vocab_size": VOCAB,
        "num_hidden_layers": 1,
    },
    "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "somebody's"}},
}


def write(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    how: str = "safetensors",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A folder of `model.safetensors`, of `shards`, or of a `pickle`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    if how == "pickle":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif how == "shards":
        names = sorted(tensors)
        parts = {
            name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(names)
        }
        for file in set(parts.values()):
            own = {name: tensors[name] for name in names if parts[name] == file}
            save_file(own, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": parts}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
