"""Prompts from files of JSON lines."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Prompt:
    """One question.

    Args:
        group: the file it is from, without its ending; figures are reported by group.
        line: its line there, from 1.
        text: what the user says.
        later: what the user says in further turns.
    """

    group: str
    line: int
    text: str
    later: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Names the prompt in a file of results; another text has another key."""
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:8]
        return f"{self.group}:{self.line}:{digest}"


def read_prompts(spec: str, times: int = 1) -> list[Prompt]:
    """The prompts that `FILE` or `FILE:COUNT` stands for; COUNT are spread evenly over the file.

    Args:
        spec: the file, and how many prompts.
        times: so many times COUNT, all different.

    Raises:
        ValueError: for a count that the file cannot give, and, naming file and line, for rows that
            are no prompts.
        FileNotFoundError: if there is no such file.
    """
    name, colon, count = spec.rpartition(":")
    if not (colon and count.isdigit()):
        name, count = spec, ""
    file = Path(name)
    lines = file.read_text(encoding="utf-8").splitlines()
    found = [
        Prompt(file.stem, number, *_turns(line, f"{file.name}, line {number}"))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    wanted = int(count) * times if count else len(found)
    if not 0 < wanted <= len(found):
        raise ValueError(f"{wanted} prompts were asked of {file.name}, which has {len(found)}.")
    return [found[i * len(found) // wanted] for i in range(wanted)]


def _turns(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    """What the user says first, and later."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}).") from None
    turns = None
    if isinstance(row, dict):
        turns = row.get("turns", [row.get("instruction")])
    wanted = isinstance(turns, list) and turns
    if not wanted or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError(
            f"{where}: expected an object with a non-empty list `turns` of texts, or a text "
            "`instruction`."
        )
    return turns[0], tuple(turns[1:])
