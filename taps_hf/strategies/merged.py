"""Merging: several drafters propose, the target verifies all of it in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..trees.tree import DraftTree, concatenate, merge
from .base import Choice, Strategy, register_strategy


@register_strategy("merged")
@dataclass(frozen=True)
class Merged(Strategy):
    """Verify the trees of all drafters at once, under their shared root (TAPS, section 4).

    Args:
        num_nodes: verify only this many nodes (the root not counted), the best by path confidence.
            None verifies everything: up to the sum of the trees' sizes.
        packing: "union" verifies what several drafters proposed once. "concatenate" is the paper's
            packing (appendix A.4), which places duplicates side by side; for comparison.
    """

    num_nodes: int | None = None
    packing: Literal["union", "concatenate"] = "union"

    def __post_init__(self) -> None:
        if self.packing not in ("union", "concatenate"):
            raise ValueError(f"`packing` is {self.packing!r}, expected 'union' or 'concatenate'.")
        if self.num_nodes is not None and (
            not isinstance(self.num_nodes, int) or self.num_nodes < 1
        ):
            raise ValueError(
                f"`num_nodes` is {self.num_nodes!r}, expected None or a positive integer."
            )

    @property
    def supports_sampled_proposals(self) -> bool:
        """A node budget would choose among sampled tokens."""
        return self.num_nodes is None

    def compose(self, trees: Mapping[int, DraftTree]) -> Choice:
        ordered = list(trees.values())
        if self.packing == "union":
            tree = merge(ordered, self.num_nodes)
        else:
            tree = concatenate(ordered)
            if self.num_nodes is not None:
                tree = tree.best(self.num_nodes)
        return Choice(tree, tuple(trees))
