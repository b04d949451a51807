"""One evaluation: records, replay, live runs, and a folder with everything that came of them."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import (
    COUNT,
    FINITE,
    NOT_NEGATIVE,
    SEED,
    THREADS,
    check_device,
    check_numbers,
    loading,
    set_threads,
)
from ..drafters.averaging import average_drafters
from ..drafters.modeling_eagle import EagleDrafter
from ..files import check_begun, hold, read_json, write_json, write_text
from ..loading import check_target, load_target
from ..strategies import Single
from ..trees.shapes import DynamicTree
from ..validation import check_drafter, check_tokenizer
from ..version import __version__
from . import figures, tables
from .benchmarks import Question, read_benchmark
from .live import run_live
from .measurements import Measurements
from .records import Record, RecordOptions, RecordStore, record
from .replay import replay
from .variants import Variant, standard_variants

_SIDE_BY_SIDE = 32  # answers that are replayed together
_RANGES = {
    "lambdas": FINITE,
    "limit": COUNT,
    "temperatures": NOT_NEGATIVE,
    "max_new_tokens": COUNT,
    "live": NOT_NEGATIVE,
    "record_batch": COUNT,
    "threads": THREADS,
    "seed": SEED,
}


@dataclass(frozen=True)
class EvaluateOptions:
    """What is measured.

    Args:
        target: folder, Hub name or `embedded`.
        drafters: paths by name.
        compose: names of the drafters that routing and merging compose.
        average: names of two drafters whose weights are averaged.
        lambdas: weights of the first of them.
        benchmarks: NAME=FILE, or names of Hub benchmarks.
        limit: questions of each benchmark; None for all.
        temperatures: each is recorded and replayed apart.
        max_new_tokens: longest answer.
        tree: depth, top_k, num_nodes of every drafter's tree.
        live: answers of each benchmark that are also run live, at every temperature.
        out: folder to write.
        records: folder of the records; they are large and belong in no repository.
        record_batch: answers recorded together; 1 for seeded plain `generate`.
        record_features: dtype that recorded features are kept in.
        dtype: of target and drafters.
        device: cpu or cuda; by default cuda where there is one.
        threads: CPU threads; torch's by default.
        seed: of samples of questions and of sampled answers.
        chat_template: file with the template to use instead of the tokenizer's.
        others: folders of other targets' results, for the table of target scaling.
    """

    target: str
    drafters: Mapping[str, str]
    benchmarks: Sequence[str]
    out: Path
    compose: Sequence[str] = ()
    average: Sequence[str] = ()
    lambdas: Sequence[float] = (0.5,)
    limit: int | None = None
    temperatures: Sequence[float] = (0.0,)
    max_new_tokens: int = 256
    tree: tuple[int, int, int] = (5, 8, 24)
    live: int = 0
    records: Path | None = None
    record_batch: int = 1
    record_features: str = "float32"
    dtype: str = "float32"
    device: str | None = None
    threads: int | None = None
    seed: int = 0
    chat_template: str | None = None
    others: Sequence[Path] = ()

    def __post_init__(self) -> None:
        for name, names in [("compose", self.compose), ("average", self.average)]:
            unknown = [x for x in names if x not in self.drafters]
            if unknown:
                raise ValueError(
                    f"`{name}` names {unknown}, expected some of {list(self.drafters)}."
                )
        if self.average and len(self.average) != 2:
            raise ValueError(f"`average` has {len(self.average)} names, expected two.")
        if not self.drafters or not self.benchmarks or not self.temperatures:
            raise ValueError("Expected at least one drafter, one benchmark and one temperature.")
        for name in ("dtype", "record_features"):
            if getattr(self, name) not in ("float32", "bfloat16", "float16"):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, expected float32, bfloat16 or float16."
                )
        check_numbers(self, _RANGES)
        DynamicTree(*self.tree)  # refuses what is no tree
        if self.device is not None:
            check_device(self.device)

    def record_options(self, temperature: float) -> RecordOptions:
        """How the target answers at a temperature."""
        return RecordOptions(
            temperature,
            self.max_new_tokens,
            self.record_batch,
            self.seed,
            getattr(torch, self.record_features),
        )


def evaluate(options: EvaluateOptions) -> None:
    """Measure what has not been measured yet, then write tables and figures.

    Everything lies in `options.out`: `settings.json`, `replay.jsonl` and `live.jsonl` (one line an
    answer and variant), `results.json`, `tables/`, `figures/`, `summary.md`.

    Raises:
        ValueError: before any measurement, for benchmarks, drafters or names that cannot be used,
            and if `out` was measured with other settings or holds other things.
    """
    records = options.records or options.out / "records"
    if records.resolve() == options.out.resolve():
        raise ValueError(f"`records` and `out` are both {records}; expected different folders.")
    _measured_with(options.out)
    for folder in (options.out, records):
        check_begun(folder, "settings.json")
    set_threads(options.threads)
    torch.set_flush_denormal(True)
    questions: list[Question] = []
    names = [spec.partition("=")[0] for spec in options.benchmarks]
    if len(set(names)) < len(names) or any("/" in name for name in names):
        raise ValueError(f"The benchmarks are named {names}; expected distinct names without /.")
    for spec in options.benchmarks:
        questions += read_benchmark(spec, options.limit, options.seed)
    others = _other_results(options.others)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    target, tokenizer = load_target(options.target, dtype, device, options.chat_template)
    drafters = _drafters(options, target, tokenizer)
    variants, averages = _variants(options, drafters)
    weights = {name: _digest(drafter) for name, drafter in drafters.items()}
    figures.check_installed()
    _check_settings(options, weights, str(target.device))
    settings = {
        "target": target.config.name_or_path,
        "dtype": options.dtype,
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.record_batch,
        "features": options.record_features,
        "seed": options.seed,
        "chat_template": tokenizer.get_chat_template(),
    }
    with hold(options.out / "lock"):
        store = RecordStore(records, settings)
        run = _Run(options, target, drafters, variants, weights)
        for temperature in options.temperatures:
            files = record(target, tokenizer, questions, options.record_options(temperature), store)
            answers = _Answers(files, store)
            run.replay(answers)
            if options.live:
                run.live(answers.some(names, options.live), temperature)
        _report(options, averages, run.measured(run.replayed), run.measured(run.lively), others)


class _Run:
    """What is measured of the records of one evaluation: what its files do not hold yet."""

    def __init__(
        self,
        options: EvaluateOptions,
        target: PreTrainedModel,
        drafters: Mapping[str, EagleDrafter],
        variants: Sequence[Variant],
        weights: Mapping[str, str],
    ) -> None:
        self.options, self.target, self.drafters = options, target, drafters
        self.variants, self.weights = variants, weights
        self.keys = {variant.key(weights) for variant in variants}
        self.replayed = Measurements(options.out / "replay.jsonl")
        self.lively = Measurements(options.out / "live.jsonl")
        self.asked: set[str] = set()  # the files may hold more, of other questions

    def replay(self, answers: _Answers) -> None:
        """All variants along all records."""
        self.asked |= set(answers.keys)
        with tqdm(total=len(answers), unit="answer", desc="replay") as progress:
            for group in answers.groups(_SIDE_BY_SIDE):
                known = {
                    key
                    for key in self.keys
                    if all(self.replayed.get(kept.key, key) for kept in group)
                }
                pending = [v for v in self.variants if v.key(self.weights) not in known]
                if not pending:
                    progress.update(len(group))
                    continue
                for rows in replay(group, self.target, self.drafters, pending, self.weights):
                    self.replayed.add(rows)
                    progress.update()

    def live(self, answers: _Answers, temperature: float) -> None:
        """All variants, generating the records' answers anew."""
        settled = self.options.record_options(temperature)
        models = (self.target, self.drafters, self.variants, self.weights)
        warm = False
        with tqdm(answers, unit="answer", desc="live") as progress:
            for number, kept in enumerate(progress):
                if all(self.lively.get(kept.key, key) for key in self.keys):
                    continue
                if not warm:  # first runs cost more than later ones
                    run_live(kept, *models, replace(settled, max_new_tokens=4))
                    warm = True
                self.lively.add(run_live(kept, *models, settled, number))

    def measured(self, measurements: Measurements) -> tables.Measured:
        """What was measured of this run's records and variants, now or earlier."""
        rows = [r for r in measurements if r.record in self.asked and r.variant_key in self.keys]
        names = [spec.partition("=")[0] for spec in self.options.benchmarks]
        return tables.Measured(rows, self.variants, names, self.options.temperatures)


class _Answers:
    """The records of a run, read one at a time."""

    def __init__(self, files: Sequence[Path], store: RecordStore) -> None:
        self.files, self.store = list(files), store
        found = [store.load(file) for file in self.files]
        self.keys = [kept.key for kept in found]
        self.benchmarks = [kept.benchmark for kept in found]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Record]:
        return map(self.store.load, self.files)

    def groups(self, size: int) -> Iterator[list[Record]]:
        """So many at a time."""
        for start in range(0, len(self.files), size):
            yield [self.store.load(file) for file in self.files[start : start + size]]

    def some(self, benchmarks: Sequence[str], count: int) -> _Answers:
        """`count` of each benchmark's, evenly spread."""
        chosen = []
        for name in benchmarks:
            found = [f for f, b in zip(self.files, self.benchmarks) if b == name]
            few = min(count, len(found))
            chosen += [found[i * len(found) // few] for i in range(few)]
        return _Answers(chosen, self.store)


def _other_results(folders: Sequence[Path]) -> dict[str, dict[str, list]]:
    """The tables of other targets' results, by target."""
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


def _drafters(
    options: EvaluateOptions, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, EagleDrafter]:
    check_target(target)
    found = {}
    for name, path in options.drafters.items():
        with loading(f"Drafter {name!r} ({path})"):
            drafter = EagleDrafter.from_pretrained(path, dtype=target.dtype)
        found[name] = drafter.to(target.device).eval()
    for name, drafter in found.items():
        check_drafter(name, drafter, target)
    check_tokenizer(found, tokenizer)
    return found


def _variants(
    options: EvaluateOptions, drafters: dict[str, EagleDrafter]
) -> tuple[list[Variant], dict[str, float]]:
    """All variants, and the lambda of those that are averages (which join the drafters)."""
    tree = DynamicTree(*options.tree)
    averages: dict[str, float] = {}
    if options.average:
        pair = [drafters[name] for name in options.average]
        for weight in options.lambdas:
            name = f"averaged {weight:g}"
            averages[name] = weight
            drafters[name] = average_drafters(pair, [weight, 1 - weight]).eval()
    variants = standard_variants(list(options.drafters), options.compose, tree)
    place = len(options.drafters)
    variants[place:place] = [Variant(name, (name,), Single(0), tree) for name in averages]
    return variants, averages


def _check_settings(options: EvaluateOptions, weights: Mapping[str, str], device: str) -> None:
    """Write what the figures belong to; refuse a folder that holds figures of something else."""
    digests = {name: weights[name] for name in options.drafters}
    settings = {
        "target": options.target,
        "drafters": {
            name: {"path": str(path), "weights": digests[name]}
            for name, path in options.drafters.items()
        },
        "tree": list(options.tree),
        "max_new_tokens": options.max_new_tokens,
        "record_batch": options.record_batch,
        "record_features": options.record_features,
        "dtype": options.dtype,
        "seed": options.seed,
    }
    found = _measured_with(options.out)
    if found is not None:
        # Drafters may be added; those that are there must be what they were.
        known = {**found.pop("drafters")}
        then = {**found, **{name: known[name]["weights"] for name in known if name in digests}}
        now = {**settings, **digests}
        changed = {name: (then[name], now[name]) for name in then if then[name] != now[name]}
        if changed:
            raise ValueError(
                f"{options.out} was measured with other settings, (then, now): {changed}; expected "
                "the same, or another `out`."
            )
        settings["drafters"] = {**known, **settings["drafters"]}
    provenance = {
        "machine": platform.processor() or platform.machine(),
        "device": device,
        "threads": torch.get_num_threads(),
        "taps_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    write_json(options.out / "settings.json", {"measured": settings, "provenance": provenance})


def _measured_with(folder: Path) -> dict[str, Any] | None:
    """The settings that the figures in a folder belong to, if there are any."""
    file = folder / "settings.json"
    if not file.is_file():
        return None
    found = read_json(file, "the settings of an evaluation").get("measured")
    if not isinstance(found, dict) or "drafters" not in found:
        raise ValueError(f"{file} is not of an evaluation; expected another `out`.")
    return found


def _digest(drafter: EagleDrafter) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(drafter.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _report(
    options: EvaluateOptions,
    averages: Mapping[str, float],
    measured: tables.Measured,
    lively: tables.Measured,
    others: Mapping[str, Mapping[str, list]],
) -> None:
    variants = measured.variants
    made: list[tables.Table] = []
    for temperature in options.temperatures:
        made.append(tables.acceptance_table(measured, temperature, live=False))
        if options.live:
            table = tables.acceptance_table(lively, temperature, live=True)
            made.append(tables.Table(f"live-{table.name}", table.caption, table.header, table.rows))
        made.append(tables.difference_table(measured, temperature, list(options.drafters)))
        for build in (
            tables.routing_table,
            tables.entropy_table,
            tables.depth_table,
            tables.overlap_table,
        ):
            made.append(build(measured, temperature))
    results = {table.name: table.json() for table in made}
    if others:
        made.append(tables.scaling_table({options.target: results, **others}))
        results[made[-1].name] = made[-1].json()
    made = [table for table in made if table.rows]
    for table in made:
        write_text(options.out / "tables" / f"{table.name}.md", table.markdown())
        write_text(options.out / "tables" / f"{table.name}.csv", table.csv())
    write_text(options.out / "results.json", json.dumps(results, indent=1) + "\n")

    drawn = [figures.summary_figure(measured, options.out / "figures" / "summary.png")]
    few = [v.name for v in variants if v.name not in averages or averages[v.name] == 0.5]
    # What shows best: not the diagnostics, nor what accepts the same tokens as another.
    few = [x for x in few if x not in ("entropy", "concatenated") and not x.endswith("-per-prompt")]
    for t in options.temperatures:
        folder = options.out / "figures"
        drawn.append(figures.heatmap_figure(measured, t, folder / f"heatmap-t{t:g}.png"))
        drawn.append(figures.depth_figure(measured, t, few, folder / f"depth-t{t:g}.png"))
        drawn.append(figures.entropy_figure(measured, t, few, folder / f"entropy-t{t:g}.png"))
        if len(averages) > 1:
            drawn.append(figures.sweep_figure(measured, t, averages, folder / f"lambda-t{t:g}.png"))
    text = [f"# Results for {options.target}\n"]
    text += [table.markdown() for table in made if "acceptance" in table.name]
    text += [f"![{file.stem}](figures/{file.name})\n" for file in drawn]
    text += [table.markdown() for table in made if "acceptance" not in table.name]
    write_text(options.out / "summary.md", "\n".join(text))
    print(f"wrote {options.out / 'summary.md'}")
