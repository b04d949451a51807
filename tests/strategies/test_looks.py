from __future__ import annotations

import torch

from taps_hf import Costs, DraftCost, DraftTree
from taps_hf.strategies.looks import Look, Looks

NAN = float("nan")


def costs(rows: float, draft: float = 0.0) -> Costs:
    each = DraftCost(draft, draft)
    return Costs(((1, 1.0), (2, 1.0 + rows)), ((0,), (1,)), (each, each), (each, each))


def test_a_look_says_what_fewer_drafters_would_have_had():
    #  root -> 1 (both) -> 2 (drafter 1) -> 3 (drafter 1); 4 (drafter 0) beside 1
    known = torch.tensor([[1, 0.5, NAN, NAN, 0.2], [1, 0.5, 0.4, 0.3, NAN]])
    parents, depths = torch.tensor([-1, 0, 1, 2, 0]), torch.tensor([0, 1, 2, 3, 1])
    tree = DraftTree(torch.arange(5), parents, depths, known, known)
    look = Look.of(((0, 1), (1,)), tree)
    assert [look.accepted(asked) for asked in [(0,), (1,), (0, 1)]] == [1, 2, 2]
    assert [look.nodes(asked) for asked in [(0,), (1,), (0, 1), ()]] == [2, 3, 4, 0]


def test_a_drafter_that_brings_less_than_its_nodes_cost_does_not_run():
    """In one of ten looks the first drafter has a token more, in all of them three nodes more."""
    nodes = ((frozenset({0}), 3), (frozenset({1}), 3))
    for rows, fastest in ((0.12, (1,)), (0.01, (0, 1))):
        looks = Looks(costs(rows))
        for number in range(10):
            looks.add(Look(((1,), (0,)) if number == 5 else ((1,),), nodes))
        assert looks.fastest((0, 1), levels=3.0) == fastest


def test_nobody_runs_where_plain_steps_are_faster():
    looks = Looks(costs(0.1, draft=5.0))
    looks.add(Look(((0,),), ((frozenset({0}), 3),)))
    assert looks.fastest((0, 1), levels=2.0) == ()


def test_later_looks_weigh_more_and_old_ones_are_forgotten():
    looks = Looks(costs(0.0))
    for number in range(40):
        looks.add(Look(((int(number >= 20),),)))
        if number in (19, 21, 39):
            rates = [looks.rate((index,), levels=1.0) for index in (0, 1)]
            assert (rates[1] > rates[0]) == (number == 39)
    assert rates[0] == 1.0
    assert len(looks) == 12
    looks.clear()
    assert len(looks) == 0
