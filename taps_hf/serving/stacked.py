"""K drafters of one shape as one computation, over any split of their heads and MLPs.

Rows of all drafters are in one tensor (K, n, size): n tokens, those of a whole batch of requests.
Products are batched over K; attention and positions are the engine's, and are passed in. Weights
are split over the processes of a tensor-parallel group as Megatron-LM splits them (arXiv
1909.08053, section 3): q, k, v, gate and up by their outputs, o and down by their inputs, after
which the parts are summed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

Sum = Callable[[torch.Tensor], torch.Tensor]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TrunkShape:
    """What one drafter's layer looks like.

    Args:
        hidden: width.
        middle: of the MLP.
        heads, kv_heads: of queries, and of keys and values.
        head: their size.
        eps: of the norms.
        input_norm: whether the layer normalises its input.
        qkv_bias: whether queries, keys and values have biases.
    """

    hidden: int
    middle: int
    heads: int
    kv_heads: int
    head: int
    eps: float
    input_norm: bool
    qkv_bias: bool


@dataclass(frozen=True)
class Part:
    """Which part of the weights a process has.

    Args:
        rank: of the process.
        size: how many processes share the weights.
    """

    rank: int = 0
    size: int = 1

    def check(self, shape: TrunkShape) -> None:
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

    def kv_heads(self, shape: TrunkShape) -> slice:
        """Heads of keys and values; with more processes than heads several have the same one."""
        if shape.kv_heads >= self.size:
            return self.of(shape.kv_heads)
        first = self.rank * shape.kv_heads // self.size
        return slice(first, first + 1)


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.transpose(1, 2)
        return torch.bmm(x, weight) if self.bias is None else torch.baddbmm(self.bias, x, weight)


class StackedNorm(nn.Module):
    """K root-mean-square norms, (K, n, size) from (K, n, size); computed in float32 as Llama's."""

    def __init__(self, count: int, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, 1, size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class StackedTrunks(nn.Module):
    """The projections and layers of K drafters.

    Args:
        count: K.
        shape: of each.
        fc_bias: whether any projection has a bias.
        part: which of the weights this process has.
    """

    def __init__(self, count: int, shape: TrunkShape, fc_bias: bool, part: Part = Part()) -> None:
        super().__init__()
        part.check(shape)
        self.count, self.shape, self.part = count, shape, part
        width, middle = shape.hidden, shape.middle // part.size
        self.q_size = shape.heads // part.size * shape.head
        heads = part.kv_heads(shape)
        self.kv_size = (heads.stop - heads.start) * shape.head
        self.fc = StackedLinear(count, 2 * width, width, fc_bias)
        self.input_norm = StackedNorm(count, width, shape.eps) if shape.input_norm else None
        self.qkv = StackedLinear(count, width, self.q_size + 2 * self.kv_size, shape.qkv_bias)
        self.o = StackedLinear(count, self.q_size, width)
        self.norm = StackedNorm(count, width, shape.eps)
        self.gate_up = StackedLinear(count, width, 2 * middle)
        self.down = StackedLinear(count, middle, width)
        self._left = {(k, name) for k in range(count) for name in self._places()}

    def forward(
        self, embeds: torch.Tensor, features: torch.Tensor, attend: Attend, summed: Sum
    ) -> torch.Tensor:
        """Predict the next features.

        Args:
            embeds: (n, hidden): of the next tokens, the same for all drafters.
            features: (n, K * hidden): the target's, K times, or each drafter's own predictions.
            attend: (K, n, q) from (K, n, q), (K, n, kv) and (K, n, kv): rotary positions and
                attention, each drafter over its own keys and values.
            summed: the sum of a tensor over the processes that share the weights.

        Returns:
            (n, K * hidden).
        """
        n = embeds.shape[0]
        read = features.view(n, self.count, -1).transpose(0, 1)
        hidden = self.fc(torch.cat([embeds.expand(self.count, -1, -1), read], dim=-1))
        normed = hidden if self.input_norm is None else self.input_norm(hidden)
        q, k, v = self.qkv(normed).split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        hidden = hidden + summed(self.o(attend(q, k, v)))
        gate, up = self.gate_up(self.norm(hidden)).chunk(2, dim=-1)
        hidden = hidden + summed(self.down(F.silu(gate) * up))
        return hidden.transpose(0, 1).reshape(n, -1)

    def load(self, drafter: int, name: str, tensor: torch.Tensor) -> None:
        """Take this process' part of one tensor of a drafter.

        Args:
            drafter: which, from 0.
            name: as [`EagleDrafter`] calls it, without `trunk.`.
            tensor: whole.

        Raises:
            ValueError: for a tensor that no drafter of this shape has.
        """
        places = self._places()
        if name not in places or not 0 <= drafter < self.count:
            raise ValueError(f"drafters.{drafter}.{name} is no tensor of these drafters.")
        whole, rows, columns, place = places[name]
        if tensor.shape != whole:
            raise ValueError(
                f"drafters.{drafter}.{name} has the shape {tuple(tensor.shape)}, expected {whole}."
            )
        mine = tensor[rows] if tensor.dim() == 1 else tensor[rows, columns]
        place(drafter).copy_(mine)
        self._left.discard((drafter, name))

    def check_loaded(self, fc_biases: tuple[bool, ...]) -> None:
        """Raise `ValueError` unless every tensor was loaded.

        Args:
            fc_biases: whether each drafter's projection has a bias.
        """
        left = {(k, name) for k, name in self._left if name != "fc.bias" or fc_biases[k]}
        if left:
            raise ValueError(
                "The checkpoint lacks "
                + ", ".join(f"drafters.{k}.{name}" for k, name in sorted(left))
            )

    def _places(self) -> dict[str, tuple[tuple[int, ...], slice, slice, Callable]]:
        """By name: the whole shape, the rows and columns of this process, and where they go."""
        shape, part = self.shape, self.part
        width, every = shape.hidden, slice(None)
        heads, kv = shape.heads * shape.head, shape.kv_heads * shape.head
        of_kv = part.kv_heads(shape)
        of_kv = slice(of_kv.start * shape.head, of_kv.stop * shape.head)
        of_q, of_middle = part.of(heads), part.of(shape.middle)
        middle = shape.middle // part.size
        edges = [0, self.q_size, self.q_size + self.kv_size, self.q_size + 2 * self.kv_size]

        def at(module: StackedLinear | StackedNorm, rows: slice = every) -> Callable:
            return lambda k: module.weight[k, rows]

        def bias_at(module: StackedLinear, rows: slice = every) -> Callable:
            return lambda k: module.bias[k, 0, rows]

        layer = "layers.0."
        found = {
            "fc.weight": ((width, 2 * width), every, every, at(self.fc)),
            f"{layer}self_attn.o_proj.weight": ((width, heads), every, of_q, at(self.o)),
            f"{layer}post_attention_layernorm.weight": ((width,), every, every, at(self.norm, 0)),
            f"{layer}mlp.down_proj.weight": (
                (width, shape.middle),
                every,
                of_middle,
                at(self.down),
            ),
        }
        for name, made, mine, i in (
            ("q", heads, of_q, 0),
            ("k", kv, of_kv, 1),
            ("v", kv, of_kv, 2),
        ):
            rows = slice(edges[i], edges[i + 1])
            found[f"{layer}self_attn.{name}_proj.weight"] = (
                (made, width),
                mine,
                every,
                at(self.qkv, rows),
            )
            if shape.qkv_bias:
                found[f"{layer}self_attn.{name}_proj.bias"] = (
                    (made,),
                    mine,
                    every,
                    bias_at(self.qkv, rows),
                )
        for i, name in enumerate(("gate", "up")):
            found[f"{layer}mlp.{name}_proj.weight"] = (
                (shape.middle, width),
                of_middle,
                every,
                at(self.gate_up, slice(i * middle, (i + 1) * middle)),
            )
        if self.fc.bias is not None:
            found["fc.bias"] = ((width,), every, every, bias_at(self.fc))
        if self.input_norm is not None:
            norm = at(self.input_norm, 0)
            found[f"{layer}input_layernorm.weight"] = ((width,), every, every, norm)
        return found
