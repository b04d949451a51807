"""What a pass of the target and a level of drafting cost on this machine, measured once."""

from __future__ import annotations

import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from .cache import CACHE
from .drafting import DrafterSession
from .modeling_eagle import EagleDrafter
from .shapes import TreeShape
from .stacking import groups_of, stacking_key
from .target import TargetSession
from .tree import DraftTree, move

# Rows of a pass, the most telling first: matrix units work in tiles of 16 rows, so there are steps.
_WIDTHS = (1, 16, 17, 32, 33, 8, 64, 48, 49, 4, 65, 96, 2, 12, 24, 128)
_PAST = 64  # tokens before the root while measuring, unless the target takes fewer
_SECONDS = 1.6  # in all; one pass of each kind is made even if that takes longer
_ROUNDS = 3  # that widths are chosen for

_Key = TypeVar("_Key")


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
    """

    target: tuple[tuple[int, float], ...]
    groups: tuple[tuple[int, ...], ...]
    one: tuple[DraftCost, ...]
    all: tuple[DraftCost, ...]

    def target_seconds(self, rows: int) -> float:
        """A pass of the target over so many rows: linear between and beyond what was measured."""
        points = self.target
        if len(points) == 1:
            return points[0][1]
        after = bisect_right([width for width, _ in points], rows)
        i = min(max(after - 1, 0), len(points) - 2)
        (x0, y0), (x1, y1) = points[i], points[i + 1]
        return max(y0 + (rows - x0) * (y1 - y0) / (x1 - x0), 0.0)

    def up_to(self, rows: int) -> torch.Tensor:
        """(rows,) float32: entry n is a pass over n + 1 rows."""
        return torch.tensor([self.target_seconds(n) for n in range(1, rows + 1)])

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
                ratio, [(self._passes[i], share) for i, share in self._shares(rows)]
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
        return Costs(_ascending(target), self.measured.groups, one, everyone)

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


_measured: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple, LearntCosts]]
_measured = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def measure_costs(
    target: PreTrainedModel,
    drafters: Sequence[EagleDrafter],
    tree: TreeShape,
    refresh: bool = False,
) -> Costs:
    """Time passes and drafts, in under two seconds on models whose passes are short.

    What was found is kept for as long as the target lives, by shapes, dtypes, devices and number of
    threads. Only speed depends on it, never what is generated.

    Args:
        target: the model to be accelerated.
        drafters: in the order in which `generate` gets them.
        tree: the largest tree that will be grown.
        refresh: measure anew, and forget what generations have taught.
    """
    return learnt_costs(target, drafters, tree, refresh).measured


def learnt_costs(
    target: PreTrainedModel,
    drafters: Sequence[EagleDrafter],
    tree: TreeShape,
    refresh: bool = False,
) -> LearntCosts:
    """What [`measure_costs`] measures, once, and what generations with `auto` learn thereafter."""
    key = (
        tuple(map(stacking_key, drafters)),
        tree,
        target.dtype,
        target.device,
        torch.get_num_threads(),
    )
    with _lock:
        kept = _measured.setdefault(target, {})
        if refresh or key not in kept:
            kept[key] = LearntCosts(_measure(target, drafters, tree))
        return kept[key]


@torch.no_grad()
def _measure(target: PreTrainedModel, drafters: Sequence[EagleDrafter], tree: TreeShape) -> Costs:
    device = target.get_input_embeddings().weight.device
    vocabulary = target.get_input_embeddings().weight.shape[0]
    config = target.config.get_text_config(decoder=True)
    # Well within the target's positions: beyond them some keep other rotary frequencies for good.
    past = min(_PAST, (getattr(config, "max_position_embeddings", None) or 2 * _PAST) // 2)
    # Any tokens do: what a pass costs does not depend on them.
    ids = (torch.arange(past + 1, device=device) % vocabulary)[None]
    cache = DynamicCache(config=config)
    session = TargetSession(target, ids, GenerationConfig(), {CACHE: cache})
    tokens, features = session.prefill()
    groups = groups_of(drafters)

    passes = {
        ("target", width): _target_run(session, ids[0, -1:], width)
        for width in _widths(session, ids[0, -1:], tree.num_nodes * len(drafters) + 1)
    }
    drafts: dict[tuple, Callable[[], None]] = {}
    for number, group in enumerate(groups):
        for asked in {group[:1], group}:
            for depth in (1, 3):
                drafting = DrafterSession(
                    [drafters[i] for i in group], target, group, len(drafters)
                )
                drafting.observe(tokens, features)
                drafting.ask(asked)
                drafts["draft", number, len(asked), depth] = _draft_run(
                    drafting, tree, depth, tokens[-3:], features[-3:]
                )
    # By turns, as in a generation: a pass leaves little of the drafters' weights in a CPU's caches.
    turns = zip_longest(passes.items(), drafts.items())
    best = _time(dict(run for turn in turns for run in turn if run is not None), device)
    session.release()

    def draft_cost(number: int, asked: int) -> DraftCost:
        first, third = (best["draft", number, asked, depth] for depth in (1, 3))
        return DraftCost(first, max(third - first, 0.0) / 2)

    return Costs(
        _ascending([(key[1], seconds) for key, seconds in best.items() if key[0] == "target"]),
        tuple(groups),
        tuple(draft_cost(number, 1) for number in range(len(groups))),
        tuple(draft_cost(number, len(group)) for number, group in enumerate(groups)),
    )


def _widths(session: TargetSession, token: torch.Tensor, most: int) -> list[int]:
    """The widths to measure up to `most`, ascending: fewer where a pass is long."""
    run = _target_run(session, token, 1)
    run()  # the first takes longer
    (seconds,) = _time({"one": run}, session.device, seconds=0.0).values()
    affordable = max(int(_SECONDS / (1.5 * _ROUNDS * seconds)), 3)  # wider passes take longer
    wanted = dict.fromkeys((1, most, *(width for width in _WIDTHS if width < most)))
    return sorted(list(wanted)[:affordable])


def _ascending(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """By width, no pass longer than a wider one: others on the machine only ever add to a time."""
    least, found = float("inf"), []
    for width, seconds in sorted(points, reverse=True):
        least = min(least, seconds)
        found.append((width, least))
    return tuple(reversed(found))


def _target_run(session: TargetSession, token: torch.Tensor, width: int) -> Callable[[], None]:
    tree = DraftTree.star(token.cpu(), width - 1)

    def run() -> None:
        session.verify(tree)
        session.keep([])

    return run


def _draft_run(
    session: DrafterSession,
    tree: TreeShape,
    depth: int,
    tokens: torch.Tensor,
    features: torch.Tensor,
) -> Callable[[], None]:
    root = tokens[-1:].to(session.device)

    def run() -> None:
        session.observe(tokens, features)
        move(tree.grow(session, root, depth), torch.device("cpu"))

    return run


def _time(
    runs: Mapping[_Key, Callable[[], None]], device: torch.device, seconds: float = _SECONDS
) -> dict[_Key, float]:
    """The shortest time of each, in as many rounds as fit: others on the machine only add to it."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    best: dict[_Key, float] = {}
    began, rounds = now(), 0
    while not rounds or (now() - began) * (1 + 1 / rounds) < seconds:
        for key, run in runs.items():
            start = now()
            run()
            best[key] = min(best.get(key, float("inf")), now() - start)
        rounds += 1
    return best
