"""K EAGLE-3 drafters of one shape and dialect as one computation."""

from __future__ import annotations

import torch
from torch import nn

from ..formats.composition import Dialect
from .stacked import StackedLayer
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


class StackedEagle3(nn.Module):
    """What K EAGLE-3 drafters do, but for their heads; see `drafters.modeling_eagle3`.

    Args:
        shape: of each one's layer.
        dialect: what each reads of the target, and how.
        part: which of the weights this process has.
    """

    def __init__(self, shape: LayerShape, dialect: Dialect, part: Part = WHOLE) -> None:
        super().__init__()
        self.count, self.width, self.dialect = len(dialect.layer_ids), shape.hidden, dialect
        count, width, eps = self.count, shape.hidden, shape.eps
        reads = len(dialect.layer_ids[0])
        # (K, reads) int64: of the layers that vLLM gives; None where all read all of them.
        places = [[dialect.read.index(layer) for layer in ids] for ids in dialect.layer_ids]
        chosen = torch.tensor(places)
        every = chosen.equal(torch.arange(len(dialect.read)).expand(count, -1))
        self.register_buffer("chosen", None if every else chosen)
        self.fc_norm = StackedNorm(count, reads, width, eps=eps) if dialect.fc_norm else None
        self.input_norm = None
        if dialect.norm_before_fc:
            self.input_norm = StackedNorm(count, reads * width, eps=eps)
        self.fc = StackedLinear(count, reads * width, width)
        self.embed_norm = StackedNorm(count, width, eps=eps)
        self.hidden_norm = StackedNorm(count, width, eps=eps)
        self.layer = StackedLayer(count, shape, 2 * width, part)
        self.norm = StackedNorm(count, width, eps=eps)

    def combine(self, features: torch.Tensor) -> torch.Tensor:
        """Each drafter's own feature of the target's, side by side.

        Args:
            features: (n, layers * hidden): of the layers that any of them reads, ascending.

        Returns:
            (n, K * hidden).
        """
        each = features.view(len(features), -1, self.width)
        if self.chosen is None:
            each = each.expand(self.count, -1, -1, -1)
        else:
            each = each[:, self.chosen].transpose(0, 1)  # (K, n, reads, hidden)
        if self.fc_norm is not None:
            each = self.fc_norm(each)
        each = each.flatten(2)
        if self.input_norm is not None:
            each = self.input_norm(each)
        return side_by_side(self.fc(each))

    def forward(
        self, embeds: torch.Tensor, features: torch.Tensor, attend: Attend, summed: Sum
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`StackedTrunks`]; what tokens are scored from is normalised."""
        each = by_drafter(features, self.count)
        normed = self.hidden_norm(each)
        residual = normed if self.dialect.norm_before_residual else each
        embeds = self.embed_norm(embeds.expand(self.count, -1, -1))
        out = self.layer(torch.cat([embeds, normed], dim=-1), residual, attend, summed)
        scored = side_by_side(self.norm(out))
        return scored, scored if self.dialect.norm_output else side_by_side(out)

    def places(self, drafter: int) -> dict[str, Place]:
        """See [`HasPlaces`]."""
        k, width, fc = drafter, self.width, self.fc.weight[drafter]
        found = {
            **self.layer.places(k),
            "fc.weight": Place(tuple(fc.shape), fc),
            "norm.weight": Place((width,), self.norm.weight[k, 0]),
            "layers.0.input_layernorm.weight": Place((width,), self.embed_norm.weight[k, 0]),
            "layers.0.hidden_norm.weight": Place((width,), self.hidden_norm.weight[k, 0]),
        }
        if self.input_norm is not None:
            norm = self.input_norm.weight[k, 0]
            found["input_norm.weight"] = Place(tuple(norm.shape), norm)
        if self.fc_norm is not None:
            for i, norm in enumerate(self.fc_norm.weight[k, 0]):
                found[f"fc_norm.{i}.weight"] = Place((width,), norm)
        return found
