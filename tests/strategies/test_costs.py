from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from taps_hf import Auto, Costs, DraftCost, DynamicTree, measure_costs
from taps_hf.measuring import WIDTHS, learnt_costs, widths_to_measure
from taps_hf.strategies.costs import LearntCosts, ascending

from ..tiny import prompt, tiny_drafters, tiny_target

TREE = DynamicTree(depth=4, top_k=3, num_nodes=20)


def test_passes_are_interpolated_between_and_beyond_what_was_measured():
    costs = Costs(
        ((1, 10.0), (4, 16.0), (8, 36.0)), ((0,),), (DraftCost(1, 2),), (DraftCost(1, 2),)
    )
    for rows, seconds in [(1, 10), (2, 12), (4, 16), (5, 21), (8, 36), (10, 46)]:
        assert costs.target_seconds(rows) == pytest.approx(seconds)
        assert float(costs.up_to(12)[rows - 1]) == pytest.approx(seconds)
    assert Costs(((1, 3.0),), (), (), ()).target_seconds(9) == 3.0


def test_drafters_that_run_as_one_cost_less_than_their_sum():
    one, both, other = DraftCost(1.0, 2.0), DraftCost(1.2, 2.5), DraftCost(3.0, 4.0)
    costs = Costs(((1, 1.0),), ((0, 2), (1,)), (one, other), (both, other))
    assert costs.draft([0]) == costs.draft([2]) == one
    assert costs.draft([0, 2]) == both
    assert costs.draft([1]) == other
    assert costs.draft([0, 1]) == DraftCost(4.0, 6.0)
    assert costs.draft([]) == DraftCost(0.0, 0.0)


def test_measured_once_for_models_and_threads_until_refreshed():
    target = tiny_target()
    drafters = [*tiny_drafters(2), tiny_drafters(1, draft_vocab=6)[0]]
    costs = measure_costs(target, drafters, TREE)
    assert costs.groups == ((0, 1), (2,))
    widths = [rows for rows, _ in costs.target]
    assert widths == sorted([*(rows for rows in WIDTHS if rows < 61), 61])
    seconds = [seconds for _, seconds in costs.target]
    assert seconds[0] > 0
    assert seconds == sorted(seconds)
    assert all(cost.first > 0 and cost.level >= 0 for cost in (*costs.one, *costs.all))
    assert measure_costs(target, drafters, TREE) is costs
    # What is measured depends on shapes, not on weights.
    assert measure_costs(target, [drafters[1], drafters[0], drafters[2]], TREE) is costs
    assert measure_costs(target, drafters[:1], TREE) is not costs
    assert measure_costs(target, drafters, TREE, refresh=True) is not costs


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(9.0, [1, 16, 97]), (0.08, [1, 16, 17, 97]), (0.05, [1, 8, 16, 17, 32, 33, 97])],
)
def test_where_passes_are_long_few_widths_are_measured(seconds, expected):
    """The ends, and then the step from one tile of a matrix unit to two."""
    assert widths_to_measure(97, seconds) == expected


def test_no_pass_takes_longer_than_a_wider_one():
    points = [(1, 2.0), (16, 4.0), (8, 3.0), (17, 2.5)]
    assert ascending(points) == ((1, 2.0), (8, 2.5), (16, 2.5), (17, 2.5))


MEASURED = Costs(
    ((1, 1.0), (16, 1.2), (17, 1.2), (33, 1.3)),
    ((0, 1),),
    (DraftCost(0.1, 0.1),),
    (DraftCost(0.2, 0.2),),
)


def test_proportions_are_learnt_from_what_cycles_take():
    """Whatever the pace of the machine, which doubles and falls again meanwhile."""

    def true_seconds(rows: int) -> float:
        return 1.0 + 0.01 * (rows - 1) + 0.3 * (rows > 16) + 0.3 * (rows > 32)

    learnt = LearntCosts(MEASURED)
    generator = random.Random(0)
    for i in range(400):
        rows, levels = generator.choice((1, 9, 16, 17, 25, 33)), generator.randint(1, 5)
        pace = 1.5 + math.sin(i / 30) + generator.gauss(0, 0.05)
        everyone = i % 8 == 0
        draft = 0.15 * levels * (1 + everyone)
        asked = (0, 1) if everyone else (1,)
        learnt.observe(rows, pace * true_seconds(rows), asked, levels, pace * draft)
    costs = learnt.costs
    scale = costs.target_seconds(16) / true_seconds(16)
    for rows in (1, 17, 33):
        assert costs.target_seconds(rows) / scale == pytest.approx(true_seconds(rows), rel=0.1)
    assert costs.draft([0]).level / scale == pytest.approx(0.15, rel=0.05)
    assert costs.draft([0, 1]).first / scale == pytest.approx(0.3, rel=0.05)
    assert learnt.measured is MEASURED


def test_a_slower_machine_and_interruptions_change_no_proportion():
    learnt = LearntCosts(MEASURED)
    for i in range(50):
        seconds = 3 * MEASURED.target_seconds(17) * (100 if i == 20 else 1)
        learnt.observe(17, seconds, (0,), 2, 3 * 0.2)
    for rows in (1, 16, 17, 33):
        found = learnt.costs.target_seconds(rows)
        assert found == pytest.approx(MEASURED.target_seconds(rows), rel=0.08)


def test_auto_learns_from_its_generations_unless_costs_are_given():
    target, ids, drafters = tiny_target(), prompt(10), tiny_drafters(2)
    speculate = {"max_new_tokens": 12, "assistant_models": drafters, "tree": TREE, "lookup": False}
    before = learnt_costs(target, drafters, TREE, refresh=True).costs
    target.generate(ids, strategy=Auto(costs=before), **speculate)
    assert learnt_costs(target, drafters, TREE).costs == before
    target.generate(ids, strategy="auto", **speculate)
    learnt = learnt_costs(target, drafters, TREE)
    assert learnt.costs != before
    assert learnt.measured == measure_costs(target, drafters, TREE)


def test_measuring_stays_within_the_targets_positions():
    """Dynamic rotary frequencies would change with the first longer sequence, and stay changed."""
    config = copy.deepcopy(tiny_target().config)
    config.max_position_embeddings = 30
    config.rope_parameters = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}
    target = AutoModelForCausalLM.from_config(config).eval()
    before = target.model.rotary_emb.inv_freq.clone()
    measure_costs(target, tiny_drafters(2), TREE)
    assert torch.equal(target.model.rotary_emb.inv_freq, before)


def test_measuring_changes_nothing_that_is_generated():
    target, ids = tiny_target(), prompt(10)
    torch.manual_seed(3)
    expected = target.generate(ids, max_new_tokens=8, do_sample=True)
    torch.manual_seed(3)
    measure_costs(target, tiny_drafters(2), TREE, refresh=True)
    assert torch.equal(target.generate(ids, max_new_tokens=8, do_sample=True), expected)
