"""Benchmark questions: from files of JSON lines, or from the Hub."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..checks import is_unicode, parse_json


@dataclass(frozen=True)
class Question:
    """One question, of one or more turns.

    Args:
        benchmark: the name it is reported under.
        question_id: unique within the benchmark.
        turns: what the user says, turn after turn; each answer is fed back before the next.
        category: of the question, if there are any.
    """

    benchmark: str
    question_id: str
    turns: tuple[str, ...]
    category: str = ""


# Where a benchmark lies on the Hub, and how a row of it becomes the fields of a file.
_HUB: dict[str, tuple[tuple[str, ...], str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "gsm8k": (("openai/gsm8k", "main"), "test", lambda r: {"turns": [r["question"]]}),
    "math_500": (
        ("HuggingFaceH4/MATH-500",),
        "test",
        lambda r: {"turns": [r["problem"]], "category": r["subject"]},
    ),
    "svamp": (
        ("ChilleD/SVAMP",),
        "test",
        lambda r: {"turns": [f"{r['Body']} {r['Question']}"], "category": r["Type"]},
    ),
    "mt_bench": (
        ("HuggingFaceH4/mt_bench_prompts",),
        "train",
        lambda r: {
            "turns": r["prompt"],
            "category": r["category"],
            "question_id": r["prompt_id"],
        },
    ),
}
HUB_BENCHMARKS = tuple(_HUB)


def read_benchmark(spec: str, limit: int | None = None, seed: int = 0) -> list[Question]:
    """The questions that `NAME=FILE` or, from the Hub, `NAME` stands for.

    Args:
        spec: a name and a file of JSON lines with `turns` and, where they have them, `question_id`
            and `category`; or one of `HUB_BENCHMARKS`.
        limit: take that many, evenly spread: of as many stretches of equal length one each, drawn
            with `seed`. More than there are takes all.

    Raises:
        ValueError: naming file and line, for what is no question, or two with one id; if the name
            is unknown, or `datasets` is not installed.
    """
    name, equals, file = spec.partition("=")
    if equals:
        questions = _read_file(name, Path(file))
    elif name in _HUB:
        questions = _read_hub(name)
    else:
        raise ValueError(
            f"`benchmark` is {spec!r}, expected NAME=FILE or one of {', '.join(HUB_BENCHMARKS)}."
        )
    if limit is None or limit >= len(questions):
        return questions
    if limit < 1:
        raise ValueError(f"`limit` is {limit}, expected 1 or more.")
    rng = random.Random(f"{seed}/{name}")
    bounds = [i * len(questions) // limit for i in range(limit + 1)]
    return [questions[rng.randrange(a, b)] for a, b in pairwise(bounds)]


def _read_file(name: str, file: Path) -> list[Question]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist, expected a file of JSON lines for {name}.")
    rows = []
    # Not splitlines(), which also splits at separators that may stand in a text.
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            rows.append((where, parse_json(line)))
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error}).") from None
    return _questions(name, rows)


def _read_hub(name: str) -> list[Question]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"Reading {name} from the Hub needs `pip install taps-hf[eval]`; or give {name}=FILE."
        ) from None
    path, split, convert = _HUB[name]
    rows = load_dataset(*path, split=split)
    return _questions(name, [(f"{path[0]}, row {i}", convert(row)) for i, row in enumerate(rows)])


def _questions(name: str, rows: list[tuple[str, Any]]) -> list[Question]:
    found: dict[str, Question] = {}
    for number, (where, row) in enumerate(rows):
        turns = row.get("turns") if isinstance(row, Mapping) else None
        if not isinstance(turns, list) or not turns or not all(_is_text(turn) for turn in turns):
            raise ValueError(f"{where}: expected an object with `turns`, a list of texts.")
        key, category = str(row.get("question_id", number)), str(row.get("category") or "")
        if not all(map(is_unicode, (*turns, key, category))):
            raise ValueError(f"{where}: half of a surrogate pair, expected text in Unicode.")
        if key in found:
            raise ValueError(f"{where}: `question_id` {key} occurs twice, expected distinct ones.")
        found[key] = Question(name, key, tuple(turns), category)
    if not found:
        raise ValueError(f"{name} has no questions, expected at least one.")
    return list(found.values())


def _is_text(turn: object) -> bool:
    return isinstance(turn, str) and bool(turn.strip())
