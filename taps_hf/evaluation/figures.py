"""Figures of the paper, for the drafters that were measured; matplotlib's own colours and files."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import whole
from . import metrics
from .metrics import Estimate
from .tables import Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0  # inches: at 110 dots an inch as wide as a README is shown
DPI = 110


def check_installed() -> None:
    """Raise `ValueError` if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("Figures need matplotlib, expected `pip install taps-hf[eval]`.")


def _panels(count: int, height: float = 3.4) -> tuple[Figure, Sequence[Axes]]:
    """A row of panels that share their y axis, two in a row."""
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    columns = min(count, 2)
    rows = math.ceil(count / columns)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(WIDTH, height * rows),
        sharey=True,
        squeeze=False,
        dpi=DPI,
        layout="constrained",
    )
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.axis("off")
    return figure, flat[:count]


def _save(figure: Figure, file: Path) -> Path:
    from matplotlib import pyplot

    with whole(file) as temporary:
        figure.savefig(temporary)
    pyplot.close(figure)
    return file


def _legend_above(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)


def summary_figure(measured: Measured, file: Path) -> Path:
    """Tau by benchmark and variant, with intervals: one panel a temperature (Figure 9)."""
    figure, panels = _panels(len(measured.temperatures), height=0.32 * len(measured.variants) + 2)
    names = [variant.name for variant in measured.variants]
    height = 0.8 / len(measured.benchmarks)
    for axes, temperature in zip(panels, measured.temperatures):
        for k, benchmark in enumerate(measured.benchmarks):
            places, values, errors = [], [], [[], []]
            for i, name in enumerate(names):
                rows = measured.of(name, temperature, benchmark)
                if not rows:
                    continue
                found = metrics.bootstrap(metrics.tau, rows)
                places.append(i + (k + 0.5) * height - 0.4)
                values.append(found.value)
                errors[0].append(found.value - found.low)
                errors[1].append(found.high - found.value)
            axes.barh(
                places, values, height, xerr=errors, label=benchmark, error_kw={"linewidth": 0.8}
            )
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("tokens per target pass")
        axes.set_title(f"temperature {temperature:g}", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    _legend_above(figure, panels[0])
    return _save(figure, file)


def heatmap_figure(measured: Measured, temperature: float, file: Path) -> Path:
    """Tau of every variant on every benchmark, as colour and number (Figure 10)."""
    figure, (axes,) = _panels(1, height=0.36 * len(measured.variants) + 1.2)
    names = [variant.name for variant in measured.variants]
    values = [measured.grid(name, temperature, metrics.tau) for name in names]
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    known = [x for line in values for x in line if not math.isnan(x)]
    middle = (min(known) + max(known)) / 2
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            text = "-" if math.isnan(value) else f"{value:.2f}"
            colour = "white" if value < middle else "black"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(measured.benchmarks)), measured.benchmarks)
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"tokens per target pass, temperature {temperature:g}", fontsize=10)
    figure.colorbar(image, ax=axes)
    return _save(figure, file)


def depth_figure(
    measured: Measured, temperature: float, variants: Sequence[str], file: Path
) -> Path:
    """Acceptance by depth, one panel a benchmark (Figure 8); from 20 cycles on."""
    figure, panels = _panels(len(measured.benchmarks))
    for axes, benchmark in zip(panels, measured.benchmarks):
        deepest = 1
        for name in variants:
            rows = measured.of(name, temperature, benchmark)
            rates = metrics.acceptance_by_depth(rows, least=20)
            axes.plot(list(rates), list(rates.values()), marker="o", markersize=4, label=name)
            deepest = max([deepest, *rates])
        axes.set_title(benchmark, fontsize=10)
        axes.set_xticks(range(1, deepest + 1))
        axes.set_xlabel("depth")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share accepted")
    _legend_above(figure, panels[0])
    return _save(figure, file)


def entropy_figure(
    measured: Measured, temperature: float, variants: Sequence[str], file: Path
) -> Path:
    """Entropies where tokens were accepted and rejected: drafters' and target's (Figure 7)."""
    figure, panels = _panels(2)
    pairs = [
        ("draft entropy", "accepted_entropy", "rejected_entropy"),
        ("target entropy", "accepted_target_entropy", "rejected_target_entropy"),
    ]
    found = [metrics.entropies(measured.of(name, temperature)) for name in variants]
    for axes, (title, accepted, rejected) in zip(panels, pairs):
        for shift, column, label in [(-0.2, accepted, "accepted"), (0.2, rejected, "rejected")]:
            places = [i + shift for i in range(len(variants))]
            axes.bar(places, [values[column] for values in found], 0.4, label=label)
        axes.set_xticks(range(len(variants)), variants, rotation=35, ha="right", fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("nats")
    panels[0].legend(fontsize=8)
    return _save(figure, file)


def sweep_figure(
    measured: Measured, temperature: float, averages: Mapping[str, float], file: Path
) -> Path:
    """Tau of averaged drafters over lambda, one line a benchmark (Figure 6).

    Args:
        averages: the lambda of each averaged variant.
    """
    figure, (axes,) = _panels(1)
    ordered = sorted(averages, key=averages.get)
    for benchmark in measured.benchmarks:
        found: list[tuple[float, Estimate]] = []
        for name in ordered:
            rows = measured.of(name, temperature, benchmark)
            if rows:
                found.append((averages[name], metrics.bootstrap(metrics.tau, rows)))
        places = [place for place, _ in found]
        (line,) = axes.plot(places, [e.value for _, e in found], marker="o", label=benchmark)
        low, high = [e.low for _, e in found], [e.high for _, e in found]
        axes.fill_between(places, low, high, alpha=0.15, color=line.get_color())
    axes.set_xlabel("lambda: weight of the first drafter")
    axes.set_ylabel("tokens per target pass")
    axes.set_title(f"averaged weights, temperature {temperature:g}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, file)
