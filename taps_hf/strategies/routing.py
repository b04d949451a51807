"""Routing: several drafters propose, one tree is verified."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ..trees.tree import DraftTree
from .base import Choice, GenerationContext, Strategy, register_strategy

TIE = 1e-4
"""Scores that differ by no more are equal: a mean confidence, or nats of mean entropy.

In float32 a batched replay's scores and the live run's have differed by up to 4e-5 (random drafters
with large weights, one CPU, one thread; 2e-7 where they nearly tied). Other rounding may differ by
more. A hundredth of a percent of confidence says nothing about which drafter is right.
"""


@dataclass(frozen=True)
class _Routing(Strategy):
    """Verify the tree with the highest score.

    Confidences are compared as the drafters give them. Between drafters of different kinds that
    says more about how they count than about who is right: "auto" calibrates, routing does not.

    Among drafters whose scores are within [`TIE`] of the highest the first wins. Drafters that are
    certain of all they propose tie again and again, and without a rule rounding would choose among
    them: differently in a replay, in another batch, or on another machine.

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

    def begin(self, context: GenerationContext) -> Strategy:
        return _OncePerPrompt(self) if self.per == "prompt" else self

    def compose(self, trees: Mapping[int, DraftTree]) -> Choice:
        order = sorted(trees)
        scores = torch.stack([self.score(trees[index])[index] for index in order])
        scores = scores.nan_to_num(nan=-torch.inf)
        best = order[(scores >= scores.max() - TIE).tolist().index(True)]
        return Choice(trees[best], (best,))


class _OncePerPrompt(Strategy):
    """Routing that asks only the drafter that it chose first.

    Args:
        routing: how it chooses.
    """

    def __init__(self, routing: _Routing) -> None:
        self._routing = routing
        self._chosen: tuple[int, ...] = ()

    def ask(self, everyone: tuple[int, ...]) -> tuple[int, ...]:
        return self._chosen or everyone

    def compose(self, trees: Mapping[int, DraftTree]) -> Choice:
        choice = self._routing.compose(trees)
        self._chosen = choice.drafters
        return choice


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
