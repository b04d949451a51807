"""What was learnt of drafters in earlier answers: where the next one begins."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from .calibration import Calibration
from .looks import Look

_MOST_KEPT = 64  # experiences with a target: of ever other drafters


@dataclass(frozen=True)
class Habits:
    """Running means over the cycles of an answer.

    Args:
        deeper: share of cycles that accept a node more, given that they came so far.
        nodes: verified nodes.
        levels: that drafters grew.
        survival: of cycles in which drafters that are not free were asked, the share in which they
            were right for at least so many tokens: from 1 on. High at first: they are to be tried.
    """

    deeper: float = 0.6
    nodes: float = 8.0
    levels: float = 3.0
    survival: tuple[float, ...] = (0.7, 0.5, 0.35, 0.25, 0.17, 0.12, 0.08, 0.05)


class Experience:
    """What answers have taught, for one target and some drafters.

    Answers of several threads may learn and teach at once. Only speed depends on it.

    Args:
        num_drafters: rows of a tree's `confidence`.
    """

    def __init__(self, num_drafters: int) -> None:
        self._lock = threading.Lock()
        self._calibration = Calibration(num_drafters, kept=0.995)
        self._habits = Habits()
        self._looks: tuple[Look, ...] = ()

    def recall(self) -> tuple[Calibration, Habits, tuple[Look, ...]]:
        """Where an answer begins: its own calibration, habits, and the last looks of the one
        before, the oldest first.
        """
        with self._lock:
            return self._calibration.begin(), self._habits, self._looks

    def learn(self, found: Sequence, habits: Habits, looks: Sequence[Look]) -> None:
        """Remember a cycle.

        Args:
            found: what [`Calibration.observe`] returned.
            habits: after it.
            looks: the answer's last, the oldest first.
        """
        with self._lock:
            if found:
                self._calibration.add(*found)
            self._habits = habits
            self._looks = tuple(looks)


_experiences: weakref.WeakKeyDictionary[PreTrainedModel, dict[Hashable, Experience]]
_experiences = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def experience_of(target: PreTrainedModel, drafters: tuple[Hashable, ...]) -> Experience:
    """What there is of earlier answers of a target, for as long as it lives.

    Args:
        target: the model that is accelerated.
        drafters: what tells each drafter from others, in their order.
    """
    with _lock:
        kept = _experiences.setdefault(target, {})
        if drafters not in kept:
            kept[drafters] = Experience(len(drafters))
            while len(kept) > _MOST_KEPT:
                del kept[next(iter(kept))]
        return kept[drafters]
