"""What comes of an evaluation: tables, figures, a summary; and what came of others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import write_text
from . import figures, tables
from .options import EvaluateOptions


def other_results(folders: Sequence[Path]) -> dict[str, dict[str, list]]:
    """The tables of other targets' results, by target.

    Raises:
        ValueError: for a folder that is none of results, or two of one target.
    """
    found: dict[str, dict[str, list]] = {}
    for folder in folders:
        try:
            name = json.loads((folder / "settings.json").read_text())["measured"]["target"]
            tables_of = json.loads((folder / "results.json").read_text())
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{folder} is no folder of results: {error!r}.") from None
        if name in found:
            raise ValueError(f"{folder} has results of {name}, as another one; expected one each.")
        found[name] = tables_of
    return found


def write_report(
    options: EvaluateOptions,
    averages: Mapping[str, float],
    measured: tables.Measured,
    lively: tables.Measured,
    others: Mapping[str, Mapping[str, list]],
) -> None:
    """Write tables, figures, `results.json` and `summary.md` into `options.out`.

    Args:
        options: of the evaluation.
        averages: lambda of each variant that is an average, by name.
        measured: by replay.
        lively: of live runs.
        others: tables of other targets' results, by target.
    """
    made = _tables(options, measured, lively)
    results = {table.name: table.json() for table in made}
    if others:
        made.append(tables.scaling_table({options.target: results, **others}))
        results[made[-1].name] = made[-1].json()
    made = [table for table in made if table.rows]
    for table in made:
        write_text(options.out / "tables" / f"{table.name}.md", table.markdown())
        write_text(options.out / "tables" / f"{table.name}.csv", table.csv())
    write_text(options.out / "results.json", json.dumps(results, indent=1) + "\n")
    drawn = _figures(options, averages, measured)
    text = [f"# Results for {options.target}\n"]
    text += [table.markdown() for table in made if "acceptance" in table.name]
    text += [f"![{file.stem}](figures/{file.name})\n" for file in drawn]
    text += [table.markdown() for table in made if "acceptance" not in table.name]
    write_text(options.out / "summary.md", "\n".join(text))
    print(f"wrote {options.out / 'summary.md'}")


def _tables(
    options: EvaluateOptions, measured: tables.Measured, lively: tables.Measured
) -> list[tables.Table]:
    """All tables, also those without rows."""
    made: list[tables.Table] = []
    for temperature in options.temperatures:
        made.append(tables.acceptance_table(measured, temperature, live=False))
        if options.live:
            table = tables.acceptance_table(lively, temperature, live=True)
            made.append(tables.Table(f"live-{table.name}", table.caption, table.header, table.rows))
        made.append(tables.share_table(measured, temperature))
        made.append(tables.difference_table(measured, temperature, list(options.drafters)))
        for build in (
            tables.routing_table,
            tables.entropy_table,
            tables.depth_table,
            tables.overlap_table,
        ):
            made.append(build(measured, temperature))
    return made


def _figures(
    options: EvaluateOptions, averages: Mapping[str, float], measured: tables.Measured
) -> list[Path]:
    """Draw everything; the files."""
    folder = options.out / "figures"
    drawn = [figures.summary_figure(measured, folder / "summary.png")]
    few = [v.name for v in measured.variants if averages.get(v.name, 0.5) == 0.5]
    # What shows best: not the diagnostics, nor what accepts the same tokens as another.
    few = [x for x in few if x not in ("entropy", "concatenated") and not x.endswith("-per-prompt")]
    for t in options.temperatures:
        drawn.append(figures.heatmap_figure(measured, t, folder / f"heatmap-t{t:g}.png"))
        drawn.append(figures.depth_figure(measured, t, few, folder / f"depth-t{t:g}.png"))
        drawn.append(figures.entropy_figure(measured, t, few, folder / f"entropy-t{t:g}.png"))
        if len(averages) > 1:
            drawn.append(figures.sweep_figure(measured, t, averages, folder / f"lambda-t{t:g}.png"))
    return drawn
