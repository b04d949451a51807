"""Attention masks as kernels want them."""

from __future__ import annotations

import torch


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As it is added to attention scores: 0 where a query may look, elsewhere the lowest number.

    Args:
        mask: bool of any shape, True where a query may look.
        dtype: of the scores.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
