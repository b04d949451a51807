"""Checks that several commands share: numbers, devices, NAME=PATH, JSON.

What they refuse, a `ValueError` names: the argument, what was found and what was expected.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Range:
    """Finite numbers between bounds, each of which is part of the range or not."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        # Not isfinite(), for which whole numbers can be too large. No comparison holds for NaN.
        finite = -math.inf < value < math.inf
        return finite and self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        bounds = {k.replace("_", " "): v for k, v in vars(self).items() if abs(v) < math.inf}
        return " and ".join(f"{k} {v}" for k, v in bounds.items()) or "a finite number"


FINITE = Range()
COUNT = Range(at_least=1)
NOT_NEGATIVE = Range(at_least=0)
# What every library that is seeded accepts; numpy takes no more.
SEED = Range(at_least=0, at_most=2**32 - 1)
THREADS = Range(at_least=1, at_most=1024)


def check_numbers(options: object, ranges: Mapping[str, Range]) -> None:
    """Raise `ValueError` unless attributes lie in their ranges; None and empty sequences do.

    Args:
        options: what has the attributes: numbers, or sequences of numbers.
        ranges: by the attributes' names.
    """
    for name, expected in ranges.items():
        value = getattr(options, name)
        if value is None:
            continue
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if number not in expected:
                raise ValueError(f"`{name}` is {number!r}, expected {expected}.")


def is_fast_in_bfloat16(device: torch.device) -> bool:
    """Whether products of matrices take no longer there in bfloat16 than in float32.

    On CPUs with AVX2 alone they take ten times as long.
    """
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX2"


def check_device(device: str) -> None:
    """Raise `ValueError` unless torch knows the device and this machine has it."""
    known = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        count = torch.accelerator.device_count()
        known += [kind, *(f"{kind}:{i}" for i in range(count))]
    # Processes that train together on CPUs number them.
    if device not in known and not re.fullmatch(r"cpu:\d+", device):
        raise ValueError(f"`device` is {device!r}, expected one that is here: {', '.join(known)}.")


def set_threads(threads: int | None) -> None:
    """Set how many CPU threads torch uses; None leaves torch's choice.

    Raises:
        ValueError: for a number that makes no sense.
    """
    if threads is None:
        return
    if threads not in THREADS:
        raise ValueError(f"`threads` is {threads}, expected {THREADS}.")
    torch.set_num_threads(threads)


def named_paths(entries: Sequence[str], argument: str) -> dict[str, str]:
    """Paths by name, from NAME=PATH each.

    Args:
        argument: what messages call it.

    Raises:
        ValueError: for no entries, entries of another form, or a name that occurs twice.
    """
    named = {}
    for entry in entries:
        name, _, path = (part.strip() for part in entry.partition("="))
        if name and path:
            named[name] = path
    if not entries or len(named) < len(entries):
        raise ValueError(
            f"`{argument}` is {list(entries)}, expected NAME=PATH with distinct names."
        )
    return named


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Say which model or tokenizer could not be loaded; around `from_pretrained`.

    Raises:
        ValueError: for whatever broken files make libraries raise, but for what is an OSError:
            those say themselves which file it is.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{name} cannot be loaded: {type(error).__name__}: {error}; expected files as "
            "`save_pretrained` writes them."
        ) from error


def parse_json(text: bytes) -> Any:
    """What JSON in UTF-8 says.

    Raises:
        ValueError: for whatever is no JSON, or more deeply nested than can be read.
    """
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON may hold lone surrogates, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
