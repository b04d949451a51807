"""Several drafters of one shape as one module: stacked weights, one pass.

Row d of a batch runs through drafter d. What a drafter's modules do between their linear layers
(attention, rotary embedding, residuals) is the same for all and runs as for any batch.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .modeling_eagle import EagleDrafter

_Made = TypeVar("_Made")


class StackedLinear(nn.Module):
    """D linear layers: row d of the input meets weight d.

    Args:
        layers: of the same shape.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        # Stored as (D, in, out), which a batched product reads in order.
        self.weight = torch.stack([layer.weight.detach().t() for layer in layers]).contiguous()
        self.bias = None
        if layers[0].bias is not None:
            self.bias = torch.stack([layer.bias.detach() for layer in layers])[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(D, n, out) from (D, n, in)."""
        if self.bias is None:
            return torch.bmm(x, self.weight)
        return torch.baddbmm(self.bias, x, self.weight)


class _RowWise(nn.Module):
    """D modules with parameters of their own (norms), each on its row."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.rows = list(modules)  # a plain list: they belong to the drafters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([module(x[d : d + 1]) for d, module in enumerate(self.rows)])


def _stacked(modules: Sequence[nn.Module]) -> nn.Module:
    first = modules[0]
    if type(first) is nn.Linear:
        return StackedLinear(modules)
    if first._parameters and any(value is not None for value in first._parameters.values()):
        return _RowWise(modules)
    shell = copy.copy(first)  # shares everything but the modules inside
    shell.__dict__["_modules"] = {
        name: None if child is None else _stacked([module._modules[name] for module in modules])
        for name, child in first._modules.items()
    }
    return shell


def stack(drafters: Sequence[EagleDrafter]) -> nn.Module:
    """A module that is called as a drafter is and runs drafter d on row d of the batch.

    It holds a copy of the drafters' linear layers as they are now.

    Args:
        drafters: two or more with equal [`stacking_key`]s.
    """
    return _stacked(drafters)


def stacking_key(drafter: EagleDrafter) -> tuple[object, ...]:
    """Drafters with equal keys can be stacked."""
    config = drafter.config
    return (
        repr(sorted(config.layer_config.items())),
        config.fc_bias,
        config.input_norm,
        config.draft_vocab_size,
        drafter.trunk.config._attn_implementation,
        drafter.dtype,
        drafter.device,
    )


def groups_of(drafters: Sequence[EagleDrafter]) -> list[tuple[int, ...]]:
    """Indices of the drafters that can be stacked, group by group."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, drafter in enumerate(drafters):
        groups.setdefault(stacking_key(drafter), []).append(index)
    return [tuple(group) for group in groups.values()]


class DraftHead:
    """The target's LM head over the tokens that each drafter scores.

    Args:
        drafters: with equal [`stacking_key`]s.
        target: whose head it is.
    """

    def __init__(self, drafters: Sequence[EagleDrafter], target: PreTrainedModel) -> None:
        self.device, self.dtype = drafters[0].device, drafters[0].dtype
        self.vocab_size = drafters[0].config.vocab_size
        head = target.get_output_embeddings()
        self.full: nn.Module | None = None  # the whole head, where all tokens are scored
        self.ids: torch.Tensor | None = None  # (D, scored) int64
        self.weight: torch.Tensor | None = None  # (D, scored, hidden)
        self.bias: torch.Tensor | None = None  # (D, 1, scored)
        if drafters[0].draft_token_ids is None:
            self.full = head
            return
        self.ids = torch.stack([drafter.draft_token_ids for drafter in drafters])
        rows = self.ids.to(head.weight.device)
        self.weight = head.weight.detach()[rows].to(self.device, self.dtype)
        if getattr(head, "bias", None) is not None:
            self.bias = head.bias.detach()[rows][:, None].to(self.device, self.dtype)

    def row(self, row: int) -> DraftHead:
        """The head of one of the drafters."""
        one = copy.copy(self)
        for name in ("ids", "weight", "bias"):
            if (value := getattr(self, name)) is not None:
                setattr(one, name, value[row : row + 1])
        return one

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, n, scored), of the head's dtype, from (B, n, hidden); with one drafter, any B."""
        # Of a slice with three dimensions torch would make a batched product, and copy the weight.
        flat = hidden.flatten(0, 1)
        if self.full is not None:
            weight = self.full.weight
            logits = self.full(flat.to(weight.device, weight.dtype)).to(self.device)
            return logits.view(*hidden.shape[:2], -1)
        if len(self.weight) == 1:
            bias = None if self.bias is None else self.bias[0, 0]
            return F.linear(flat, self.weight[0], bias).view(*hidden.shape[:2], -1)
        logits = torch.bmm(hidden, self.weight.transpose(1, 2))
        return logits if self.bias is None else logits + self.bias

    def token_ids(self, scored: torch.Tensor) -> torch.Tensor:
        """Token ids (B, n, k) of positions among the scored tokens."""
        if self.ids is None:
            return scored
        return self.ids.expand(len(scored), -1).gather(1, scored.flatten(1)).view_as(scored)

    def over_vocabulary(self, probabilities: torch.Tensor) -> torch.Tensor:
        """(B, n, vocabulary) from (B, n, scored)."""
        if self.ids is None:
            return probabilities
        full = probabilities.new_zeros(*probabilities.shape[:2], self.vocab_size)
        return full.scatter_(2, self.ids[:, None].expand_as(probabilities), probabilities)


# What was made of some drafters: it lives as long as the first of them.
_kept: weakref.WeakKeyDictionary[nn.Module, dict[tuple, tuple[object, object]]]
_kept = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def kept_stack(drafters: Sequence[EagleDrafter]) -> nn.Module:
    """[`stack`], made once for these drafters and again when their weights have changed."""
    return _keep("stack", drafters, lambda: stack(drafters))


def kept_head(drafters: Sequence[EagleDrafter], target: PreTrainedModel) -> DraftHead:
    """[`DraftHead`], made once for these models and again when their weights have changed."""
    if drafters[0].draft_token_ids is None:
        return DraftHead(drafters, target)
    head = target.get_output_embeddings()
    return _keep("head", [*drafters, head], lambda: DraftHead(drafters, target))


def _keep(kind: str, modules: Sequence[nn.Module], make: Callable[[], _Made]) -> _Made:
    """What `make` gives, or gave when none of the modules' tensors was another."""
    tensors = [x for m in modules for x in (*m.parameters(), *m.buffers())]
    state = (
        [weakref.ref(module) for module in modules],
        [(x.data_ptr(), x._version if not x.is_inference() else 0) for x in tensors],
    )
    key = (kind, *map(id, modules))
    with _lock:
        made = _kept.setdefault(modules[0], {})
        if key not in made or made[key][0] != state:
            made[key] = (state, make())
        return made[key][1]
