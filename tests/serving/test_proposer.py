"""What the proposer hears of its last drafts, without an engine."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch

from .served import needs_vllm

pytestmark = needs_vllm


def test_what_became_of_drafts_is_heard_by_request_wherever_it_stands_now():
    """One request has left, one is new, one had its draft cut, and the order is another."""
    from taps_hf.serving.proposer import ComposedProposer

    heard, counted = [], []

    def noted(where: list) -> Callable[..., None]:
        return lambda *given: where.append([x.tolist() for x in given])

    proposer = ComposedProposer.__new__(ComposedProposer)
    proposer.device = torch.device("cpu")
    proposer.runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["d", "c", "new", "a"]))
    proposer._rows = {"a": 0, "b": 1, "c": 2, "d": 3}
    proposer._picks = [torch.tensor([0, 1, 0, 1]), torch.tensor([1, 1, 0, 0])]
    proposer._last = torch.tensor([[10, 11], [20, 21], [30, 31], [40, 41]])
    proposer._tally = SimpleNamespace(
        add=lambda *given: counted.append([x.tolist() for x in given])
    )
    proposer.model = SimpleNamespace(
        router=SimpleNamespace(hear=lambda *given: heard.append([x.tolist() for x in given]))
    )
    # Of "c" nothing was verified; of "d" one token was accepted, of "a" none.
    proposer._count([2, 0, 0, 1], torch.tensor([1, 0, 0, 0]))
    assert counted == [[[[1, 0], [0, 1]], [2, 1], [1, 0]]]
    slots, own = torch.tensor([7, 5, 6, 4]), torch.tensor([49, 39, 59, 19])
    proposer._hear(slots, proposer._verified, own)
    assert heard == [[[3, 0], [7, 4], [40, 19]]]  # what was drafted where it was right, or the own
