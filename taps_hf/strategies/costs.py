"""What a pass of the target and a level of drafting cost, and learning more of it."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DraftCost:
    """Seconds for drafters that run as one.

    Args:
        first: for what was accepted, and the first level.
        level: for each level after that.
    """

    first: float
    level: float


@dataclass(frozen=True)
class Costs:
    """Latencies, in seconds, of one target and its drafters.

    Args:
        target: (rows, seconds) of the target's pass, ascending: a tree of n nodes has n + 1 rows.
        groups: indices of the drafters that run as one.
        one: for each group, when one of it drafts.
        all: for each group, when all of it draft.
        widths: if passes are made wider, to one of a few widths, these, ascending: then nodes cost
            nothing up to the next. Empty where every number of rows has its own pass.
    """

    target: tuple[tuple[int, float], ...]
    groups: tuple[tuple[int, ...], ...]
    one: tuple[DraftCost, ...]
    all: tuple[DraftCost, ...]
    widths: tuple[int, ...] = ()

    def rows_run(self, rows: int) -> int:
        """How many rows a pass over so many has."""
        at = bisect_left(self.widths, rows)
        return self.widths[at] if at < len(self.widths) else rows

    def target_seconds(self, rows: int) -> float:
        """A pass of the target over so many rows: linear between and beyond what was measured."""
        points, rows = self.target, self.rows_run(rows)
        if len(points) == 1:
            return points[0][1]
        after = bisect_right([width for width, _ in points], rows)
        i = min(max(after - 1, 0), len(points) - 2)
        (x0, y0), (x1, y1) = points[i], points[i + 1]
        return max(y0 + (rows - x0) * (y1 - y0) / (x1 - x0), 0.0)

    def up_to(self, rows: int) -> torch.Tensor:
        """(rows,) float32: entry n is a pass over n + 1 rows."""
        return torch.tensor([self.target_seconds(n) for n in range(1, rows + 1)], device="cpu")

    def draft(self, asked: Sequence[int]) -> DraftCost:
        """Of the drafters asked, one group after the other."""
        first = level = 0.0
        for group, one, everyone in zip(self.groups, self.one, self.all):
            wanted = sum(index in group for index in asked)
            if wanted:
                cost = one if wanted == 1 else everyone
                first, level = first + cost.first, level + cost.level
        return DraftCost(first, level)


class LearntCosts:
    """Latencies measured beforehand, corrected by what passes and drafts of generations took.

    A few passes are timed beforehand, and on a machine that others use as well that says little of
    the difference between 16 rows and 17. What is learnt are proportions: of passes to passes, and
    of drafts to passes. That everything is slower at times changes nothing.

    Args:
        measured: beforehand.
    """

    _BELIEF = 8.0  # passes' worth of belief in what was measured
    _KEPT = 200.0  # passes that are remembered; older ones fade
    _PACE = 0.1  # weight of one pass in the pace of late

    def __init__(self, measured: Costs) -> None:
        self.measured = measured
        self._lock = threading.Lock()
        self._pace: float | None = None  # seconds over those measured, of late
        # Of each measured width and of drafts: weight, and weighted seconds over those expected.
        self._passes = [[self._BELIEF, self._BELIEF] for _ in measured.target]
        self._drafts = [self._BELIEF, self._BELIEF]

    def observe(
        self, rows: int, seconds: float, asked: Sequence[int], levels: int, seconds_draft: float
    ) -> None:
        """Learn from one cycle.

        Args:
            rows: of the target's pass.
            seconds: that it took.
            asked: the drafters that drafted; none if nobody did.
            levels: that they grew.
            seconds_draft: that this took.
        """
        ratio = seconds / self.measured.target_seconds(rows)
        with self._lock:
            if self._pace is None:
                self._pace = ratio
            relative = self._learn(
                ratio,
                [(self._passes[i], x) for i, x in self._shares(self.measured.rows_run(rows))],
            )
            if asked:
                draft = self.measured.draft(asked)
                expected = draft.first + (levels - 1) * draft.level
                self._learn(seconds_draft / expected, [(self._drafts, 1.0)])
            self._pace *= relative**self._PACE

    @property
    def costs(self) -> Costs:
        """What is known by now, as if measured at the pace of then."""
        with self._lock:
            drafts = self._drafts[1] / self._drafts[0]
            target = [
                (width, seconds * total / weight)
                for (width, seconds), (weight, total) in zip(self.measured.target, self._passes)
            ]
        one, everyone = (
            tuple(DraftCost(cost.first * drafts, cost.level * drafts) for cost in costs)
            for costs in (self.measured.one, self.measured.all)
        )
        known = self.measured
        return Costs(ascending(target), known.groups, one, everyone, known.widths)

    def _learn(self, ratio: float, where: Sequence[tuple[list[float], float]]) -> float:
        """Add seconds over those measured to what is known; returns them relative to the pace."""
        relative = min(max(ratio / self._pace, 0.5), 2.0)  # interruptions are not learnt
        for known, share in where:
            fade = min(self._KEPT / (known[0] + share), 1.0)
            known[0] = fade * (known[0] + share)
            known[1] = fade * (known[1] + share * relative)
        return relative

    def _shares(self, rows: int) -> list[tuple[int, float]]:
        """The measured widths between which a pass lies, and how much it says about each."""
        widths = [width for width, _ in self.measured.target]
        after = bisect_right(widths, rows)
        if after in (0, len(widths)):
            return [(max(after - 1, 0), 1.0)]
        share = (rows - widths[after - 1]) / (widths[after] - widths[after - 1])
        return [(after - 1, 1.0 - share), (after, share)]


def ascending(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """By width, no pass longer than a wider one: others on the machine only ever add to a time."""
    least, found = float("inf"), []
    for width, seconds in sorted(points, reverse=True):
        least = min(least, seconds)
        found.append((width, least))
    return tuple(reversed(found))
