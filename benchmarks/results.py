"""Measurements: one row a prompt and variant, their file, and the figures made of them."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from taps_hf.files import write_json

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Row:
    """One prompt answered by one variant, and by plain `generate` shortly before or after.

    Args:
        prompt: the prompt's key.
        group: the set of prompts it belongs to.
        variant: strategy and tree.
        tokens: emitted; `seconds` is what they took in all, the prompt's pass included.
        plain_tokens: the same for plain `generate`, in `plain_seconds`.
        differs_at: index of the first token that is not plain's; None if the answers are equal.
        cycles: passes of the target after the prompt's.
        accepted: draft tokens accepted, over all cycles; None, as what follows, if not known.
        nodes: tree nodes verified, over all cycles, roots not counted.
        drafters: whose proposals were verified, over all cycles.
        seconds_draft: of all cycles; `seconds_target` and `seconds_rest` likewise.
    """

    prompt: str
    group: str
    variant: str
    tokens: int
    seconds: float
    plain_tokens: int
    plain_seconds: float
    differs_at: int | None
    cycles: int
    accepted: int | None = None
    nodes: int | None = None
    drafters: int | None = None
    seconds_draft: float | None = None
    seconds_target: float | None = None
    seconds_rest: float | None = None

    @property
    def ratio(self) -> float:
        """Tokens per second, as a multiple of plain generate's."""
        return (self.tokens / self.seconds) / (self.plain_tokens / self.plain_seconds)


class Results:
    """Rows measured under one group of settings, kept in a file if one is given.

    Args:
        file: where to keep them; rows that are there already are taken over.
        settings: what all rows have in common (JSON values).

    Raises:
        ValueError: if the file was written under other settings, or is no file of results.
    """

    def __init__(self, file: Path | None, settings: dict[str, Any]) -> None:
        self.file = file
        self.settings = settings
        self.rows: list[Row] = []
        self._kept: tuple[dict[str, Any], list[Row]] | None = None  # what is in the file
        if file is None or not file.exists():
            return
        self._kept = read_results(file)
        found, rows = self._kept
        self.rows = [*rows]
        for name in sorted({*found, *settings}):
            if found.get(name) != settings.get(name):
                raise ValueError(
                    f"{file} was measured with {name} {found.get(name)!r}, this is "
                    f"{settings.get(name)!r}; expected the same, or another `--out`."
                )

    def has(self, prompt: str, variant: str) -> bool:
        """Whether this has been measured."""
        return any((row.prompt, row.variant) == (prompt, variant) for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Take rows in, and write the file so that it is never seen half written.

        Raises:
            ValueError: if somebody else has written to the file since.
        """
        self.rows += rows
        if self.file is None:
            return
        there = read_results(self.file) if self.file.exists() else None
        if there != self._kept:
            raise ValueError(f"{self.file} was changed meanwhile; expected this run's own file.")
        content = {"settings": self.settings, "rows": [asdict(row) for row in self.rows]}
        write_json(self.file, content)
        self._kept = (self.settings, [*self.rows])


def read_results(file: Path) -> tuple[dict[str, Any], list[Row]]:
    """The settings and the rows in a file.

    Raises:
        ValueError: if it is no file of results.
    """
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return dict(kept["settings"]), [Row(**row) for row in kept["rows"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is no file of results: {error!r}.") from None


def interval(
    values: Sequence[_Value],
    statistic: Callable[[Sequence[_Value]], float] = statistics.median,
    level: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Bootstrap interval of a statistic: percentiles over resamples, the same at every call."""
    rng = random.Random(0)
    found = sorted(statistic(rng.choices(values, k=len(values))) for _ in range(resamples))
    tail = (1 - level) / 2
    return found[int(tail * resamples)], found[int((1 - tail) * resamples) - 1]


def overall(rows: Sequence[Row]) -> float:
    """Tokens per second over all of some prompts together, as a multiple of plain generate's."""
    tokens, seconds, plain_tokens, plain_seconds = (
        sum(getattr(row, name) for row in rows)
        for name in ("tokens", "seconds", "plain_tokens", "plain_seconds")
    )
    return (tokens / seconds) / (plain_tokens / plain_seconds)


def faster(pairs: Sequence[tuple[Row, Row]]) -> float:
    """Tokens per second of the first rows together, as a multiple of that of the second ones.

    Rows that were measured at different times are compared by way of plain `generate`'s in each.
    """
    tokens, seconds = (sum(getattr(a, name) for a, _ in pairs) for name in ("tokens", "seconds"))
    others = sum(b.tokens for _, b in pairs)
    other_seconds = sum(b.seconds * a.plain_seconds / b.plain_seconds for a, b in pairs)
    return (tokens / seconds) / (others / other_seconds)


@dataclass(frozen=True)
class Figures:
    """What some rows of one variant come to.

    Args:
        ratio: median over prompts of the ratio to plain generate; `interval` of that median.
        overall: the ratio of all prompts together; `overall_interval` of that.
        tau: tokens emitted per target pass, over all cycles.
        differing: answers that are not plain's.
        accepted: draft tokens accepted per cycle; None, as what follows, where it is not known.
        nodes: nodes verified per cycle.
        drafters: whose proposals were verified, per cycle.
        draft: share of the cycles' time, 0 to 1; `target` and `rest` likewise.
    """

    ratio: float
    interval: tuple[float, float]
    overall: float
    overall_interval: tuple[float, float]
    tau: float
    differing: int
    accepted: float | None = None
    nodes: float | None = None
    drafters: float | None = None
    draft: float | None = None
    target: float | None = None
    rest: float | None = None

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Figures:
        def total(name: str) -> float:
            return sum(getattr(row, name) for row in rows)

        ratios = [row.ratio for row in rows]
        cycles = total("cycles")
        details = {}
        if all(row.accepted is not None for row in rows):
            details = {name: total(name) / cycles for name in ("accepted", "nodes", "drafters")}
            phases = {name: total(f"seconds_{name}") for name in ("draft", "target", "rest")}
            details |= {name: value / sum(phases.values()) for name, value in phases.items()}
        return cls(
            statistics.median(ratios),
            interval(ratios),
            overall(rows),
            interval(rows, overall),
            total("tokens") / cycles,
            sum(row.differs_at is not None for row in rows),
            **details,
        )


def markdown(rows: Sequence[Row]) -> str:
    """A table for each group of prompts and, of several, one for all; variants by first row.

    If `auto` is among the variants, last how it compares with each of the others.
    """
    groups = {group: [row for row in rows if row.group == group] for group in _groups(rows)}
    if len(groups) > 1:
        groups["all prompts"] = list(rows)
    tables = [_table(name, found) for name, found in groups.items()]
    names = {row.variant for row in rows}
    if "auto" in names and len(names) > 1:
        tables.append(_rivals(groups))
    return "\n\n".join(tables)


def _groups(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.group for row in rows))


def _table(name: str, rows: Sequence[Row]) -> str:
    count = len({row.prompt for row in rows})
    plain = statistics.median(row.plain_tokens / row.plain_seconds for row in rows)
    lines = [
        f"**{name}**, {count} prompt{'s' * (count > 1)}; plain: {plain:.1f} tokens/s (median)",
        "",
        "| variant | x plain [95 %] | together [95 %] | tau | accepted | nodes | drafters "
        "| draft/target/rest | differ |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant, found in _by_variant(rows).items():
        f = Figures.of(found)
        known = "- | - | - | -"
        if f.accepted is not None:
            shares = f"{f.draft:.0%}/{f.target:.0%}/{f.rest:.0%}"
            known = f"{f.accepted:.2f} | {f.nodes:.1f} | {f.drafters:.2f} | {shares}"
        lines.append(
            f"| {variant} | {_with_interval(f.ratio, f.interval)} "
            f"| {_with_interval(f.overall, f.overall_interval)} "
            f"| {f.tau:.2f} | {known} | {f.differing}/{len(found)} |"
        )
    return "\n".join(lines)


HINDSIGHT = "the fastest single drafter of each prompt, in hindsight"


def _rivals(groups: Mapping[str, Sequence[Row]]) -> str:
    """How much faster `auto` is than every other variant, over the same prompts."""
    lines = [
        "**auto's speed over that of others**, same prompts, all together [95 %]",
        "",
        f"| variant | {' | '.join(groups)} |",
        f"| --- |{' --- |' * len(groups)}",
    ]
    cells: dict[str, list[str]] = {}
    for rows in groups.values():
        by_variant = _by_variant(rows)
        singles = [found for name, found in by_variant.items() if name.startswith("single ")]
        if len(singles) > 1:
            best = {}
            for row in (row for found in singles for row in found):
                if row.prompt not in best or row.ratio > best[row.prompt].ratio:
                    best[row.prompt] = row
            by_variant[HINDSIGHT] = list(best.values())
        autos = {row.prompt: row for row in by_variant.pop("auto", [])}
        for name, found in by_variant.items():
            pairs = [(autos[row.prompt], row) for row in found if row.prompt in autos]
            cell = _with_interval(faster(pairs), interval(pairs, faster)) if pairs else "-"
            cells.setdefault(name, []).append(cell)
    return "\n".join([*lines, *(f"| {name} | {' | '.join(row)} |" for name, row in cells.items())])


def _by_variant(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.variant, []).append(row)
    return found


def _with_interval(value: float, bounds: tuple[float, float]) -> str:
    return f"{value:.2f} [{bounds[0]:.2f}, {bounds[1]:.2f}]"
