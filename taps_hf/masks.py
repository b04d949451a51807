"""Attention masks as kernels want them."""

from __future__ import annotations

import torch

# Elements at whose multiples rows begin: CUDA's kernels would copy other masks in every layer.
_ALIGNED = 8


def additive(mask: torch.Tensor, dtype: torch.dtype, past: int = 0) -> torch.Tensor:
    """As it is added to attention scores: 0 where a query may look, elsewhere the lowest number.

    Eager attention needs masks of this kind, and sdpa would make one of a boolean mask in every
    layer.

    Args:
        mask: bool of shape (..., queries, keys), True where a query may look.
        dtype: of the scores.
        past: so many keys before these are seen by all.

    Returns:
        (..., queries, past + keys).
    """
    keys = past + mask.shape[-1]
    room = -(-keys // _ALIGNED) * _ALIGNED
    whole = torch.zeros(*mask.shape[:-1], room, dtype=dtype, device=mask.device)[..., :keys]
    whole[..., past:].masked_fill_(~mask, torch.finfo(dtype).min)
    return whole
