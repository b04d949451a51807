"""What K drafters of one shape are built of: their linear layers and norms as one, and loading.

Rows of all drafters are in one tensor (K, n, size): n tokens, those of a whole batch of requests.
Weights are split over the processes of a tensor-parallel group as Megatron-LM splits them (arXiv
1909.08053, section 3): q, k, v, gate and up by their outputs, o and down by their inputs, after
which the parts are summed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import nn

Apply = Callable[[torch.Tensor], torch.Tensor]
Sum = Callable[[torch.Tensor], torch.Tensor]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LayerShape:
    """What one drafter's layer looks like.

    Args:
        hidden: width.
        middle: of the MLP.
        heads, kv_heads: of queries, and of keys and values.
        head: their size.
        eps: of the norms.
        qkv_bias: whether queries, keys and values have biases.
        qk_norm: whether queries and keys are normalised, head by head.
    """

    hidden: int
    middle: int
    heads: int
    kv_heads: int
    head: int
    eps: float
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True)
class Part:
    """Which part of the weights a process has.

    Args:
        rank: of the process.
        size: how many processes share the weights.
    """

    rank: int = 0
    size: int = 1

    def check(self, shape: LayerShape) -> None:
        """Raise `ValueError` unless the heads and the MLP can be split so."""
        whole, few = max(shape.kv_heads, self.size), min(shape.kv_heads, self.size)
        if shape.heads % self.size or shape.middle % self.size or whole % few:
            raise ValueError(
                f"`tensor_parallel_size` is {self.size}, which does not divide the drafters' "
                f"{shape.heads} heads, {shape.kv_heads} heads of keys and values, or "
                f"{shape.middle} units of the MLP."
            )

    def of(self, size: int) -> slice:
        """Of `size` rows or columns."""
        each = size // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def kv_heads(self, shape: LayerShape) -> slice:
        """Heads of keys and values; with more processes than heads several have the same one."""
        if shape.kv_heads >= self.size:
            return self.of(shape.kv_heads)
        first = self.rank * shape.kv_heads // self.size
        return slice(first, first + 1)


WHOLE = Part()


class StackedLinear(nn.Module):
    """K linear layers, (K, n, out) from (K, n, in).

    Args:
        count: K.
        read, made: sizes of inputs and outputs.
        bias: whether there is one; those that are not loaded are zero.
    """

    def __init__(self, count: int, read: int, made: int, bias: bool = False) -> None:
        super().__init__()
        # As torch's own linear layers have them: a batched product reads either order as fast.
        self.weight = nn.Parameter(torch.empty(count, made, read), requires_grad=False)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(count, 1, made), requires_grad=False)
        self._apart: list[Apply] | None = None

    def separate(self, make: Callable[[torch.Tensor], Apply]) -> None:
        """Compute K products one after the other from now on.

        A CPU has kernels for one matrix, arranged as they like it, that take less time than a
        batched product; and nothing is won there by fewer calls.

        Args:
            make: gives the product with a weight, (n, out) from (n, in), of that weight, (out,
                in). The weights are not kept here any longer.
        """
        self._apart = [make(weight) for weight in self.weight]
        self.weight = nn.Parameter(self.weight.new_empty(len(self.weight), 0, 0), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._apart is not None:
            made = [apply(rows) for apply, rows in zip(self._apart, x)]
            made = torch.stack(made) if len(made) > 1 else made[0][None]  # of one: not copied
            return made if self.bias is None else made + self.bias
        weight = self.weight.transpose(1, 2)
        return torch.bmm(x, weight) if self.bias is None else torch.baddbmm(self.bias, x, weight)


class StackedNorm(nn.Module):
    """K root-mean-square norms over the last dimension; computed in float32 as Llama's.

    Args:
        count: K.
        *size: of what one row of one drafter holds. Of (K, n, *size) each is scaled by a weight of
            its own, (K, 1, *size).
        eps: see Llama.
    """

    def __init__(self, count: int, *size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, 1, *size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


M = TypeVar("M", bound=nn.Module)


def alone(module: M, drafter: int) -> M:
    """The part of one drafter of a module of several, with the same weights.

    Args:
        module: all of whose parameters and buffers have the drafters as their first dimension.
        drafter: which.
    """
    part, one = copy.copy(module), slice(drafter, drafter + 1)
    part.count = 1
    part._parameters = {
        name: None if x is None else nn.Parameter(x.data[one], requires_grad=False)
        for name, x in module._parameters.items()
    }
    part._buffers = {name: None if x is None else x[one] for name, x in module._buffers.items()}
    part._modules = {
        name: None if x is None else alone(x, drafter) for name, x in module._modules.items()
    }
    if isinstance(part, StackedLinear) and part._apart is not None:
        part._apart = part._apart[one]
    return part


def by_drafter(side_by_side: torch.Tensor, count: int) -> torch.Tensor:
    """(K, n, size) from (n, K * size)."""
    return side_by_side.view(len(side_by_side), count, -1).transpose(0, 1)


def side_by_side(each: torch.Tensor) -> torch.Tensor:
    """(n, K * size) from (K, n, size)."""
    return each.transpose(0, 1).reshape(each.shape[1], -1)


@dataclass(frozen=True)
class Place:
    """Where one tensor of one drafter goes.

    Args:
        whole: its shape.
        to: where this process has its part of it.
        mine: which part that is, by dimension; all of it where nothing is said.
    """

    whole: tuple[int, ...]
    to: torch.Tensor
    mine: tuple[slice, ...] = ()


class HasPlaces(Protocol):
    """A module of several drafters' weights."""

    def places(self, drafter: int) -> dict[str, Place]:
        """By name, as the drafter's own modules have it, without `trunk.`."""


class Loading:
    """Puts the tensors of drafters where they belong, and knows what is still missing.

    Args:
        count: K.
        *modules: that the drafters consist of.
    """

    def __init__(self, count: int, *modules: HasPlaces) -> None:
        self._places = {
            (k, name): place
            for k in range(count)
            for module in modules
            for name, place in module.places(k).items()
        }
        self._left = set(self._places)

    def take(self, drafter: int, name: str, tensor: torch.Tensor) -> None:
        """Copy this process' part of one tensor of a drafter.

        Args:
            drafter: which, from 0.
            name: of its tensor.
            tensor: whole.

        Raises:
            ValueError: for a tensor that this drafter has not, or not so.
        """
        place = self._places.get((drafter, name))
        if place is None:
            raise ValueError(f"drafters.{drafter}.{name} is no tensor of these drafters.")
        if tensor.shape != place.whole:
            raise ValueError(
                f"drafters.{drafter}.{name} has the shape {tuple(tensor.shape)}, expected "
                f"{place.whole}."
            )
        place.to.copy_(tensor[place.mine])
        self._left.discard((drafter, name))

    def check(self) -> None:
        """Raise `ValueError` unless every tensor was loaded."""
        if self._left:
            raise ValueError(
                "The checkpoint lacks "
                + ", ".join(f"drafters.{k}.{name}" for k, name in sorted(self._left))
            )
