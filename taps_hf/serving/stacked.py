"""K EAGLE-2 or HASS drafters of one shape as one computation, over any split of their layers.

Attention and positions are the engine's, and are passed in; everything else is batched over K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .stacks import (
    WHOLE,
    Attend,
    LayerShape,
    Part,
    Place,
    StackedLinear,
    StackedNorm,
    Sum,
    by_drafter,
    side_by_side,
)


class StackedLayer(nn.Module):
    """Attention and MLPs of K layers, but for the norms of what they read.

    Args:
        count: K.
        shape: of each.
        reads: size of what attention reads.
        part: which of the weights this process has.
    """

    def __init__(self, count: int, shape: LayerShape, reads: int, part: Part) -> None:
        super().__init__()
        part.check(shape)
        self.shape, self.part, self.reads = shape, part, reads
        width, middle, heads = shape.hidden, shape.middle // part.size, part.kv_heads(shape)
        self.q_size = shape.heads // part.size * shape.head
        self.kv_size = (heads.stop - heads.start) * shape.head
        self.qkv = StackedLinear(count, reads, self.q_size + 2 * self.kv_size, shape.qkv_bias)
        self.q_norm = self.k_norm = None
        if shape.qk_norm:  # (K, n, heads, head)
            self.q_norm = StackedNorm(count, 1, shape.head, eps=shape.eps)
            self.k_norm = StackedNorm(count, 1, shape.head, eps=shape.eps)
        self.o = StackedLinear(count, self.q_size, width)
        self.norm = StackedNorm(count, width, eps=shape.eps)
        self.gate_up = StackedLinear(count, width, 2 * middle)
        self.down = StackedLinear(count, middle, width)

    def forward(
        self, read: torch.Tensor, residual: torch.Tensor, attend: Attend, summed: Sum
    ) -> torch.Tensor:
        """(K, n, hidden): `residual`, and what attention and MLP add to it.

        Args:
            read: (K, n, reads): what attention reads.
            residual: (K, n, hidden).
            attend, summed: see [`StackedTrunks.forward`].
        """
        q, k, v = self.qkv(read).split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.q_norm is not None:
            q, k = (
                norm(x.unflatten(2, (-1, self.shape.head))).flatten(2)
                for norm, x in ((self.q_norm, q), (self.k_norm, k))
            )
        hidden = residual + summed(self.o(attend(q, k, v)))
        gate, up = self.gate_up(self.norm(hidden)).chunk(2, dim=-1)
        return hidden + summed(self.down(F.silu(gate) * up))

    def places(self, drafter: int) -> dict[str, Place]:
        """See [`HasPlaces`]."""
        shape, k, every = self.shape, drafter, slice(None)
        width = shape.hidden
        of_middle, down, o = self.part.of(shape.middle), self.down.weight[k], self.o.weight[k]
        q = shape.heads * shape.head
        found = {
            "self_attn.o_proj.weight": Place((width, q), o, (every, self.part.of(q))),
            "post_attention_layernorm.weight": Place((width,), self.norm.weight[k, 0]),
            "mlp.down_proj.weight": Place((width, shape.middle), down, (every, of_middle)),
        }
        for name, to in zip(("gate", "up"), self.gate_up.weight[k].chunk(2)):
            found[f"mlp.{name}_proj.weight"] = Place((shape.middle, width), to, (of_middle,))
        found |= self._attention_places(k)
        return {f"layers.0.{name}": place for name, place in found.items()}

    def _attention_places(self, k: int) -> dict[str, Place]:
        """Of queries, keys and values, which are one product."""
        shape, sizes = self.shape, [self.q_size, self.kv_size, self.kv_size]
        of_kv = self.part.kv_heads(shape)
        of_kv = slice(of_kv.start * shape.head, of_kv.stop * shape.head)
        q, kv = shape.heads * shape.head, shape.kv_heads * shape.head
        wholes, mine = (q, kv, kv), (self.part.of(q), of_kv, of_kv)
        found = {}
        for name, whole, rows, to in zip("qkv", wholes, mine, self.qkv.weight[k].split(sizes)):
            found[f"self_attn.{name}_proj.weight"] = Place((whole, self.reads), to, (rows,))
        if self.qkv.bias is not None:
            for name, whole, rows, to in zip("qkv", wholes, mine, self.qkv.bias[k, 0].split(sizes)):
                found[f"self_attn.{name}_proj.bias"] = Place((whole,), to, (rows,))
        for name, norm in (("q", self.q_norm), ("k", self.k_norm)):
            if norm is not None:
                found[f"self_attn.{name}_norm.weight"] = Place((shape.head,), norm.weight[k, 0, 0])
        return found


class StackedTrunks(nn.Module):
    """The projections and layers of K drafters; see `drafters.modeling_eagle`.

    Args:
        shape: of each one's layer.
        fc_biases: whether each one's projection has a bias.
        input_norm: whether their layers normalise their input.
        part: which of the weights this process has.
    """

    def __init__(
        self, shape: LayerShape, fc_biases: Sequence[bool], input_norm: bool, part: Part = WHOLE
    ) -> None:
        super().__init__()
        self.count, self.width, self.fc_biases = len(fc_biases), shape.hidden, tuple(fc_biases)
        self.fc = StackedLinear(self.count, 2 * shape.hidden, shape.hidden, any(fc_biases))
        self.input_norm = None
        if input_norm:
            self.input_norm = StackedNorm(self.count, shape.hidden, eps=shape.eps)
        self.layer = StackedLayer(self.count, shape, shape.hidden, part)

    def combine(self, features: torch.Tensor) -> torch.Tensor:
        """Each drafter's own feature of the target's, side by side: (n, K * hidden), all the same.

        Args:
            features: (n, hidden).
        """
        return features.repeat(1, self.count)

    def forward(
        self, embeds: torch.Tensor, features: torch.Tensor, attend: Attend, summed: Sum
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the next features.

        Args:
            embeds: (n, hidden): of the next tokens, the same for all drafters.
            features: (n, K * hidden): as `combine` gives them, or each drafter's own predictions.
            attend: (K, n, q) from (K, n, q), (K, n, kv) and (K, n, kv): rotary positions and
                attention, each drafter over its own keys and values.
            summed: the sum of a tensor over the processes that share the weights.

        Returns:
            (n, K * hidden), twice: what tokens are scored from, and what is fed back.
        """
        read = by_drafter(features, self.count)
        hidden = self.fc(torch.cat([embeds.expand(self.count, -1, -1), read], dim=-1))
        normed = hidden if self.input_norm is None else self.input_norm(hidden)
        found = side_by_side(self.layer(normed, hidden, attend, summed))
        return found, found

    def places(self, drafter: int) -> dict[str, Place]:
        """See [`HasPlaces`]."""
        k, width, fc = drafter, self.width, self.fc.weight[drafter]
        found = {**self.layer.places(k), "fc.weight": Place(tuple(fc.shape), fc)}
        if self.fc_biases[k]:
            found["fc.bias"] = Place((width,), self.fc.bias[k, 0])
        if self.input_norm is not None:
            norm = self.input_norm.weight[k, 0]
            found["layers.0.input_layernorm.weight"] = Place((width,), norm)
        return found
