"""What the target has passed over and drafters have not read, kept until they do.

Drafters rest while nothing is to be drafted. A drafter's keys and values can be made later as well
as at once, of the target's states: those are kept here, and read when drafting begins again, by one
pass and only of requests that are still there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .batches import Rows, join


class Unread:
    """Rows of requests that drafters have not read.

    Args:
        requests: how many are remembered at most, each in a slot of its own.
        most: rows of each that are kept: its last ones. Others will never be read.
    """

    def __init__(self, requests: int, most: int) -> None:
        self._most, self._requests = most, requests
        self._first: list[int | None] = [None] * requests  # the position of the first unread row
        self._end = [0] * requests  # after the last position kept, also if it was taken back
        # By slot, at their positions modulo `most`. Memory that is not written takes no place.
        self._tokens: torch.Tensor | None = None
        self._states: torch.Tensor | None = None

    def forget(self, slots: Sequence[int]) -> None:
        """Slots of requests that begin."""
        for slot in slots:
            self._first[slot], self._end[slot] = None, 0

    def keep(self, rows: Rows, slots: Sequence[int]) -> None:
        """Rows that are not read now, of requests in these slots."""
        if self._states is None:
            self._tokens = rows.tokens.new_empty(self._requests, self._most)
            self._states = rows.states.new_empty(self._requests, self._most, rows.states.shape[1])
        for slot, first, length in zip(slots, self._firsts(rows), rows.lengths):
            if self._end[slot] < first:  # what is between came from a cache: nothing to read it by
                self._first[slot] = first
            self._see(slot, first)
            self._end[slot] = max(self._end[slot], first + length)
        where, at = torch.tensor(slots), rows.positions % self._most
        tokens, states = rows.tokens, rows.states
        if len(where) < len(tokens):  # not one row of each
            lengths = torch.tensor(rows.lengths)
            left = torch.tensor(rows.starts[1:]).repeat_interleave(lengths)
            last = left - torch.arange(len(tokens)) <= self._most  # or two would go to one place
            where = where.repeat_interleave(lengths)
            where, at, tokens, states = (x[last] for x in (where, at, tokens, states))
        self._tokens[where, at], self._states[where, at] = tokens, states

    def read(self, rows: Rows, slots: Sequence[int], most: int) -> Rows | None:
        """What is to be read before rows that are read now.

        All of it counts as read then, also what there is no room for, the earliest of each:
        drafters read without gaps.

        Args:
            rows: of requests in these slots.
            slots: one for each.
            most: rows, of all. Those who need little leave the rest to others.

        Returns:
            Rows of the same requests, None if there are none at all.
        """
        kept = []
        for slot, first, length in zip(slots, self._firsts(rows), rows.lengths):
            self._see(slot, first)
            there = max(self._first[slot], self._end[slot] - self._most)
            # Between what was kept and these rows are others' that came from a cache.
            kept.append(range(there, first) if self._end[slot] >= first else range(0))
            self._first[slot] = first + length
        if not any(kept):
            return None
        earlier, room = list(kept), max(most, 0)
        for number, at in enumerate(sorted(range(len(kept)), key=lambda at: len(kept[at]))):
            share = min(len(kept[at]), room // (len(kept) - number))
            earlier[at] = kept[at][len(kept[at]) - share :]
            room -= share
        if not any(earlier):
            return None
        columns = []
        for slot, positions in zip(slots, earlier):
            there = torch.tensor(positions, dtype=rows.positions.dtype)
            at = there % self._most
            columns.append((self._tokens[slot, at], there, self._states[slot, at]))
        return join(*zip(*columns))

    def _see(self, slot: int, first: int) -> None:
        """From this position on there are rows now, also where there were others before."""
        known = self._first[slot]
        self._first[slot] = first if known is None else min(known, first)

    @staticmethod
    def _firsts(rows: Rows) -> list[int]:
        if len(rows.positions) == len(rows.starts) - 1:
            return rows.positions.tolist()
        return rows.positions[torch.tensor(rows.starts[:-1])].tolist()
