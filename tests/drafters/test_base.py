"""The protocol is enough: a drafter of a foreign kind takes part in everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import taps_hf
from taps_hf import ChainTree, DynamicTree, FixedTree
from taps_hf.cache import CACHE
from taps_hf.target import LAST

from ..phrases import Phrases, PhrasesSession
from ..tiny import FAMILIES, prompt, tiny_drafters, tiny_target

COMMON = {"max_new_tokens": 40, "do_sample": False}
TREE = DynamicTree(depth=4, top_k=4, num_nodes=16)
STRATEGIES = [
    "auto",
    "confidence",
    "entropy",
    "merged",
    "single",
    taps_hf.Confidence("prompt"),
    taps_hf.Merged(num_nodes=6),
    taps_hf.Merged(packing="concatenate"),
]


def plain(family: str = "llama") -> list[int]:
    return tiny_target(family).generate(prompt(), **COMMON)[0].tolist()


def half_right(family: str = "llama") -> Phrases:
    """Knows the beginning of the answer, and of another one."""
    right = plain(family)
    return Phrases(right[4:26], [*right[:12], *reversed(right[:12])])


def generate(drafters, family: str = "llama", **kwargs):
    settings = {**COMMON, "tree": TREE, "return_dict_in_generate": True, **kwargs}
    return tiny_target(family).generate(prompt(), assistant_models=drafters, **settings)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_in_every_strategy_beside_feature_drafters(family, strategy):
    drafters = {"phrases": half_right(family), "math": tiny_drafters(1, family)[0]}
    for order in (drafters, dict(reversed(drafters.items()))):
        out = generate(order, family, strategy=strategy, output_draft_trees=True)
        assert out.sequences[0].tolist() == plain(family)
        if strategy not in ("single", "entropy"):  # those may leave it to the random drafter
            assert out.draft_trace.accepted_length > 0


@pytest.mark.parametrize("tree", [TREE, ChainTree(3), FixedTree.from_branching([3, 2])])
def test_alone_without_any_model(tree):
    out = generate(half_right(), tree=tree)
    assert out.sequences[0].tolist() == plain()
    assert out.draft_trace.drafters == ("heart",)
    assert out.draft_trace.accepted_length > 0.5
    assert max(cycle.num_nodes for cycle in out.draft_trace.cycles) <= tree.num_nodes


def test_one_tree_holds_the_proposals_of_both_kinds():
    drafters = [half_right(), tiny_drafters(1)[0]]
    trace = generate(drafters, strategy="merged", output_draft_trees=True).draft_trace
    proposed = {
        cycle.tree.proposers(n) for cycle in trace.cycles for n in range(1, cycle.num_nodes)
    }
    assert {(0,), (1,)} <= proposed


def test_seeded_sampling_is_plain_generates():
    common = {"max_new_tokens": 30, "do_sample": True, "temperature": 2.0}
    found = []
    for drafters in ({}, {"assistant_models": [half_right(), *tiny_drafters(2)]}):
        torch.manual_seed(4)
        found.append(tiny_target().generate(prompt(), **common, **drafters))
    assert torch.equal(*found)


def test_who_has_nothing_to_propose_is_left_out():
    silent = Phrases([1])
    out = generate([silent, tiny_drafters(1)[0]], strategy="merged")
    assert out.sequences[0].tolist() == plain()
    assert {cycle.drafters for cycle in out.draft_trace.cycles if cycle.drafters} == {(1,)}
    alone = generate(silent)
    assert alone.sequences[0].tolist() == plain()
    assert alone.draft_trace.accepted_length == 0


def test_all_tokens_reach_it_in_order():
    """The first one, and those of an earlier turn that the target does not run again."""
    heard = {}

    class Listening(Phrases):
        @classmethod
        def start(cls, drafters, target):
            session = super().start(drafters, target)
            heard["text"] = session.text
            return session

    listening = Listening([1])
    first = generate(listening)
    assert heard["text"] == plain()
    cache = first[CACHE]
    longer = torch.cat([first.sequences, prompt(5, seed=9)], dim=1)
    for known in (True, False):  # found again by the cache, or not
        if not known:
            copied = DynamicCache(config=tiny_target().config)
            tiny_target()(longer[:, :20], **{CACHE: copied})
            cache = copied
        out = tiny_target().generate(longer, assistant_models=listening, **COMMON, **{CACHE: cache})
        assert heard["text"][-len(out[0]) :] == out[0].tolist()


@pytest.mark.parametrize("hidden", [[0], [3, 4], [8], [7, 8]], ids=str)
def test_the_last_token_is_heard_whatever_the_mask_says(hidden: list[int]):
    """The answer goes on from it; what a mask hides before it is no text."""
    heard = []

    class Listening(Phrases):
        reads_layers = (1,)

        @classmethod
        def start(cls, drafters, target):
            return ListeningSession(drafters[0])

    class ListeningSession(PhrasesSession):
        def observe(self, tokens, states):
            super().observe(tokens, states)
            heard.append((len(tokens), len(states[1])))

    mask = torch.ones_like(prompt())
    mask[0, hidden] = 0
    common = {**COMMON, "attention_mask": mask}
    out = tiny_target().generate(prompt(), assistant_models=Listening(plain()), **common)
    shown = 9 - len([place for place in hidden if place < 8])
    assert heard[0] == (shown, shown - 1)
    assert all(tokens == states for tokens, states in heard[1:])
    assert torch.equal(out, tiny_target().generate(prompt(), **common))


def test_it_cannot_sample_proposals():
    with pytest.raises(ValueError, match="heart cannot sample proposals"):
        taps_hf.SpeculativeDecoding(
            [half_right()], "single", ChainTree(2), verification="rejection"
        )


def test_layers_that_a_target_does_not_have():
    class Deep(Phrases):
        reads_layers = (0, 5, LAST)

    with pytest.raises(ValueError, match=r"layers \[5\]"):
        generate(Deep([1, 2]))


def test_the_layers_asked_for_are_given():
    found = []

    class Reading(Phrases):
        reads_layers = (0, LAST)

        @classmethod
        def start(cls, drafters, target):
            session = super().start(drafters, target)
            session.observe = lambda tokens, states: found.append((tokens, states))
            session.propose = lambda rows, request: {}
            return session

    generate(Reading([1, 2]), max_new_tokens=6)
    with torch.no_grad():
        hidden = tiny_target()(torch.tensor([plain()[:14]]), output_hidden_states=True)
    for layer, expected in ((0, hidden.hidden_states[1][0]), (LAST, hidden.hidden_states[-1][0])):
        states = torch.cat([states[layer] for _, states in found])
        torch.testing.assert_close(states, expected, rtol=1e-3, atol=1e-4)
    assert torch.cat([tokens for tokens, _ in found]).tolist() == plain()[:15]


def test_costs_are_measured_for_every_kind():
    drafters = [half_right(), *tiny_drafters(2)]
    costs = taps_hf.measure_costs(tiny_target(), drafters, TREE)
    assert costs.groups == ((0,), (1, 2))
    assert all(cost.first > 0 for cost in costs.one)


def test_new_drafters_have_costs_of_their_own():
    """Even where they stand in memory where others stood."""
    keys = set()
    for number in range(20):
        drafter = Phrases([number])
        keys.add(drafter.run_key())
        assert drafter.run_key() in keys
        del drafter
    assert len(keys) == 20


def test_trees_are_alike_in_what_they_know():
    """Whatever a kind of drafter knows of entropies, trees of several kinds can be merged."""

    class Knowing(Phrases):
        @classmethod
        def start(cls, drafters, target):
            session = super().start(drafters, target)
            propose = session.propose

            def known(rows, request):
                found = propose(rows, request)
                entropy = torch.zeros_like(found[0].confidence)
                return {0: replace(found[0], entropy=entropy)}

            session.propose = known
            return session

    knowing = Knowing(*half_right().phrases)
    for wanted in (False, True):
        out = generate([knowing, tiny_drafters(1)[0]], strategy="merged", output_draft_trees=wanted)
        assert out.sequences[0].tolist() == plain()


def test_results_of_a_drafter_that_does_not_say_what_it_is():
    class Nameless(Phrases):
        __repr__ = object.__repr__

    assert half_right().digest() == half_right().digest() != Phrases([1]).digest()
    with pytest.raises(ValueError, match="Nameless has neither"):
        Nameless([1]).digest()
