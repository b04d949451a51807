"""What can be asked of a training run: defaults, recipe files, the command line."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..checks import (
    COUNT,
    NOT_NEGATIVE,
    SEED,
    THREADS,
    Range,
    check_device,
    check_numbers,
)
from .conversations import DataSource
from .muon import check_muon
from .objectives import ObjectiveOptions, get_objective, list_objectives

# Of fields that take some texts only; what `objective` takes, its registry says, and it `start`.
_CHOICES = {
    "optimizer": ("adamw", "muon"),
    "dtype": ("bfloat16", "float16", "float32"),
    "device": (None, "cpu", "cuda"),
}
_RANGES = {
    "held_out": Range(above=0, below=1),
    "eval_rows": COUNT,
    "eval_depth": COUNT,
    "max_length": Range(at_least=4),
    "draft_vocab": COUNT,
    "layer_ids": COUNT,
    "epochs": Range(above=0),
    "max_steps": Range(at_least=-1),
    "batch_size": COUNT,
    "gradient_accumulation": COUNT,
    "learning_rate": Range(above=0),
    "warmup": Range(at_least=0, below=1),
    "weight_decay": NOT_NEGATIVE,
    "beta2": Range(at_least=0, below=1),
    "clip": NOT_NEGATIVE,
    "evaluations": COUNT,
    "threads": THREADS,
    "seed": SEED,
}


def _option(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides what a training run does. Defaults: EAGLE's, for large targets.

    Raises:
        ValueError: for values that no run can have.
    """

    target: str = _option("embedded", "folder or Hub name; `embedded` is the SmolLM2 of quickstart")
    chat_template: str | None = _option(None, "file to use instead of the tokenizer's template")
    data: list[str] = _option([], "files of JSON lines or Hub data sets: NAME, NAME:ROWS, NAME:N%%")
    out: str = _option("", "folder to write the drafter to")
    license: str | None = _option(None, "of the drafter, named in its card (as the Hub names it)")
    objective: str = _option("eagle", f"as published: {' or '.join(list_objectives())}")
    init_from: str | None = _option(None, "drafter to start from (HASS starts from EAGLE's)")
    start: str = _option(
        "random", "of a new drafter: random, least_squares (eagle, hass), target_head (eagle3)"
    )
    eval_data: list[str] = _option([], "more sources of which the held-out rows are measured")
    held_out: float = _option(0.02, "share of all rows, the same ones in every run, not trained on")
    eval_rows: int = _option(200, "held-out rows of each source that are measured")
    eval_depth: int = _option(5, "length of the drafts replayed in evaluation")
    max_length: int = _option(2048, "tokens; longer examples are cut")
    draft_vocab: int | None = _option(None, "tokens the drafter scores: the answers' most frequent")
    context_window: int | None = _option(
        None, "slots that the drafter looks back over when it drafts (trained it is on all)"
    )
    input_norm: bool = _option(False, "normalise the layer's input, as EAGLE's checkpoints don't")
    fc_bias: bool = _option(False, "give the projection of [embedding; feature] a bias")
    layer_ids: list[int] = _option(
        [], "eagle3: which of the target's hidden_states are read (of n layers 2, n // 2, n - 3)"
    )
    features: list[str] = _option([], "feature stores; the first is filled with what is missing")
    steps: int | None = _option(None, "how deep is drafted in training (eagle 1, hass 3, eagle3 7)")
    decay: float | None = _option(None, "weight of a step, of the one before (1, eagle3 0.8)")
    regression_weight: float | None = _option(None, "of the feature regression (1.0, eagle3 none)")
    token_weight: float | None = _option(None, "of the cross-entropy (0.1, eagle3 1.0)")
    top_k_weight: float | None = _option(None, "of top-K distillation (eagle 0, hass 1.0)")
    top_k: int | None = _option(None, "K of top-K distillation (10)")
    noise: float | None = _option(None, "half-width of uniform noise on features (0.1, eagle3 0)")
    epochs: float = _option(20.0, "passes over the data")
    max_steps: int = _option(-1, "optimiser steps, instead of epochs")
    batch_size: int = _option(2, "examples a device takes at once")
    gradient_accumulation: int = _option(1, "batches between two optimiser steps")
    optimizer: str = _option("adamw", "adamw, or muon (for matrices; AdamW for vectors)")
    learning_rate: float = _option(3e-5, "highest, after the warm-up")
    schedule: str = _option("linear", "any of transformers' learning rate schedules")
    warmup: float = _option(0.05, "share of the steps")
    weight_decay: float = _option(0.0, "of the matrices (of muon's, with muon), decoupled")
    beta2: float = _option(0.95, "of AdamW")
    clip: float = _option(0.5, "norm that gradients are clipped to")
    evaluations: int = _option(10, "evaluations and checkpoints in the whole run")
    dtype: str = _option("bfloat16", "of the target")
    mixed_precision: bool = _option(True, "autocast to bfloat16; the drafter's weights are float32")
    device: str | None = _option(None, "cpu or cuda (default: cuda where there is one)")
    threads: int | None = _option(None, "CPU threads (default: torch's)")
    report_to: str = _option("none", "tensorboard, wandb, ... or none")
    seed: int = _option(0, "of weights, noise and order")

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), kind)
        if not self.data:
            raise ValueError("`data` is empty, expected at least one source.")
        if not self.out:
            raise ValueError("`out` is empty, expected a folder to write.")
        if Path(self.out).is_file():
            raise ValueError(f"`out` is {self.out}, a file; expected a folder.")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                *most, last = filter(None, choices)
                raise ValueError(f"`{name}` is {value!r}, expected {', '.join(most)} or {last}.")
        if self.optimizer == "muon":
            check_muon()
        if self.device is not None:
            check_device(self.device)
        check_numbers(self, _RANGES)
        if self.max_steps == 0:
            raise ValueError("`max_steps` is 0, expected at least 1, or -1 for `epochs`.")
        if self.context_window is not None and not 0 < self.context_window <= self.max_length:
            raise ValueError(
                f"`context_window` is {self.context_window}, expected a positive number not above "
                f"`max_length` ({self.max_length}), on which the drafter is trained."
            )
        self.objective_options()
        self._check_drafter()
        self.sources()

    def _check_drafter(self) -> None:
        """Refuse what drafters of this objective cannot have."""
        objective = get_objective(self.objective)
        if self.start not in objective.starts:
            raise ValueError(
                f"`start` is {self.start!r}, expected {' or '.join(objective.starts)} for "
                f"`objective` {self.objective}."
            )
        shaping = {name for known in list_objectives() for name in _shaping(known)}
        for name in sorted(shaping - set(objective.drafter_options)):
            if value := getattr(self, name):
                raise ValueError(
                    f"`{name}` is {value}, but drafters of `objective` {self.objective} have none."
                )

    def objective_options(self) -> ObjectiveOptions:
        """The objective by its name, with what was changed."""
        names = [f.name for f in dataclasses.fields(ObjectiveOptions)]
        changes = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        return get_objective(self.objective).options_with(**changes)

    def sources(self) -> list[DataSource]:
        """The data asked for."""
        return [DataSource.parse(text) for text in self.data]


def _shaping(objective: str) -> tuple[str, ...]:
    """The options that shape an objective's drafters."""
    return get_objective(objective).drafter_options


def _check_type(name: str, value: Any, kind: Any) -> None:
    """Recipes are read from YAML, where `3e-5` is a text and `a.jsonl` no list."""
    if typing.get_origin(kind) is list:
        (entries,) = typing.get_args(kind)
        right = isinstance(value, list) and all(type(x) is entries for x in value)
    elif float in (kind, *typing.get_args(kind)):
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not right and not (value is None and type(None) in typing.get_args(kind)):
        raise ValueError(f"`{name}` is {value!r}, expected a {kind}.")


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Add a flag for every field of a dataclass; flags not given leave nothing behind."""
    types = typing.get_type_hints(options)
    for item in dataclasses.fields(options):
        kind = types[item.name]
        extra: dict[str, Any] = {}
        if typing.get_origin(kind) is list:
            extra["nargs"] = "*"
            kind = typing.get_args(kind)[0]
        elif kind is bool:
            extra["action"] = argparse.BooleanOptionalAction
        else:
            kind = next(iter(typing.get_args(kind)), kind)  # of an optional type
        if kind is not bool:
            extra["type"] = kind
        default = item.default if item.default_factory is dataclasses.MISSING else []
        help_text = item.metadata["help"]
        if default not in (None, "", []):
            help_text += f" (default: {default})".replace("%", "%%")
        parser.add_argument(
            "--" + item.name.replace("_", "-"), default=argparse.SUPPRESS, help=help_text, **extra
        )


def train_options(given: Mapping[str, Any], recipe: Path | None = None) -> TrainOptions:
    """Options out of a recipe (YAML, the fields of [`TrainOptions`]) and what overrides it.

    Raises:
        ValueError: for a recipe that is no mapping or has a field that does not exist, and as
            [`TrainOptions`].
    """
    values: dict[str, Any] = {}
    if recipe is not None:
        try:
            values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeError, RecursionError) as error:
            raise ValueError(f"{recipe} cannot be read: {error}; expected YAML.") from None
        known = {item.name for item in dataclasses.fields(TrainOptions)}
        if not isinstance(values, dict) or set(values) - known:
            odd = type(values).__name__
            if isinstance(values, dict):
                odd = [key for key in values if key not in known]
            raise ValueError(f"{recipe} has {odd}, expected fields among {sorted(known)}.")
    return TrainOptions(**{**values, **given})
