"""Reading conversations: files or Hub data sets, several row formats, mixtures.

Every conversation becomes a list of messages as chat templates take them. Rows that cannot be used
are counted by reason, never dropped in silence.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks import is_unicode, parse_json

Message = dict[str, str]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES["system"] = "system"


class UnusableRowError(ValueError):
    """Why a row cannot be used; the message is the reason it is counted under."""


@dataclass
class DataReport:
    """How many rows were used, changed or left out, and why.

    Args:
        used: rows that became examples.
        problems: rows by what was wrong with them.
        first: where each problem was met first.
    """

    used: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def count(self, problem: str, where: str) -> None:
        """Note that the row at `where` had a problem."""
        self.problems[problem] += 1
        self.first.setdefault(problem, where)

    def merge(self, other: DataReport) -> None:
        """Add what another report has counted."""
        self.used += other.used
        self.problems.update(other.problems)
        self.first = {**other.first, **self.first}

    def __str__(self) -> str:
        lines = [f"{self.used} rows used"]
        for problem, count in self.problems.most_common():
            lines.append(f"{count} rows: {problem} (first: {self.first[problem]})")
        return "\n".join(lines)


@dataclass(frozen=True)
class DataSource:
    """A file of JSON lines (.gz or not) or a Hub data set, and how many of its rows to take.

    Args:
        name: path of a file, or name of a data set on the Hub (its `train` split).
        count: rows to take; None for all.
        share: proportion of the mixture instead of a count, above 0 and at most 1.
    """

    name: str
    count: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> DataSource:
        """Read `name`, `name:35000` or `name:50%`.

        Raises:
            ValueError: for a count below 1 or a share outside (0, 100] percent.
        """
        found = re.fullmatch(r"(.+):(\d+(?:\.\d+)?%|\d+)", text)
        if not found:
            return cls(text)
        name, amount = found.groups()
        number = float(amount.rstrip("%"))
        if number <= 0 or (amount.endswith("%") and number > 100):
            raise ValueError(f"{text!r} asks for {amount} of {name}, expected more than none.")
        if amount.endswith("%"):
            return cls(name, share=number / 100)
        return cls(name, count=int(amount))


@dataclass(frozen=True)
class SourceRow:
    """One row as it was read: its fields, and where it came from, for messages."""

    fields: Mapping[str, Any]
    source: str
    number: int

    @property
    def where(self) -> str:
        return f"{self.source}:{self.number}"


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """The conversation in a row.

    Knows `messages` (role, content), `conversations` (from, value; ShareGPT) and `instruction`,
    `output` (MathInstruct; an `input` follows the instruction as in Alpaca's rows).

    Raises:
        UnusableRowError: naming what is wrong with the row.
    """
    if "messages" in row:
        said = _messages(row["messages"], "messages", "role", "content")
    elif "conversations" in row:
        said = _messages(row["conversations"], "conversations", "from", "value")
    elif "instruction" in row:
        if "output" not in row:
            raise UnusableRowError("has `instruction` but no `output`")
        question = [row["instruction"], row.get("input") or ""]
        if not all(isinstance(text, str) for text in (*question, row["output"])):
            raise UnusableRowError("`instruction`, `input` or `output` is not text")
        said = [
            {"role": "user", "content": "\n\n".join(filter(None, question))},
            {"role": "assistant", "content": row["output"]},
        ]
    else:
        raise UnusableRowError(
            "has none of the fields `messages`, `conversations` or `instruction`"
        )
    roles = [message["role"] for message in said]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        raise UnusableRowError("turns do not alternate between user and assistant")
    if not all(is_unicode(m["content"]) for m in said):
        raise UnusableRowError("a text with half of a surrogate pair, which is no character")
    if any(m["role"] == "user" and not m["content"].strip() for m in said):
        raise UnusableRowError("an empty question")
    if any(m["role"] == "assistant" and not m["content"].strip() for m in said):
        raise UnusableRowError("an empty answer")
    return said


def _messages(said: Any, field_name: str, role: str, content: str) -> list[Message]:
    if not isinstance(said, Sequence) or isinstance(said, str):
        raise UnusableRowError(f"`{field_name}` is not a list")
    found = []
    for message in said:
        if not isinstance(message, Mapping) or not {role, content} <= set(message):
            raise UnusableRowError(f"an entry of `{field_name}` lacks `{role}` or `{content}`")
        if not isinstance(message[role], str) or message[role] not in _ROLES:
            raise UnusableRowError(f"unknown role {message[role]!r:.40}")
        if not isinstance(message[content], str):
            raise UnusableRowError(f"`{content}` of an entry is not text")
        found.append({"role": _ROLES[message[role]], "content": message[content]})
    return found


def prompt_of(messages: Sequence[Message], rng: random.Random) -> list[Message]:
    """A conversation up to one of its questions, drawn evenly, without the answer to it."""
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return list(messages[: rng.choice(questions) + 1])


def read_rows(source: DataSource, report: DataReport, seed: int) -> list[SourceRow]:
    """All rows of a source in a random order (of `seed`), cut to its `count`.

    Lines that are no JSON objects are counted in `report`.

    Raises:
        ValueError: if a compressed file is not whole; if there is no such file and `datasets` is
            not installed or knows no such set; if there are no rows, or fewer than the `count`
            asked for.
    """
    rows = list(_rows(source.name, report))
    if not rows:
        raise ValueError(f"{source.name} has no rows, expected JSON lines.")
    if source.count is not None and source.count > len(rows):
        raise ValueError(
            f"{source.name} has {len(rows)} rows, expected at least the {source.count} asked for."
        )
    random.Random(f"{seed}/{Path(source.name).name}").shuffle(rows)
    return rows[: source.count]


def digest_of(rows: Iterable[SourceRow]) -> str:
    """16 hexadecimal digits of the SHA-256 over what all rows say, in their order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row.fields, sort_keys=True, default=str).encode())
    return found.hexdigest()[:16]


def read_mixture(
    sources: Sequence[DataSource], report: DataReport, seed: int = 0
) -> list[SourceRow]:
    """Rows of several sources in one random order.

    With shares, which must sum to 1, the mixture is the largest that every source can fill.

    Raises:
        ValueError: as [`read_rows`]; also if some sources have shares and others none, or they do
            not sum to 1.
    """
    if not sources:
        raise ValueError("No data were given, expected at least one file or data set.")
    parts = [read_rows(source, report, seed) for source in sources]
    shares = [source.share for source in sources]
    if any(share is not None for share in shares):
        if None in shares or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"Shares {shares} were given, expected one a source, 100% together.")
        total = min(len(rows) / share for rows, share in zip(parts, shares))
        parts = [rows[: int(total * share)] for rows, share in zip(parts, shares)]
    rows = [row for part in parts for row in part]
    random.Random(f"{seed}/mixture").shuffle(rows)
    return rows


def _rows(name: str, report: DataReport) -> Iterator[SourceRow]:
    path = Path(name)
    if path.is_file():
        for number, line in enumerate(_lines(path), start=1):
            try:
                fields = parse_json(line)
            except ValueError:
                fields = None
            if isinstance(fields, dict):
                yield SourceRow(fields, path.name, number)
            else:
                report.count("not a JSON object", f"{path.name}:{number}")
        return
    if path.suffix in {".json", ".jsonl", ".gz"}:
        raise ValueError(f"{name} does not exist, expected a file of JSON lines.")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"{name} is no file; reading it as a Hub data set needs `pip install taps-hf[train]`."
        ) from None
    for number, fields in enumerate(load_dataset(name, split="train"), start=1):
        yield SourceRow(fields, name, number)


def _lines(path: Path) -> Iterator[bytes]:
    opened = gzip.open if path.suffix == ".gz" else open
    number = 1
    with opened(path, "rb") as file:
        try:
            for line in file:
                yield line
                number += 1
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            # Not a row to count: nobody knows how many are missing.
            raise ValueError(
                f"{path}, line {number}: {error}; expected a whole gzip file."
            ) from None
