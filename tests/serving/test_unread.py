"""Rows that are kept and read later, against whole texts."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from taps_hf.serving.batches import Batch, Rows, join
from taps_hf.serving.unread import Unread

SIZE, BLOCK = 3, 4


@dataclass
class Text:
    """A request's text, and what a drafter that reads everything at once would have."""

    slot: int
    tokens: list[int] = field(default_factory=list)
    passed: int = 0  # of them by the target
    most: int = 0  # that were ever kept
    read: dict[int, int] = field(default_factory=dict)

    def rows(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        at = torch.arange(start, end)
        return torch.tensor(self.tokens[start:end]), at, _states(self.slot, at)


def _states(slot: int, positions: torch.Tensor) -> torch.Tensor:
    return positions[:, None] * 100.0 + slot + torch.arange(SIZE) / 10


def _batch(texts: list[Text], starts: list[int], ends: list[int]) -> Rows:
    each = (text.rows(start, end) for text, start, end in zip(texts, starts, ends))
    return join(*zip(*each))


@pytest.mark.parametrize("most", [5, 1000])
def test_all_of_a_text_is_read_in_the_end_but_what_is_no_longer_kept(most):
    """Chunks of any size, tokens that are taken back, some read and some kept, texts that end."""
    choose, unread = random.Random(0), Unread(3, most)
    texts = [Text(slot) for slot in range(3)]
    for _ in range(300):
        here = [text for text in texts if choose.random() < 0.8]
        if not here:
            continue
        for text in here:
            if choose.random() < 0.05:  # another request in its place
                text.tokens, text.passed, text.most, text.read = [], 0, 0, {}
                unread.forget([text.slot])
            elif text.passed and choose.random() < 0.3:  # rejected: other tokens there
                text.passed -= choose.randrange(1, min(3, text.passed) + 1)
            del text.tokens[text.passed :]
            text.tokens += [choose.randrange(100) for _ in range(choose.choice([1, 1, 2, 9]))]
        starts, ends = ([*x] for x in zip(*((text.passed, len(text.tokens)) for text in here)))
        rows, slots = _batch(here, starts, ends), [text.slot for text in here]
        for text, end in zip(here, ends):
            text.passed = end
        if choose.random() < 0.6:
            unread.keep(rows, slots)
            for text, start in zip(here, starts):
                text.most = max(text.most, text.passed)
                text.read = {at: token for at, token in text.read.items() if at < start}
            continue
        earlier = unread.read(rows, slots, 10**6)
        whole = rows if earlier is None else rows.after(earlier)
        assert whole.starts[0] == 0
        assert whole.starts[-1] == len(whole.tokens)
        for at, (text, start) in enumerate(zip(here, starts, strict=True)):
            part = slice(whole.starts[at], whole.starts[at + 1])
            positions = whole.positions[part]
            assert positions.tolist() == list(range(int(positions[0]), text.passed))
            torch.testing.assert_close(whole.states[part], _states(text.slot, positions))
            expected = [text.tokens[i] for i in positions.tolist()]
            assert whole.tokens[part].tolist() == expected
            text.read.update(zip(positions.tolist(), expected))
            needed = range(min(max(0, text.most - most), start), text.passed)
            assert {i: text.tokens[i] for i in needed}.items() <= text.read.items()
            for lost in range(needed.start):  # it is never read
                text.read[lost] = text.tokens[lost]


def test_no_more_is_read_than_there_is_room_for():
    unread, texts = Unread(2, 100), [Text(0, [*range(50)]), Text(1, [*range(50)])]
    unread.keep(_batch(texts, [0, 0], [40, 30]), [0, 1])
    rows = _batch(texts, [40, 30], [41, 31])
    earlier = unread.read(rows, [0, 1], 21)
    assert earlier.positions.tolist() == [*range(29, 40), *range(20, 30)]
    assert unread.read(_batch(texts, [41, 31], [42, 32]), [0, 1], 21) is None  # read, or given up


def test_who_needs_little_leaves_room_to_others():
    unread, texts = Unread(3, 100), [Text(slot, [*range(60)]) for slot in range(3)]
    unread.keep(_batch(texts, [0, 7, 0], [40, 10, 50]), [0, 1, 2])
    rows = _batch(texts, [40, 10, 50], [41, 11, 51])
    earlier = unread.read(rows, [0, 1, 2], 63)
    assert earlier.lengths == [30, 3, 30]
    assert earlier.positions.tolist() == [*range(10, 40), 7, 8, 9, *range(20, 50)]
    unread.keep(_batch(texts, [41, 11, 51], [42, 12, 52]), [0, 1, 2])
    assert unread.read(_batch(texts, [42, 12, 52], [43, 13, 53]), [0, 1, 2], 0) is None


def test_nothing_is_made_up_between_two_times_that_rows_were_kept():
    unread, text = Unread(1, 100), Text(0, [*range(50)])
    unread.keep(_batch([text], [0], [10]), [0])
    unread.keep(_batch([text], [32], [40]), [0])
    earlier = unread.read(_batch([text], [40], [41]), [0], 100)
    assert earlier.positions.tolist() == [*range(32, 40)]


def test_what_came_from_a_cache_is_not_read():
    """A request that was put off comes back with more than it had: others have had its prompt."""
    unread, text = Unread(1, 100), Text(0, [*range(50)])
    unread.keep(_batch([text], [0], [10]), [0])
    assert unread.read(_batch([text], [32], [40]), [0], 100) is None
    unread.keep(_batch([text], [40], [41]), [0])
    earlier = unread.read(_batch([text], [41], [42]), [0], 100)
    assert earlier.positions.tolist() == [40]


def test_a_batch_of_some_requests_with_earlier_rows_reads_and_drafts_at_the_same_places():
    """Written down row by row; blocks of keys and values lie anywhere."""
    texts = [Text(slot, [*range(slot * 100, slot * 100 + 40)]) for slot in range(3)]
    starts, ends = [9, 17, 6], [12, 18, 10]
    rows = _batch(texts, starts, ends)
    blocks = torch.randperm(30, generator=torch.Generator().manual_seed(0)).view(3, 10).int()
    sample_at = torch.tensor(rows.starts[1:], dtype=torch.int32) - torch.tensor([2, 1, 3]).int()
    metadata = Metadata(
        num_reqs=3,
        seq_lens=torch.tensor(ends),
        seq_lens_cpu_upper_bound=None,
        block_table_tensor=blocks,
    )
    batch = Batch(rows, torch.tensor([1, 2, 3]), sample_at, torch.tensor([1, 0, 2]), metadata)
    unread = Unread(3, 100)
    unread.keep(_batch([texts[0], texts[2]], [2, 0], [9, 6]), [0, 2])
    some = batch.of([0, 2], BLOCK)
    found = some.after(unread.read(some.rows, [0, 2], 100), BLOCK)
    firsts, lasts = {0: 2, 2: 0}, {0: 12, 2: 10}
    every = [(slot, at) for slot in (0, 2) for at in range(firsts[slot], lasts[slot])]
    assert found.rows.tokens.tolist() == [texts[slot].tokens[at] for slot, at in every]
    assert found.rows.positions.tolist() == [at for _, at in every]
    for row, slot, before in zip(found.sample_at.tolist(), (0, 2), (2, 3)):
        assert every[row] == (slot, lasts[slot] - before)
    assert found.next_tokens.tolist() == [1, 3]
    assert found.rejected.tolist() == [1, 2]
    said = found.metadata
    assert said.query_start_loc.tolist() == said.query_start_loc_cpu.tolist() == [0, 10, 20]
    assert (said.num_reqs, said.num_actual_tokens, said.max_query_len) == (2, 20, 10)
    assert said.seq_lens.tolist() == [12, 10]
    assert said.slot_mapping.tolist() == [
        int(blocks[slot, at // BLOCK]) * BLOCK + at % BLOCK for slot, at in every
    ]


@dataclass(frozen=True)
class Metadata:
    """What is used of vLLM's."""

    num_reqs: int
    seq_lens: torch.Tensor
    seq_lens_cpu_upper_bound: torch.Tensor | None
    block_table_tensor: torch.Tensor
    query_start_loc: torch.Tensor | None = None
    query_start_loc_cpu: torch.Tensor | None = None
    num_actual_tokens: int = 0
    max_query_len: int = 0
    slot_mapping: torch.Tensor | None = None
