from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from taps_hf import Costs, DraftCost, DynamicTree, measure_costs
from taps_hf.costs import _WIDTHS

from .tiny import prompt, tiny_drafters, tiny_target

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
    assert widths == sorted([*(rows for rows in _WIDTHS if rows < 61), 61])
    seconds = [seconds for _, seconds in costs.target]
    assert seconds[0] > 0
    assert seconds == sorted(seconds)
    assert all(cost.first > 0 and cost.level >= 0 for cost in (*costs.one, *costs.all))
    assert measure_costs(target, drafters, TREE) is costs
    # What is measured depends on shapes, not on weights.
    assert measure_costs(target, [drafters[1], drafters[0], drafters[2]], TREE) is costs
    assert measure_costs(target, drafters[:1], TREE) is not costs
    assert measure_costs(target, drafters, TREE, refresh=True) is not costs


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
