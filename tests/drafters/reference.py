"""Slow, obvious forwards of drafters' checkpoints, by the names that their tensors have in files.

Written from the papers and the formats, token by token, with nothing of the package or of
transformers: what readers, writers and models are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """What a file's tensors do not say of a layer, and the dialect of an EAGLE-3 head."""

    heads: int
    key_value_heads: int
    head_size: int
    eps: float
    theta: float
    norm_before_residual: bool = False
    norm_output: bool = False


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """One head's vector (d,), turned by its position: pairs are half a vector apart."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        a, b = x[i], x[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def linear(tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    out = tensors[f"{name}.weight"] @ x
    return out + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else out


def attention(tensors: Tensors, prefix: str, x: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Causal self-attention of (n, width): (n, hidden)."""
    keys, values, found = [], [], []
    for position, vector in enumerate(x):
        query, key, value = (
            linear(tensors, f"{prefix}{name}_proj", vector).view(-1, shape.head_size)
            for name in "qkv"
        )
        assert (len(query), len(key)) == (shape.heads, shape.key_value_heads)
        if f"{prefix}q_norm.weight" in tensors:
            query = rms(query, tensors[f"{prefix}q_norm.weight"], shape.eps)
            key = rms(key, tensors[f"{prefix}k_norm.weight"], shape.eps)
        keys.append([rotate(head, position, shape.theta) for head in key])
        values.append(value)
        heads = []
        for h, head in enumerate(query):
            shared = h // (shape.heads // shape.key_value_heads)
            turned = rotate(head, position, shape.theta)
            scores = torch.stack([turned @ key[shared] for key in keys]) / shape.head_size**0.5
            weights = scores.softmax(dim=0)
            heads.append(sum(w * value[shared] for w, value in zip(weights, values)))
        found.append(linear(tensors, f"{prefix}o_proj", torch.cat(heads)))
    return torch.stack(found)


def mlp(tensors: Tensors, prefix: str, x: torch.Tensor) -> torch.Tensor:
    gate = torch.nn.functional.silu(linear(tensors, f"{prefix}gate_proj", x))
    return linear(tensors, f"{prefix}down_proj", gate * linear(tensors, f"{prefix}up_proj", x))


def eagle(
    tensors: Tensors, shape: Shape, embeds: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """EAGLE-1, EAGLE-2, HASS: the next features (n, hidden) of slots (embedding, feature)."""
    h = torch.stack([linear(tensors, "fc", torch.cat(slot)) for slot in zip(embeds, features)])
    h = h + attention(tensors, "layers.0.self_attn.", h, shape)
    norm = tensors["layers.0.post_attention_layernorm.weight"]
    return torch.stack([x + mlp(tensors, "layers.0.mlp.", rms(x, norm, shape.eps)) for x in h])


def fuse(tensors: Tensors, shape: Shape, states: list[torch.Tensor]) -> torch.Tensor:
    """EAGLE-3: what is made of the target's hidden states, (n, hidden) for each layer."""
    if "fc_norm.0.weight" in tensors:
        states = [rms(x, tensors[f"fc_norm.{i}.weight"], shape.eps) for i, x in enumerate(states)]
    joined = torch.cat(states, dim=1)
    if "input_norm.weight" in tensors:
        joined = rms(joined, tensors["input_norm.weight"], shape.eps)
    return torch.stack([tensors["fc.weight"] @ x for x in joined])


def eagle3(
    tensors: Tensors, shape: Shape, embeds: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """EAGLE-3: the next features (n, hidden) of slots (embedding, fused feature or prediction)."""
    prefix = next(p for p in ("midlayer.", "layers.0.") if f"{p}hidden_norm.weight" in tensors)
    normed = rms(features, tensors[f"{prefix}hidden_norm.weight"], shape.eps)
    read = torch.cat(
        [rms(embeds, tensors[f"{prefix}input_layernorm.weight"], shape.eps), normed], dim=1
    )
    residual = normed if shape.norm_before_residual else features
    residual = residual + attention(tensors, f"{prefix}self_attn.", read, shape)
    norm = tensors[f"{prefix}post_attention_layernorm.weight"]
    out = torch.stack(
        [x + mlp(tensors, f"{prefix}mlp.", rms(x, norm, shape.eps)) for x in residual]
    )
    return rms(out, tensors["norm.weight"], shape.eps) if shape.norm_output else out


def eagle3_logits(tensors: Tensors, shape: Shape, out: torch.Tensor) -> torch.Tensor:
    """(n, draft vocabulary) from what [`eagle3`] returns."""
    if not shape.norm_output:
        out = rms(out, tensors["norm.weight"], shape.eps)
    return torch.stack([tensors["lm_head.weight"] @ x for x in out])
