"""Routing: several drafters propose, one tree is verified."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..tree import DraftTree
from .base import Choice, CycleOutcome, Strategy, register_strategy


@dataclass(frozen=True)
class _Routing(Strategy):
    """Verify the tree with the highest score.

    Args:
        per: "cycle" decides anew in every cycle. "prompt" decides in the first cycle; from then on
            only the chosen drafter runs.
    """

    per: Literal["cycle", "prompt"] = "cycle"

    def __post_init__(self) -> None:
        if self.per not in ("cycle", "prompt"):
            raise ValueError(f"`per` is {self.per!r}, expected 'cycle' or 'prompt'.")

    @abstractmethod
    def score(self, tree: DraftTree) -> torch.Tensor:
        """(D,) float32, larger is better; NaN for drafters that proposed nothing in the tree."""

    def drafters_to_run(
        self, num_drafters: int, history: Sequence[CycleOutcome]
    ) -> tuple[int, ...]:
        if self.per == "prompt" and history:
            return history[0].drafters
        return super().drafters_to_run(num_drafters, history)

    def compose(self, trees: Mapping[int, DraftTree], history: Sequence[CycleOutcome]) -> Choice:
        scores = torch.stack([self.score(tree)[index] for index, tree in trees.items()])
        best = list(trees)[int(scores.nan_to_num(nan=-torch.inf).argmax())]
        return Choice(trees[best], (best,))


@register_strategy("confidence")
@dataclass(frozen=True)
class Confidence(_Routing):
    """Route to the tree with the largest mean node confidence (TAPS, equation 13)."""

    def score(self, tree: DraftTree) -> torch.Tensor:
        return tree.mean_confidence()


@register_strategy("entropy")
@dataclass(frozen=True)
class Entropy(_Routing):
    """Route to the tree with the smallest mean draft entropy: a diagnostic baseline."""

    needs_entropy = True

    def score(self, tree: DraftTree) -> torch.Tensor:
        return -tree.mean_entropy()
