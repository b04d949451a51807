"""Attention of chains drafted at every slot at once, without the keys that none of them sees.

Of step i a slot of step j > i sees one key (see [`steps.harmonised_steps`]). With a mask over all
keys, attention would take a sum of 1 + 2 + ... + j times what the first step takes; here every step
takes about as much as the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

_NAME = "taps_chains"


@dataclass
class _Pass:
    """A pass of a trunk.

    Args:
        first: the slot from which on steps are run, after the first one.
        attended: whether its attention has been [`chain_attention`].
    """

    first: int
    attended: bool = False


# Not every family's layer hands what a call is given on to its attention.
_running: ContextVar[_Pass] = ContextVar("running")


def can_attend_along_chains(trunk: nn.Module, device: torch.device) -> bool:
    """Whether a drafter's trunk can attend as [`chain_attention`] does, and is faster so.

    It must have torch's sdpa, and in transformers' way: early 5.x versions have families that
    choose an attention when they are made. Kernels of GPUs take masks well; theirs is not measured.
    """
    config = trunk.config
    return (
        device.type == "cpu"
        and config._attn_implementation == "sdpa"
        and trunk._can_set_attn_implementation()
    )


@contextmanager
def attending_along_chains(trunk: nn.Module, first: int = 0) -> Iterator[None]:
    """Let a drafter's trunk attend as [`chain_attention`] does.

    It is called without a mask then, on a cache of all steps before. Nobody else may use the trunk
    meanwhile, in another thread either; and what recomputes a pass for its gradient (gradient
    checkpointing) has to do it within this context, too.

    Args:
        trunk: for which [`can_attend_along_chains`].
        first: the slot from which on steps are run, after the first one.

    Raises:
        RuntimeError: if its attention was another one nevertheless.
    """
    config, running = trunk.config, _Pass(first)
    before, token = config._attn_implementation, _running.set(running)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _running.reset(token)
    if not running.attended:
        raise RuntimeError(f"{type(trunk).__name__} does not attend as its configuration says.")


def chain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers, for step j of drafting at every slot from one on.

    Slot p sees the true slots up to p - j + 1, and of each later step i <= j the slot p - j + i.
    Row by row, whose scores fit into a CPU's cache, and again for the gradient rather than kept.
    To be called within [`attending_along_chains`].

    Args:
        module: unused, like `kwargs`.
        query: (batch, heads, slots, head size).
        key: (batch, key heads, first + j x slots, head size): of all steps, the first one first,
            which alone has the slots before.
        value: (batch, key heads, first + j x slots, value size).
        attention_mask: none: what each slot sees is known.
        dropout: of the attention's weights.
        scaling: of the scores, by default 1 / sqrt(head size).

    Returns:
        (batch, slots, heads, value size), and no weights.

    Raises:
        RuntimeError: for a mask, which would not be kept to.
    """
    if attention_mask is not None:
        raise RuntimeError("Attention along chains was given a mask, and knows what slots see.")
    running = _running.get()
    running.attended = True
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query = query.unflatten(1, (key.shape[1], -1))
    rows = [
        checkpoint(_attend, *row, running.first, scaling, dropout, use_reentrant=False)
        for row in zip(query, key, value)
    ]
    return torch.stack(rows).flatten(1, 2).transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: int,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Of one row; queries and the result are (key heads, heads to each, slots, size)."""
    heads, slots = query.shape[1:3]
    true = first + slots
    last = (key.shape[1] - true) // slots
    true_key, *keys = key.split([true, *[slots] * last], dim=1)
    true_value, *values = value.split([true, *[slots] * last], dim=1)
    # How many slots each step's key lies back; in a text with fewer slots than steps, all of them.
    behind = [min(back, slots) for back in reversed(range(last))]
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.flatten(1, 2) @ true_key.mT).unflatten(1, (heads, slots)).to(wide)
    unseen = torch.ones(slots, true, dtype=torch.bool, device=query.device)
    unseen = unseen.triu(first - last + 1)
    scores = [scores.masked_fill(unseen, -math.inf)]
    for back, of_step in zip(behind, keys):
        own = (query[:, :, back:] * of_step[:, None, : slots - back]).sum(-1, dtype=wide)
        scores.append(F.pad(own, (back, 0), value=-math.inf)[..., None])
    weights = (torch.cat(scores, dim=-1) * scaling).softmax(dim=-1)
    weights = F.dropout(weights, dropout).to(value.dtype)
    found = (weights[..., :true].flatten(1, 2) @ true_value).unflatten(1, (heads, slots))
    for step, (back, of_step) in enumerate(zip(behind, values)):
        seen = F.pad(of_step, (0, 0, back, 0))[:, None, :slots]
        found = found + weights[..., true + step, None] * seen
    return found


AttentionInterface.register(_NAME, chain_attention)
