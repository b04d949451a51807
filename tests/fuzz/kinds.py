"""All kinds of cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from . import checkpoints, interruptions, kills, memory, parity, threads


class Kind(NamedTuple):
    """A kind of case.

    Args:
        case: one, by its seed.
        share: of the time of a long run.
        samples: seeds that are part of the test suite.
        sample: a case for those, where it is to be another one.
    """

    case: Callable[[int], None]
    share: float
    samples: Sequence[int]
    sample: Callable[[int], None]


KINDS = {
    "memory": Kind(memory.case, 0.1, range(1), partial(memory.case, generations=40)),
    "parity": Kind(parity.case, 0.4, range(40), parity.case),
    "interruptions": Kind(interruptions.case, 0.15, range(12), interruptions.case),
    "threads": Kind(threads.case, 0.1, range(2), threads.case),
    "checkpoints": Kind(checkpoints.case, 0.1, range(60), checkpoints.case),
    "kills": Kind(kills.case, 0.15, range(1), kills.every_command),
}
