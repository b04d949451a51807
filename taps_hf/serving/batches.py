"""What drafters read of a batch: its rows, and what vLLM's attention is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Rows:
    """Rows of a batch's requests, one request after the other.

    Args:
        starts: where the rows of each of n requests begin, and where the last one's end: n + 1.
        tokens: (T,) integers: that the target read.
        positions: (T,) integers: in the texts, without gaps in a request.
        states: (T, size): that the target had there.
    """

    starts: list[int]
    tokens: torch.Tensor
    positions: torch.Tensor
    states: torch.Tensor

    @property
    def lengths(self) -> list[int]:
        """How many each request has."""
        return [end - start for start, end in zip(self.starts, self.starts[1:])]

    def of(self, which: Sequence[int]) -> Rows:
        """Those of some requests, in their order, each of which has some."""
        parts = [slice(self.starts[at], self.starts[at + 1]) for at in which]
        return join(*([x[part] for part in parts] for x in self._columns))

    def after(self, earlier: Rows) -> Rows:
        """Of each request its earlier rows, of which there may be none, and then these."""
        columns = []
        for before, here in zip(earlier._columns, self._columns):
            pairs = zip(before.split(earlier.lengths), here.split(self.lengths))
            columns.append([torch.cat(pair) for pair in pairs])
        return join(*columns)

    @property
    def _columns(self) -> tuple[torch.Tensor, ...]:
        return self.tokens, self.positions, self.states


def join(
    tokens: Sequence[torch.Tensor],
    positions: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
) -> Rows:
    """Rows of the tensors of each request."""
    starts = [0]
    for each in tokens:
        starts.append(starts[-1] + len(each))
    return Rows(starts, torch.cat(tuple(tokens)), torch.cat(tuple(positions)), torch.cat(states))


@dataclass(frozen=True)
class Batch:
    """What the older runner gives its proposer of n requests.

    Args:
        rows: that are read.
        next_tokens: (n,) integers: what follows them.
        sample_at: (n,) integers: the row of each after which is drafted; None for the last one.
        rejected: (n,) integers: rows at each one's end that are not of its text; None for none.
        metadata: vLLM's `CommonAttentionMetadata`.
    """

    rows: Rows
    next_tokens: torch.Tensor
    sample_at: torch.Tensor | None
    rejected: torch.Tensor | None
    metadata: Any

    def of(self, which: Sequence[int], block_size: int) -> Batch:
        """Some of its requests.

        Args:
            which: in their order, at least one.
            block_size: of the drafters' keys and values.
        """
        rows, some = self.rows.of(which), torch.tensor(which)
        meta, upper = self.metadata, self.metadata.seq_lens_cpu_upper_bound
        narrow = replace(
            meta,
            num_reqs=len(which),
            seq_lens=meta.seq_lens[some],
            seq_lens_cpu_upper_bound=None if upper is None else upper[some],
            block_table_tensor=meta.block_table_tensor[some],
        )
        moved = torch.tensor(rows.starts[:-1]) - torch.tensor(self.rows.starts)[some]
        return Batch(
            rows,
            self.next_tokens[some],
            None if self.sample_at is None else (self.sample_at[some] + moved).int(),
            None if self.rejected is None else self.rejected[some],
            _of_rows(narrow, rows, block_size),
        )

    def after(self, earlier: Rows, block_size: int) -> Batch:
        """The same requests, of which earlier rows are read, too."""
        rows = self.rows.after(earlier)
        moved = torch.tensor(earlier.lengths).cumsum(0)
        return replace(
            self,
            rows=rows,
            sample_at=None if self.sample_at is None else (self.sample_at + moved).int(),
            metadata=_of_rows(self.metadata, rows, block_size),
        )


def _of_rows(metadata: Any, rows: Rows, block_size: int) -> Any:
    """The same requests' metadata with other rows; each one's last row stays where it was."""
    starts, lengths = torch.tensor(rows.starts, dtype=torch.int32), torch.tensor(rows.lengths)
    request = torch.arange(len(lengths)).repeat_interleave(lengths)
    positions = rows.positions.long()
    blocks = metadata.block_table_tensor[request, positions // block_size].long()
    return replace(
        metadata,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        num_actual_tokens=rows.starts[-1],
        max_query_len=max(rows.lengths),
        slot_mapping=blocks * block_size + positions % block_size,
    )
