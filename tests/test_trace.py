"""The record of a generation agrees with what was generated."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation import GenerateDecoderOnlyOutput

import taps_hf
from taps_hf.trace import first_difference
from tests.tiny import prompt, tiny_drafters, tiny_target

WIDE = taps_hf.DynamicTree(depth=4, top_k=6, num_nodes=30)


@pytest.fixture(scope="module")
def output() -> taps_hf.SpeculativeDecoderOnlyOutput:
    torch.manual_seed(0)
    return tiny_target().generate(
        prompt(),
        max_new_tokens=40,
        do_sample=True,
        temperature=2.0,
        assistant_models={"math": tiny_drafters(2)[0], "chat": tiny_drafters(2)[1]},
        strategy="merged",
        tree=WIDE,
        return_dict_in_generate=True,
        output_draft_trees=True,
    )


def test_tokens_are_the_sequence(output):
    assert isinstance(output, GenerateDecoderOnlyOutput)
    tokens = [token.token for token in output.draft_trace.emitted]
    assert output.sequences[0, 9:].tolist() == tokens


def test_paths_and_origins_agree_with_the_trees(output):
    position = 8
    for cycle in output.draft_trace.cycles:
        tree, at = cycle.tree, 0
        assert int(tree.tokens[0]) == int(output.sequences[0, position])
        assert cycle.num_nodes == len(tree) - 1
        for node, token in zip(cycle.path, cycle.emitted):
            assert int(tree.parents[node]) == at
            assert (int(tree.tokens[node]), int(tree.depths[node])) == (token.token, token.depth)
            by = [d for d in range(2) if not math.isnan(tree.confidence[d, node])]
            assert list(token.drafters) == by
            assert token.confidence == tuple(tree.confidence[by, node].tolist())
            assert token.entropy == tuple(tree.entropy[by, node].tolist())
            at = node
        # The token after the path is the target's own: no child of the last node carries it.
        for token in cycle.emitted[len(cycle.path) :]:
            assert (token.depth, token.drafters) == (None, ())
            children = tree.tokens[tree.parents == at].tolist()
            assert token.token not in children
        position += len(cycle.emitted)


def test_verdicts_of_nodes(output):
    for cycle in output.draft_trace.cycles:
        path, parents = [0, *cycle.path], cycle.tree.parents.tolist()
        for node, verdict in enumerate(cycle.verdicts):
            if node in path:
                assert verdict == "accepted"
            elif parents[node] not in path:
                assert verdict == "unreached"
            elif len(cycle.emitted) > len(cycle.path):
                assert verdict == "rejected"
            else:  # the answer ended with an accepted token: below it nothing was decided
                assert verdict == ("unreached" if parents[node] == path[-1] else "rejected")
    with pytest.raises(ValueError, match="output_draft_trees"):
        _ = taps_hf.CycleTrace((0,), 1, (), (), 0.1, 0.1, 0.1).verdicts


def test_summary_figures(output):
    trace = output.draft_trace
    accepted = sum(len(cycle.path) for cycle in trace.cycles)
    assert trace.tau == 40 / len(trace.cycles)
    assert trace.accepted_length == accepted / len(trace.cycles)
    assert accepted > 0
    shares = trace.origin_share
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares[()] == pytest.approx(1 - accepted / 40)
    # Acceptance at depth 1, counted by hand.
    first = [cycle.accepted_length > 0 for cycle in trace.cycles if cycle.drafters]
    assert trace.acceptance_by_depth[1] == sum(first) / len(first)
    summary = trace.summary()
    assert set(summary["origin_share"]) <= {"math", "chat", "math + chat", "target"}
    assert all(seconds > 0 for seconds in summary["seconds"].values())


def test_trees_and_entropies_only_on_request():
    out = tiny_target().generate(
        prompt(),
        max_new_tokens=12,
        assistant_models=tiny_drafters(2),
        strategy="merged",
        return_dict_in_generate=True,
    )
    assert all(cycle.tree is None for cycle in out.draft_trace.cycles)
    assert all(token.entropy == () for token in out.draft_trace.emitted)
    assert out.draft_trace.drafters == ("drafter 0", "drafter 1")


def test_a_stop_inside_a_path_is_not_a_rejection():
    cycle = taps_hf.CycleTrace(
        (0,),
        3,
        (1, 2),
        tuple(taps_hf.EmittedToken(t, t, (0,), (0.5,), ()) for t in (1, 2)),
        0.1,
        0.1,
        0.1,
    )
    trace = taps_hf.DraftTrace(("d",), [cycle])
    assert trace.acceptance_by_depth == {1: 1.0, 2: 1.0}
    assert (trace.tau, trace.accepted_length) == (2.0, 2.0)


def test_packing_does_not_change_whose_a_token_is():
    """Side by side, what both drafters proposed stands twice; it is both drafters' all the same."""
    records = []
    for packing in ("union", "concatenate"):
        out = tiny_target().generate(
            prompt(),
            max_new_tokens=40,
            do_sample=False,
            assistant_models=tiny_drafters(2),
            strategy=taps_hf.Merged(packing=packing),
            tree=WIDE,
            return_dict_in_generate=True,
        )
        records.append([(t.token, t.depth, t.drafters) for t in out.draft_trace.emitted])
        confidences = [t.confidence for t in out.draft_trace.emitted]
        assert all(len(c) == len(r[2]) for c, r in zip(confidences, records[-1]))
    assert records[0] == records[1]
    assert any(drafters == (0, 1) for *_, drafters in records[0])


def test_nothing_is_recorded_unless_asked_for():
    out = tiny_target().generate(prompt(), max_new_tokens=4, assistant_models=tiny_drafters(1))
    assert isinstance(out, torch.Tensor)


@pytest.mark.parametrize("enabled", [True, False])
def test_on_cycle_sees_every_cycle_as_it_ends(enabled):
    """With `return_dict_in_generate` or without, by either way in; trees on request."""
    seen: list[taps_hf.CycleTrace] = []
    settings = {"strategy": "merged", "tree": WIDE, "on_cycle": seen.append}
    if enabled:
        how = {"assistant_models": tiny_drafters(2), **settings, "output_draft_trees": True}
    else:
        taps_hf.disable()
        how = {"custom_generate": taps_hf.SpeculativeDecoding(tiny_drafters(2), **settings)}
    common = {"max_new_tokens": 20, "do_sample": False}
    plain = tiny_target().generate(prompt(), **common)
    ours = tiny_target().generate(prompt(), **common, **how)
    assert torch.equal(plain, ours)
    assert [t.token for cycle in seen for t in cycle.emitted] == ours[0, 9:].tolist()
    assert all((cycle.tree is not None) == enabled for cycle in seen)
    if enabled:
        out = tiny_target().generate(prompt(), **common, **how, return_dict_in_generate=True)
        assert seen[-len(out.draft_trace.cycles) :] == out.draft_trace.cycles


def test_what_on_cycle_raises_ends_the_generation():
    def stop(cycle):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        tiny_target().generate(
            prompt(), max_new_tokens=20, assistant_models=tiny_drafters(1), on_cycle=stop
        )
    with pytest.raises(ValueError, match="`on_cycle` is 3, expected a function"):
        taps_hf.SpeculativeDecoding(tiny_drafters(1), on_cycle=3)


def test_first_difference():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
