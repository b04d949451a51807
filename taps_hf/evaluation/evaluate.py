"""One evaluation: records, replay, live runs, and a folder with everything that came of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import set_threads
from ..drafters.averaging import average_drafters
from ..drafters.base import Drafter
from ..drafters.ensemble import layers_read
from ..drafters.lookup import PromptLookup
from ..files import check_begun, hold
from ..loading import check_frozen_target, load_drafter, load_target
from ..strategies import Single
from ..trees.shapes import DynamicTree
from . import figures, tables
from .benchmarks import Question, read_benchmark
from .live import run_live
from .measurements import Measurements
from .options import LOOKUP, ORACLE, EvaluateOptions
from .oracle import Oracle
from .records import Record, RecordStore, record
from .replay import replay
from .report import other_results, write_report
from .settings import check_settings, measured_with
from .variants import Variant, oracle_variant, standard_variants

_SIDE_BY_SIDE = 32  # answers that are replayed together


def evaluate(options: EvaluateOptions) -> None:
    """Measure what has not been measured yet, then write tables and figures.

    Everything lies in `options.out`: `settings.json`, `replay.jsonl` and `live.jsonl` (one line an
    answer and variant), `results.json`, `tables/`, `figures/`, `summary.md`.

    Raises:
        ValueError: before any measurement, for benchmarks, drafters or names that cannot be used,
            and if `out` was measured with other settings or holds other things.
    """
    records = _check_folders(options)
    set_threads(options.threads)
    torch.set_flush_denormal(True)
    questions: list[Question] = []
    for spec in options.benchmarks:
        questions += read_benchmark(spec, options.limit, options.seed)
    others = other_results(options.others)
    figures.check_installed()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    target, tokenizer = load_target(options.target, dtype, device, options.chat_template)
    check_frozen_target(target)
    drafters = {
        name: load_drafter(path, target, tokenizer, name=name, dtype=target.dtype)
        for name, path in options.drafters.items()
    }
    if options.lookup:
        drafters[LOOKUP] = PromptLookup()
    variants, averages = _variants(options, drafters)
    weights = {name: drafter.digest() for name, drafter in drafters.items()}
    with hold(options.out / "lock"):
        check_settings(options, weights, str(target.device))
        store = RecordStore(records, _recorded_with(options, target, tokenizer))
        run = _Run(options, target, drafters, variants, weights)
        layers = layers_read(drafters.values())
        for temperature in options.temperatures:
            settled = options.record_options(temperature)
            files = record(target, tokenizer, questions, settled, store, layers)
            answers = _Answers(files, store)
            run.replay(answers)
            if options.oracle:
                run.oracle(answers, temperature)
            if options.live:
                run.live(answers.some(options.benchmark_names, options.live), temperature)
        measured, lively = run.measured(run.replayed), run.measured(run.lively)
        write_report(options, averages, measured, lively, others)


def _check_folders(options: EvaluateOptions) -> Path:
    """The folder of the records; raises as [`evaluate`] says of `out`."""
    records = options.records or options.out / "records"
    if records.resolve() == options.out.resolve():
        raise ValueError(f"`records` and `out` are both {records}; expected different folders.")
    measured_with(options.out)
    for folder in (options.out, records):
        check_begun(folder, "settings.json")
    return records


def _recorded_with(
    options: EvaluateOptions, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, object]:
    """What all records have in common."""
    return {
        "target": target.config.name_or_path,
        "dtype": options.dtype,
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.record_batch,
        "features": options.record_features,
        "seed": options.seed,
        "chat_template": tokenizer.get_chat_template(),
    }


class _Run:
    """What is measured of the records of one evaluation: what its files do not hold yet."""

    def __init__(
        self,
        options: EvaluateOptions,
        target: PreTrainedModel,
        drafters: Mapping[str, Drafter],
        variants: Sequence[Variant],
        weights: Mapping[str, str],
    ) -> None:
        self.options, self.target, self.drafters = options, target, drafters
        self.variants, self.weights = variants, weights
        # By name and key, as the same weights may be asked for under two names.
        self.known_as = {(variant.name, variant.key(weights)) for variant in variants}
        self.oracles: set[tuple[str, str]] = set()  # the oracle at each temperature
        self.replayed = Measurements(options.out / "replay.jsonl")
        self.lively = Measurements(options.out / "live.jsonl")
        self.asked: set[str] = set()  # the files may hold more, of other questions

    def replay(self, answers: _Answers) -> None:
        """All variants along all records."""
        self.asked |= set(answers.keys)
        self._replay(answers, _SIDE_BY_SIDE, "replay", self.drafters, self.variants, self.weights)

    def oracle(self, answers: _Answers, temperature: float) -> None:
        """The ceiling along some records at a temperature, one by one: each takes a cache."""
        if self.options.oracle_answers is not None:
            answers = answers.some(self.options.benchmark_names, self.options.oracle_answers)
        drafter = Oracle(temperature)
        weights = {ORACLE: drafter.digest()}
        variant = oracle_variant(ORACLE, DynamicTree(*self.options.tree))
        self.oracles.add((variant.name, variant.key(weights)))
        self._replay(answers, 1, "oracle", {ORACLE: drafter}, [variant], weights)

    def _replay(
        self,
        answers: _Answers,
        side_by_side: int,
        said: str,
        drafters: Mapping[str, Drafter],
        variants: Sequence[Variant],
        weights: Mapping[str, str],
    ) -> None:
        with tqdm(total=len(answers), unit="answer", desc=said) as progress:
            for group in answers.groups(side_by_side):
                pending = []
                for variant in variants:
                    known_as = variant.name, variant.key(weights)
                    if not all(self.replayed.get(kept.key, *known_as) for kept in group):
                        pending.append(variant)
                if not pending:
                    progress.update(len(group))
                    continue
                for rows in replay(group, self.target, drafters, pending, weights):
                    self.replayed.add(rows)
                    progress.update()

    def live(self, answers: _Answers, temperature: float) -> None:
        """All variants, generating the records' answers anew."""
        settled = self.options.record_options(temperature)
        models = (self.target, self.drafters, self.variants, self.weights)
        warm = False
        with tqdm(answers, unit="answer", desc="live") as progress:
            for number, kept in enumerate(progress):
                if all(self.lively.get(kept.key, *known_as) for known_as in self.known_as):
                    continue
                if not warm:  # first runs cost more than later ones
                    run_live(kept, *models, replace(settled, max_new_tokens=4))
                    warm = True
                self.lively.add(run_live(kept, *models, settled, number))

    def measured(self, measurements: Measurements) -> tables.Measured:
        """What was measured of this run's records and variants, now or earlier."""
        known_as = self.known_as | self.oracles
        rows = [
            row
            for row in measurements
            if row.record in self.asked and (row.variant, row.variant_key) in known_as
        ]
        names, temperatures = self.options.benchmark_names, self.options.temperatures
        top = oracle_variant(ORACLE, DynamicTree(*self.options.tree)) if self.oracles else None
        return tables.Measured(rows, self.variants, names, temperatures, top)


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


def _variants(
    options: EvaluateOptions, drafters: dict[str, Drafter]
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
    lookup = LOOKUP if options.lookup else None
    variants = standard_variants(list(options.drafters), options.compose, tree, lookup)
    place = len(options.drafters)
    variants[place:place] = [Variant(name, (name,), Single(0), tree) for name in averages]
    return variants, averages
