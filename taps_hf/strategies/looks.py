"""Cycles in which all drafters ran: what they would have been with some of the drafters only."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..trees.tree import DraftTree
from .costs import Costs


@dataclass(frozen=True)
class Look:
    """A cycle in which all drafters ran.

    Args:
        proposers: of each accepted token.
        groups: of the verified nodes, how many were proposed by which drafters.
    """

    proposers: tuple[tuple[int, ...], ...] = ()
    groups: tuple[tuple[frozenset[int], int], ...] = ()

    @classmethod
    def of(cls, proposers: tuple[tuple[int, ...], ...], tree: DraftTree) -> Look:
        """By the accepted tokens' proposers and the verified tree."""
        known = (~tree.confidence[:, 1:].isnan()).T.tolist()
        groups = Counter(frozenset(i for i, by in enumerate(row) if by) for row in known)
        return cls(proposers, tuple(groups.items()))

    def accepted(self, asked: Sequence[int]) -> int:
        """Tokens that only these drafters would have had accepted."""
        missing = (i for i, by in enumerate(self.proposers) if not set(by) & set(asked))
        return next(missing, len(self.proposers))

    def nodes(self, asked: Sequence[int]) -> int:
        """Nodes that only these drafters would have had verified."""
        return sum(count for by, count in self.groups if by & set(asked))


class Looks:
    """The last looks of a generation, the later the weightier.

    Args:
        costs: of passes and drafts.
        free: drafters that draft in every cycle anyway.
    """

    _MEMORY = 12
    _DECAY = 0.85  # of a look's weight, for each later one
    _LAST = 3  # that the next answer hears of: enough to doubt, not to decide

    def __init__(self, costs: Costs, free: Sequence[int] = ()) -> None:
        self.costs, self.free = costs, tuple(free)
        self._looks: deque[Look] = deque(maxlen=self._MEMORY)
        self._last: deque[Look] = deque(maxlen=self._LAST)

    def __len__(self) -> int:
        return len(self._looks)

    def add(self, look: Look) -> None:
        """Remember one more."""
        self._looks.append(look)
        self._last.append(look)

    @property
    def last(self) -> tuple[Look, ...]:
        """The very last, also of those that were forgotten since; the oldest first."""
        return tuple(self._last)

    def clear(self) -> None:
        """Forget all."""
        self._looks.clear()

    def fastest(self, everyone: Sequence[int], levels: float) -> tuple[int, ...]:
        """The drafters that would have been the fastest, none if plain steps: grown one by one.

        Args:
            everyone: all drafters but the free ones, which draft as well.
            levels: that a tree has on average.
        """
        best: tuple[int, ...] = ()
        rate = max(1.0 / self.costs.target_seconds(1), self.rate((), levels))
        while True:
            more = [tuple(sorted((*best, index))) for index in everyone if index not in best]
            found = [(self.rate(asked, levels), asked) for asked in more]
            if not found or max(found)[0] <= rate:
                return best
            rate, best = max(found)

    def rate(self, asked: Sequence[int], levels: float) -> float:
        """Tokens per second that these drafters would have reached beside the free ones."""
        asked = (*self.free, *asked)
        draft = self.costs.draft(asked)
        drafting = draft.first + (levels - 1) * draft.level
        tokens = seconds = 0.0
        for age, look in enumerate(reversed(self._looks)):
            weight = self._DECAY**age
            tokens += weight * (1.0 + look.accepted(asked))
            nodes = look.nodes(asked)
            seconds += weight * (drafting + self.costs.target_seconds(nodes + 1))
        return tokens / seconds
