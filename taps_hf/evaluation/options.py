"""What can be asked of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checks import COUNT, FINITE, NOT_NEGATIVE, SEED, THREADS, check_device, check_numbers
from ..loading import EMBEDDED
from ..trees.shapes import DynamicTree
from .records import RecordOptions

LOOKUP = "lookup"
"""The name of the drafter that looks up, in what is measured."""
ORACLE = "oracle"
"""The name of the target as its own drafter, likewise."""
_RANGES = {
    "lambdas": FINITE,
    "limit": COUNT,
    "temperatures": NOT_NEGATIVE,
    "max_new_tokens": COUNT,
    "live": NOT_NEGATIVE,
    "oracle_answers": COUNT,
    "record_batch": COUNT,
    "threads": THREADS,
    "seed": SEED,
}


@dataclass(frozen=True)
class EvaluateOptions:
    """What is measured.

    Args:
        drafters: paths by name.
        benchmarks: NAME=FILE, or names of Hub benchmarks.
        out: folder to write.
        target: folder, Hub name or `embedded`.
        compose: names of the drafters that routing and merging compose.
        average: names of two drafters whose weights are averaged.
        lookup: whether a drafter that looks up is measured as well, alone and merged with those in
            `compose`.
        oracle: whether trees grown by the target's own probabilities are measured as well: the
            ceiling ([`oracle`]).
        oracle_answers: of each benchmark, evenly spread, at every temperature; None for all.
        lambdas: weights of the first of them.
        limit: questions of each benchmark; None for all.
        temperatures: each is recorded and replayed apart.
        max_new_tokens: longest answer.
        tree: depth, top_k, num_nodes of every drafter's tree.
        live: answers of each benchmark that are also run live, at every temperature.
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

    drafters: Mapping[str, str]
    benchmarks: Sequence[str]
    out: Path
    target: str = EMBEDDED
    compose: Sequence[str] = ()
    average: Sequence[str] = ()
    lookup: bool = False
    oracle: bool = False
    oracle_answers: int | None = None
    lambdas: Sequence[float] = (0.5,)
    limit: int | None = None
    temperatures: Sequence[float] = (0.0,)
    max_new_tokens: int = RecordOptions.max_new_tokens
    tree: tuple[int, int, int] = (5, 8, 24)
    live: int = 0
    records: Path | None = None
    record_batch: int = RecordOptions.batch_size
    record_features: str = "float32"
    dtype: str = "float32"
    device: str | None = None
    threads: int | None = None
    seed: int = RecordOptions.seed
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
        for name in (LOOKUP, ORACLE):
            if getattr(self, name) and name in self.drafters:
                raise ValueError(
                    f"A drafter is named {name!r} and `{name}` is asked for; expected other names."
                )
        if self.oracle_answers is not None and not self.oracle:
            raise ValueError("`oracle_answers` is given without `oracle`, expected both.")
        if not self.drafters or not self.benchmarks or not self.temperatures:
            raise ValueError("Expected at least one drafter, one benchmark and one temperature.")
        names = self.benchmark_names
        if len(set(names)) < len(names) or any("/" in name for name in names):
            raise ValueError(
                f"The benchmarks are named {names}; expected distinct names without /."
            )
        for name in ("dtype", "record_features"):
            if getattr(self, name) not in ("float32", "bfloat16", "float16"):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, expected float32, bfloat16 or float16."
                )
        check_numbers(self, _RANGES)
        DynamicTree(*self.tree)  # refuses what is no tree
        if self.device is not None:
            check_device(self.device)

    @property
    def benchmark_names(self) -> list[str]:
        """The benchmarks' names, without their files."""
        return [spec.partition("=")[0] for spec in self.benchmarks]

    def record_options(self, temperature: float) -> RecordOptions:
        """How the target answers at a temperature."""
        return RecordOptions(
            temperature,
            self.max_new_tokens,
            self.record_batch,
            self.seed,
            getattr(torch, self.record_features),
        )
