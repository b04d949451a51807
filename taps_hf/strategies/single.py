"""One drafter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..trees.tree import DraftTree
from .base import Choice, Strategy, register_strategy


@register_strategy("single")
@dataclass(frozen=True)
class Single(Strategy):
    """Use one drafter and leave the others alone.

    Args:
        index: its position in `assistant_models`.
    """

    index: int = 0

    @property
    def supports_sampled_proposals(self) -> bool:
        """Nothing is chosen."""
        return True

    def check(self, num_drafters: int) -> None:
        if not isinstance(self.index, int) or not 0 <= self.index < num_drafters:
            raise ValueError(
                f"Single(index={self.index!r}) was given {num_drafters} drafters, expected an "
                f"index from 0 to {num_drafters - 1}."
            )

    def ask(self, everyone: tuple[int, ...]) -> tuple[int, ...]:
        return (self.index,)

    def compose(self, trees: Mapping[int, DraftTree]) -> Choice:
        return Choice(trees[self.index], (self.index,))
