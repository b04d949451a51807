"""Every figure that is reported, defined once.

*Accepted length* counts draft tokens a cycle; *tau* counts tokens emitted per target pass. *Micro*
means weigh every cycle alike, *macro* means every answer.

Against the scripts that came with the paper and with EAGLE: a mean over samples of the accepted
length of their cycles, plus one, is our macro accepted length plus 1. New tokens over the index of
the last loop, counted from 0, divide by one cycle too few; [`tau_by_last_index`] does the same.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .measurements import Cycles

Figure = Callable[[Sequence[Cycles]], float]
_Question = tuple[str, float]  # by name, and the temperature at which it was answered


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval: bootstrap over questions (all turns of one together)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        between = "-" if self.low >= 0 else " to "
        return f"{self.value:.2f} ({self.low:.2f}{between}{self.high:.2f})"


def accepted_length(rows: Sequence[Cycles]) -> float:
    """Draft tokens accepted per cycle, micro."""
    return _ratio(sum(sum(row.accepted) for row in rows), sum(len(row.accepted) for row in rows))


def tau(rows: Sequence[Cycles]) -> float:
    """Tokens emitted per target pass, micro."""
    return _ratio(sum(row.tokens for row in rows), sum(len(row.accepted) for row in rows))


def macro_accepted_length(rows: Sequence[Cycles]) -> float:
    """Mean over answers of their draft tokens accepted per cycle."""
    return statistics.fmean(accepted_length([row]) for row in rows)


def macro_tau(rows: Sequence[Cycles]) -> float:
    """Mean over answers of their tokens per target pass."""
    return statistics.fmean(tau([row]) for row in rows)


def tau_by_last_index(rows: Sequence[Cycles]) -> float:
    """Mean over answers of tokens over cycles less one, for comparison with scripts that do so."""
    found = [row.tokens / (len(row.accepted) - 1) for row in rows if len(row.accepted) > 1]
    return statistics.fmean(found) if found else float("nan")


def nodes(rows: Sequence[Cycles]) -> float:
    """Nodes verified per cycle, the root not counted."""
    return _ratio(sum(sum(row.nodes) for row in rows), sum(len(row.nodes) for row in rows))


def speedup(rows: Sequence[Cycles]) -> float:
    """Median over answers of plain `generate`'s time over the variant's; live runs only."""
    found = [row.plain_seconds / row.seconds for row in rows if row.seconds]
    return statistics.median(found) if found else float("nan")


def acceptance_by_depth(rows: Sequence[Cycles], least: int = 1) -> dict[int, float]:
    """Of the cycles that went on at depth d - 1, the share that accepted a token at depth d.

    Cycles that drafted nothing, and stops in the middle of a path, do not count. Depths that fewer
    than `least` cycles reached are left out.
    """
    reached: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    for row in rows:
        for length, emitted, drafted in zip(row.accepted, row.emitted, row.chosen):
            if drafted:
                for depth in range(1, emitted + 1):
                    reached[depth] += 1
                    accepted[depth] += depth <= length
    known = [d for d in sorted(reached) if reached[d] >= least and (accepted[d] or d == 1)]
    return {d: accepted[d] / reached[d] for d in known}


def routing(rows: Sequence[Cycles], drafters: Sequence[str]) -> dict[str, float]:
    """Share of the cycles in which each drafter's proposals were verified."""
    chosen = [index for row in rows for indices in row.chosen for index in indices]
    cycles = sum(bool(indices) for row in rows for indices in row.chosen)
    return {name: _ratio(chosen.count(index), cycles) for index, name in enumerate(drafters)}


def entropies(rows: Sequence[Cycles]) -> dict[str, float]:
    """Mean draft and target entropy, nats, where tokens were accepted and where rejected."""
    columns = ("accepted_entropy", "rejected_entropy")
    columns += ("accepted_target_entropy", "rejected_target_entropy")
    return {name: _mean(_flat(getattr(row, name) for row in rows)) for name in columns}


def overlap(rows: Sequence[Cycles]) -> float:
    """Mean share of proposed paths that all drafters proposed."""
    return _mean(_flat(row.overlap for row in rows))


def bootstrap(
    figure: Figure, rows: Sequence[Cycles], level: float = 0.95, resamples: int = 1000
) -> Estimate:
    """A figure with its interval: percentiles over resampled questions, the same at every call."""
    groups = _by_question(rows)

    def of(keys: Sequence[_Question]) -> float:
        return figure([row for key in keys for row in groups[key]])

    return _percentiles(of, sorted(groups), level, resamples)


def difference(
    figure: Figure,
    rows: Sequence[Cycles],
    against: Sequence[Cycles],
    level: float = 0.95,
    resamples: int = 1000,
) -> Estimate:
    """A variant's figure less another's, with its interval: paired, over resampled questions.

    Questions differ more than variants do. Pairing takes the questions' part away, so it separates
    variants whose own intervals overlap.

    Args:
        figure: of some rows.
        rows, against: of the two variants, on the same questions.
        level, resamples: of the bootstrap.

    Raises:
        ValueError: if the questions are not the same.
    """
    return _paired(lambda a, b: figure(a) - figure(b), rows, against, level, resamples)


def share(
    figure: Figure,
    rows: Sequence[Cycles],
    whole: Sequence[Cycles],
    level: float = 0.95,
    resamples: int = 1000,
) -> Estimate:
    """A variant's figure over another's, with its interval: paired, as [`difference`].

    Args:
        figure: of some rows.
        rows, whole: of the two variants, on the same questions.
        level, resamples: of the bootstrap.

    Raises:
        ValueError: if the questions are not the same.
    """
    return _paired(lambda a, b: _ratio(figure(a), figure(b)), rows, whole, level, resamples)


def _paired(
    compare: Callable[[Sequence[Cycles], Sequence[Cycles]], float],
    rows: Sequence[Cycles],
    others: Sequence[Cycles],
    level: float,
    resamples: int,
) -> Estimate:
    ours, theirs = _by_question(rows), _by_question(others)
    if ours.keys() != theirs.keys():
        raise ValueError(
            f"{len(ours.keys() ^ theirs.keys())} questions were answered by one of the variants "
            "only, expected the same questions."
        )

    def of(keys: Sequence[_Question]) -> float:
        return compare(*([row for key in keys for row in found[key]] for found in (ours, theirs)))

    return _percentiles(of, sorted(ours), level, resamples)


def _by_question(rows: Sequence[Cycles]) -> dict[_Question, list[Cycles]]:
    """All turns of a question together, at each temperature."""
    groups: dict[_Question, list[Cycles]] = defaultdict(list)
    for row in rows:
        question, _, _ = row.record.rsplit("/", 2)  # see `Record.key`: the turn, and which text
        groups[question, row.temperature].append(row)
    return groups


def _percentiles(
    figure: Callable[[Sequence[_Question]], float],
    keys: Sequence[_Question],
    level: float,
    resamples: int,
) -> Estimate:
    rng = random.Random(0)
    found = sorted(figure(rng.choices(keys, k=len(keys))) for _ in range(resamples))
    tail = (1 - level) / 2
    low, high = found[int(tail * resamples)], found[int((1 - tail) * resamples) - 1]
    return Estimate(figure(keys), low, high)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.fmean(found) if found else float("nan")


def _flat(columns: Iterable[Sequence[object]]) -> Iterable[float]:
    """Numbers out of lists of numbers, of lists of them, and of Nones."""
    for column in columns:
        for entry in column:
            if isinstance(entry, list):
                yield from (value for value in entry if value is not None)
            elif entry is not None:
                yield entry
