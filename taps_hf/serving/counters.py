"""Counts of each drafter's tokens, from where they are drafted to where they are asked for.

vLLM drafts in other processes than it answers `/metrics` in. So the first process that loads the
plugin makes a folder and names it in the environment, which its children inherit. Each process
that drafts has a file there, which only it writes: a line of JSON that says whose counts these
are, then the counts themselves, mapped into memory.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FOLDER = "TAPS_HF_COUNTERS"
"""The variable of the environment that names the folder."""

KINDS = ("drafted", "accepted")
_HEADER = 4096  # bytes, so that the counts are aligned
_SUFFIX = ".counters"


def counters_folder() -> Path:
    """Where counts of this server lie; made by the first who asks, and removed when it ends."""
    if FOLDER not in os.environ:
        folder, owner = tempfile.mkdtemp(prefix="taps-hf-"), os.getpid()

        def remove() -> None:
            if os.getpid() == owner:  # not a child that was forked
                shutil.rmtree(folder, ignore_errors=True)

        atexit.register(remove)
        os.environ[FOLDER] = folder
    return Path(os.environ[FOLDER])


class Counters:
    """The counts of one process that drafts.

    Args:
        names: of the drafters.
        engine: which of vLLM's engines it belongs to (data parallelism has several).
        folder: see [`counters_folder`].
    """

    def __init__(self, names: Sequence[str], engine: int = 0, folder: Path | None = None) -> None:
        header = json.dumps({"names": list(names), "engine": engine}).encode()
        if len(header) >= _HEADER:
            raise ValueError(
                f"The drafters' names take {len(header)} bytes, expected less than {_HEADER}."
            )
        folder = counters_folder() if folder is None else folder
        handle, path = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(header.ljust(_HEADER) + bytes(8 * len(KINDS) * len(names)))
        whole = f"{path}{_SUFFIX}"
        os.rename(path, whole)
        self.counts = np.memmap(
            whole, np.int64, "r+", offset=_HEADER, shape=(len(KINDS), len(names))
        )
        """(2, K): drafted and verified, accepted."""


@dataclass(frozen=True)
class Count:
    """One number.

    Args:
        kind: one of [`KINDS`].
        engine: vLLM's.
        drafter: its name.
        value: so many tokens.
    """

    kind: str
    engine: int
    drafter: str
    value: int


def read_counts(folder: Path) -> list[Count]:
    """The counts of all processes of a server, those of one engine and drafter together."""
    found: dict[tuple[str, int, str], int] = defaultdict(int)
    for file in sorted(folder.glob(f"*{_SUFFIX}")):
        content = file.read_bytes()
        header = json.loads(content[:_HEADER])
        counts = np.frombuffer(content, np.int64, offset=_HEADER).reshape(len(KINDS), -1)
        for kind, row in zip(KINDS, counts):
            for name, value in zip(header["names"], row):
                found[kind, header["engine"], name] += int(value)
    return [Count(*key, value) for key, value in found.items()]


class Collector:
    """What prometheus_client asks for metrics: `taps_hf:drafted_tokens`, `…accepted_tokens`."""

    def describe(self) -> list[object]:
        """Nothing yet: which drafters there are is known when one has been loaded."""
        return []

    def collect(self) -> Iterator[object]:
        """Counters with the labels `engine` and `drafter`."""
        from prometheus_client.core import CounterMetricFamily  # vLLM brings it

        counts = read_counts(counters_folder())
        for kind in KINDS:
            family = CounterMetricFamily(
                f"taps_hf:{kind}_tokens",
                f"Tokens of each drafter that were {kind}, among those that were verified.",
                labels=["engine", "drafter"],
            )
            for count in counts:
                if count.kind == kind:
                    family.add_metric([str(count.engine), count.drafter], count.value)
            yield family
