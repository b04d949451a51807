"""Tables of the paper, for the drafters that were measured."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from . import metrics
from .measurements import Cycles
from .metrics import Estimate
from .variants import Variant

Cell = str | float | Estimate
_OF_ORACLE = (
    "the oracle: tau over that of trees of the same depth and budget, grown by the target's own "
    "probabilities, on the answers that those were measured on"
)


@dataclass(frozen=True)
class Table:
    """A table that can be written in three ways.

    Args:
        name: of its files.
        caption: what its figures are.
        header: of its columns.
        rows: as wide as the header.
    """

    name: str
    caption: str
    header: tuple[str, ...]
    rows: list[tuple[Cell, ...]] = field(default_factory=list)

    def markdown(self) -> str:
        """Caption and table."""
        lines = [self.header, tuple("---" for _ in self.header)]
        lines += [tuple(_text(cell) for cell in row) for row in self.rows]
        return f"{self.caption}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def csv(self) -> str:
        """With three columns (value, low, high) for every column of estimates."""
        wide = [any(isinstance(row[i], Estimate) for row in self.rows) for i in self._columns]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        header = []
        for i in self._columns:
            name = self.header[i]
            header += [name, f"{name} low", f"{name} high"] if wide[i] else [name]
        writer.writerow(header)
        for row in self.rows:
            cells: list[object] = []
            for i in self._columns:
                cell = row[i]
                if isinstance(cell, Estimate):
                    cells += [cell.value, cell.low, cell.high]
                else:
                    cells += [cell, "", ""] if wide[i] else [cell]
            writer.writerow(cells)
        return out.getvalue()

    def json(self) -> list[dict[str, object]]:
        """One object a row; estimates as objects, what is not known as null."""
        return [dict(zip(self.header, map(_plain, row))) for row in self.rows]

    @property
    def _columns(self) -> range:
        return range(len(self.header))


def _text(cell: Cell) -> str:
    if isinstance(cell, Estimate):
        return "-" if math.isnan(cell.value) else str(cell)
    if isinstance(cell, float):
        return "-" if math.isnan(cell) else f"{cell:.2f}"
    return cell


def _plain(cell: Cell) -> object:
    if isinstance(cell, Estimate):
        return {"value": _plain(cell.value), "low": _plain(cell.low), "high": _plain(cell.high)}
    return None if isinstance(cell, float) and math.isnan(cell) else cell


@dataclass(frozen=True)
class Measured:
    """Measurements, and the order in which things are shown.

    Args:
        rows: of all variants.
        variants: in the order of the tables.
        benchmarks: likewise.
        temperatures: likewise.
        oracle: the variant that the others are held against, if there is one; of some of the
            records only, perhaps.
    """

    rows: Sequence[Cycles]
    variants: Sequence[Variant]
    benchmarks: Sequence[str]
    temperatures: Sequence[float]
    oracle: Variant | None = None

    @property
    def shown(self) -> list[Variant]:
        """The variants and, last, the oracle."""
        return [*self.variants, *([self.oracle] if self.oracle else [])]

    def of(self, variant: str, temperature: float, benchmark: str | None = None) -> list[Cycles]:
        """The rows of a variant, of one benchmark or all."""
        return [
            row
            for row in self.rows
            if row.variant == variant
            and row.temperature == temperature
            and benchmark in (None, row.benchmark)
        ]

    def grid(
        self, variant: str, temperature: float, figure: Callable[[Sequence[Cycles]], Cell]
    ) -> list[Cell]:
        """A figure for every benchmark; NaN where nothing was measured."""
        found = [self.of(variant, temperature, name) for name in self.benchmarks]
        return [figure(rows) if rows else float("nan") for rows in found]

    def shares(self, variant: str, temperature: float) -> list[Cell]:
        """Which share of the oracle's tau a variant has, of the same records, by benchmark."""
        cells: list[Cell] = []
        for name in self.benchmarks:
            highest = self.of(self.oracle.name, temperature, name) if self.oracle else []
            records = {row.record for row in highest}
            rows = [r for r in self.of(variant, temperature, name) if r.record in records]
            known = rows and highest
            cells.append(metrics.share(metrics.tau, rows, highest) if known else float("nan"))
        return cells


def acceptance_table(measured: Measured, temperature: float, live: bool) -> Table:
    """The paper's Table 1: tau by variant and benchmark, with speed-ups where runs were live."""
    caption = (
        f"Tokens per target pass (tau, micro mean, 95 % bootstrap interval over questions), "
        f"temperature {temperature:g}"
    )
    header = ["variant", *measured.benchmarks, "mean", "nodes a cycle"]
    if live:
        caption += "; speed-up: median over answers against plain generate in the same run"
        header += [f"speed-up {name}" for name in measured.benchmarks]
    elif measured.oracle:
        caption += f"; share of {_OF_ORACLE}, mean over benchmarks"
        header.append("share of the oracle")
    table = Table(f"acceptance-t{temperature:g}", caption + ".", tuple(header))
    for variant in measured.variants if live else measured.shown:
        rows = measured.of(variant.name, temperature)
        if not rows:
            continue
        cells = measured.grid(
            variant.name, temperature, lambda r: metrics.bootstrap(metrics.tau, r)
        )
        line = [variant.name, *cells, _mean_of(cells), metrics.nodes(rows)]
        if live:
            line += measured.grid(variant.name, temperature, metrics.speedup)
        elif measured.oracle:
            line.append(_mean_of(measured.shares(variant.name, temperature)))
        table.rows.append(tuple(line))
    return table


def _mean_of(cells: Sequence[Cell]) -> float:
    """Of those that are known; NaN if none is."""
    values = [cell.value for cell in cells if isinstance(cell, Estimate)]
    return sum(values) / len(values) if values else float("nan")


def share_table(measured: Measured, temperature: float) -> Table:
    """How much of what can be reached every variant reaches; no rows without an oracle."""
    table = Table(
        f"share-t{temperature:g}",
        f"Share of {_OF_ORACLE} (95 % paired bootstrap interval over questions), temperature "
        f"{temperature:g}.",
        ("variant", *measured.benchmarks),
    )
    for variant in measured.variants:
        cells = measured.shares(variant.name, temperature)
        if any(isinstance(cell, Estimate) for cell in cells):
            table.rows.append((variant.name, *cells))
    return table


def difference_table(measured: Measured, temperature: float, references: Sequence[str]) -> Table:
    """What composing brings over the drafters it composes, question by question.

    Args:
        measured: of variants on the same questions.
        temperature: of the target.
        references: names of the variants that the others are compared with.
    """
    table = Table(
        f"difference-t{temperature:g}",
        "Tokens per target pass more than a drafter alone (tau, micro mean, 95 % paired bootstrap "
        f"interval over questions), temperature {temperature:g}.",
        ("variant", "against", *measured.benchmarks),
    )
    for variant in measured.variants:
        for reference in references:
            if variant.name == reference:
                continue
            cells: list[Cell] = []
            for name in measured.benchmarks:
                rows = measured.of(variant.name, temperature, name)
                others = measured.of(reference, temperature, name)
                known = rows and others
                cells.append(
                    metrics.difference(metrics.tau, rows, others) if known else float("nan")
                )
            table.rows.append((variant.name, reference, *cells))
    return table


def routing_table(measured: Measured, temperature: float) -> Table:
    """The paper's Table 3: how often each drafter's tree was verified, where one is chosen."""
    table = Table(
        f"routing-t{temperature:g}",
        f"Share of cycles in which a drafter's tree was verified, temperature {temperature:g}.",
        ("variant", "drafter", *measured.benchmarks),
    )
    for variant in measured.variants:
        rows = measured.of(variant.name, temperature)
        chose = len({tuple(chosen) for row in rows for chosen in row.chosen if chosen}) > 1
        if len(variant.drafters) < 2 or not chose:
            continue
        shares = [
            metrics.routing(measured.of(variant.name, temperature, name), variant.drafters)
            for name in measured.benchmarks
        ]
        for drafter in variant.drafters:
            table.rows.append((variant.name, drafter, *(share[drafter] for share in shares)))
    return table


def entropy_table(measured: Measured, temperature: float) -> Table:
    """The paper's Tables 7 and 8: entropies where tokens were accepted and where rejected."""
    table = Table(
        f"entropy-t{temperature:g}",
        "Mean entropy in nats of the draft and of the target's distribution, where draft tokens "
        f"were accepted and where they were rejected, temperature {temperature:g}.",
        (
            "variant",
            "benchmark",
            "draft, accepted",
            "draft, rejected",
            "target, accepted",
            "target, rejected",
        ),
    )
    for variant in measured.shown:
        for name in measured.benchmarks:
            rows = measured.of(variant.name, temperature, name)
            if rows:
                table.rows.append((variant.name, name, *metrics.entropies(rows).values()))
    return table


def depth_table(measured: Measured, temperature: float) -> Table:
    """The paper's Tables 9 to 11: acceptance by depth."""
    found: dict[tuple[str, str], Mapping[int, float]] = {}
    for variant in measured.shown:
        for name in measured.benchmarks:
            rows = measured.of(variant.name, temperature, name)
            if rows:
                found[variant.name, name] = metrics.acceptance_by_depth(rows)
    deepest = max((max(rates, default=1) for rates in found.values()), default=1)
    table = Table(
        f"depth-t{temperature:g}",
        "Of the cycles that went on at depth d - 1, the share that accepted a token at depth d, "
        f"temperature {temperature:g}.",
        ("variant", "benchmark", *(f"d = {d}" for d in range(1, deepest + 1))),
    )
    for names, rates in found.items():
        shares = (rates.get(d, float("nan")) for d in range(1, deepest + 1))
        table.rows.append((*names, *shares))
    return table


def overlap_table(measured: Measured, temperature: float) -> Table:
    """How alike the drafters' trees are."""
    table = Table(
        f"overlap-t{temperature:g}",
        "Mean share of the paths in the verified tree that all drafters proposed (Jaccard), "
        f"temperature {temperature:g}.",
        ("variant", *measured.benchmarks),
    )
    for variant in measured.variants:
        cells = measured.grid(variant.name, temperature, metrics.overlap)
        if not all(isinstance(cell, float) and math.isnan(cell) for cell in cells):
            table.rows.append((variant.name, *cells))
    return table


def scaling_table(results: Mapping[str, Mapping[str, Sequence[Mapping[str, object]]]]) -> Table:
    """The paper's Table 2: the mean over benchmarks, for several targets.

    Args:
        results: by target, the tables of a `results.json`.
    """
    names = sorted({name for tables in results.values() for name in tables if "acceptance" in name})
    table = Table(
        "scaling",
        "Tokens per target pass, mean over benchmarks, by target.",
        ("temperature", "variant", *results),
    )
    for name in names:
        means = {
            target: {row["variant"]: row["mean"] for row in tables.get(name, ())}
            for target, tables in results.items()
        }
        for variant in dict.fromkeys(v for found in means.values() for v in found):
            cells = [found.get(variant, float("nan")) for found in means.values()]
            table.rows.append((name.rpartition("-t")[2], variant, *cells))
    return table
