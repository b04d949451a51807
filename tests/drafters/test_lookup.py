from __future__ import annotations

import random

import pytest
import torch
from transformers import LogitsProcessorList

import taps_hf
from taps_hf import DraftRequest, DraftTree, DynamicTree, FixedTree, PromptLookup
from taps_hf.drafters.lookup import LEAST, LookupSession, likeliest
from taps_hf.drafters.suffixes import SuffixAutomaton

from ..tiny import FAMILIES, VOCAB, prompt, refused, tiny_drafters, tiny_target


def session(text: list[int], drafter: PromptLookup | None = None):
    drafter = drafter or PromptLookup()
    found = PromptLookup.start([drafter], tiny_target())
    found.observe(torch.tensor(text), {})
    return found


def propose(found, root: int, num_nodes: int = 48, max_depth: int = 99) -> DraftTree | None:
    shape = DynamicTree(8, 8, num_nodes)
    return found.propose([0], DraftRequest(torch.tensor([root]), shape, max_depth)).get(0)


def paths(tree: DraftTree) -> dict[tuple[int, ...], float]:
    """The confidence in each node by its path."""
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens.tolist()[1:], tree.parents.tolist()[1:]):
        found.append((*found[parent], token))
    return dict(zip(found, tree.confidence[0].tolist()))


def test_what_stood_after_the_longest_match_comes_first_whatever_is_more_frequent():
    text = [1, 2, 3, 4, 9, 3, 5, 9, 3, 5, 9, 3, 5, 0, 1, 2, 3]
    tree = propose(session(text), 3)
    (first,) = (tree.tokens[tree.parents == 0][:1]).tolist()
    assert first == 4
    assert (5,) in paths(tree)


def test_a_tree_holds_several_continuations_the_more_frequent_the_surer():
    text = [1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2]
    known = paths(propose(session(text), 2))
    assert 0 < known[(4,)] < known[(3,)] < 1


def test_a_longer_match_is_surer():
    generator = random.Random(0)
    said = [generator.randrange(10_000) for _ in range(40)]
    sure = []
    for size in (1, 2, 4, 8, 16, 32):
        tree = propose(session([*said, -1, *said[:size]]), said[size - 1])
        sure.append(paths(tree)[(said[size],)])
    assert sure == sorted(set(sure))


def test_a_repeated_text_is_a_long_chain_and_a_new_one_nothing():
    text = list(range(40))
    tree = propose(session([*text, *text[:20]]), 19, num_nodes=16)
    assert tree.tokens.tolist()[1:] == text[20:36]
    assert tree.parents.tolist() == list(range(-1, 16))
    assert propose(session(text), 39) is None


def test_trees_are_well_formed_and_keep_to_their_limits():
    generator = random.Random(1)
    for _ in range(60):
        text = [generator.randrange(4) for _ in range(generator.randrange(1, 60))]
        nodes, depth = generator.randrange(1, 30), generator.randrange(1, 12)
        tree = propose(session(text), text[-1], nodes, depth)
        if tree is None:
            continue
        assert 1 <= len(tree) - 1 <= nodes
        assert tree.max_depth <= depth
        assert (tree.depths[1:] == tree.depths[tree.parents[1:]] + 1).all()
        assert (tree.parents[1:] < torch.arange(1, len(tree))).all()
        assert len(paths(tree)) == len(tree)  # siblings are distinct
        assert ((tree.confidence[0, 1:] > 0) & (tree.confidence[0, 1:] < 1)).all()
        products = tree.path_confidence[0, tree.parents[1:]] * tree.confidence[0, 1:]
        torch.testing.assert_close(tree.path_confidence[0, 1:], products)
        assert (tree.path_confidence >= LEAST * 0.999).all()
        below = torch.zeros(len(tree)).index_add_(0, tree.parents[1:], tree.confidence[0, 1:])
        assert (below <= 1.001).all()


def test_more_nodes_are_the_same_and_others():
    text = [random.Random(2).randrange(3) for _ in range(50)]
    few, many = (propose(session(text), text[-1], size) for size in (6, 20))
    assert paths(few).items() <= paths(many).items()


def test_the_likeliest_continuation_is_a_path_of_the_tree():
    """Of every node the likeliest child, as far as trees have any."""
    generator = random.Random(3)
    for _ in range(50):
        text = [generator.randrange(4) for _ in range(generator.randrange(1, 40))]
        automaton = SuffixAutomaton()
        for token in text:
            automaton.add(token)
        found = likeliest(automaton, 5)
        tree = propose(session(text), text[-1], num_nodes=4000, max_depth=5)
        known = {} if tree is None else paths(tree)
        path: tuple[int, ...] = ()
        for token, sure in found:
            beside = {p[-1]: c for p, c in known.items() if p[:-1] == path and len(p) > len(path)}
            path = (*path, token)
            if not beside:
                break  # less likely than what trees hold
            assert beside[token] == max(beside.values()) == pytest.approx(sure)
        assert bool(found) == (tree is not None)


def test_shorter_matches_than_wanted_propose_nothing():
    text = [1, 2, 3, 9, 2, 3]
    assert paths(propose(session(text), 3))
    assert paths(propose(session(text, PromptLookup(min_match=2)), 3))
    assert propose(session(text, PromptLookup(min_match=3)), 3) is None


def test_hearing_bit_by_bit_or_after_taking_back_is_hearing_at_once():
    generator = random.Random(3)
    text = [generator.randrange(3) for _ in range(40)]
    at_once = paths(propose(session(text), text[-1]))
    bits = session(text[:5])
    for token in text[5:]:
        propose(bits, -1)
        bits.observe(torch.tensor([token]), {})
    assert paths(propose(bits, text[-1])) == at_once
    taken_back = session([*text[:30], 7, 7, 7])
    propose(taken_back, 7)
    taken_back.observe(torch.tensor([7, 7]), {})
    assert taken_back.forget(5)
    taken_back.observe(torch.tensor(text[30:]), {})
    assert paths(propose(taken_back, text[-1])) == at_once


def test_all_of_a_text_cannot_be_taken_back():
    assert not session([1, 2, 1]).forget(3)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", True])
def test_matches_are_positive_numbers(wrong):
    with pytest.raises(ValueError, match="min_match"):
        PromptLookup(min_match=wrong)


def test_those_of_equal_settings_cost_the_same():
    assert PromptLookup(2).run_key() == PromptLookup(2).run_key() != PromptLookup(3).run_key()
    assert PromptLookup(2).digest() == PromptLookup(2).digest() != PromptLookup(3).digest()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["single", "auto"])
def test_the_text_is_plain_generates(family, strategy):
    target, inputs = tiny_target(family), prompt(9)
    for sample in ({}, {"do_sample": True, "temperature": 0.7}):
        texts = []
        for drafters in ({}, {"assistant_models": PromptLookup(), "strategy": strategy}):
            torch.manual_seed(0)
            texts.append(target.generate(inputs, max_new_tokens=60, **sample, **drafters).tolist())
        assert texts[0] == texts[1]


def test_a_lookup_is_right_where_an_answer_repeats():
    """A model that counts, from the last of its tokens to the first again."""

    def count(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, (input_ids[0, -1:] + 1) % VOCAB, 1e4)

    out = tiny_target().generate(
        prompt(9),
        max_new_tokens=120,
        logits_processor=LogitsProcessorList([count]),
        assistant_models=PromptLookup(),
        strategy="single",
        tree=DynamicTree(8, 8, 15),
        return_dict_in_generate=True,
    )
    assert out.draft_trace.drafters == ("lookup",)
    assert out.draft_trace.tau > 4


def test_any_target_can_be_answered_without_a_drafter():
    out = tiny_target().generate(
        prompt(9), max_new_tokens=40, assistant_models=[], return_dict_in_generate=True
    )
    assert out.draft_trace.drafters == ("lookup",)
    refused("no `lookup` was asked for", assistant_models=[], lookup=False)
    refused("no `lookup` was asked for", assistant_models=[], strategy="merged")


def test_auto_adds_a_lookup_unless_there_is_one_or_it_is_not_wanted():
    own = PromptLookup(2)
    for given, settings, names in [
        (["a", "b"], {}, ("a", "b", "lookup")),
        (["a", "b"], {"lookup": False}, ("a", "b")),
        (["a", "lookup"], {}, ("a", "lookup", "lookup (1)")),
        (["a", "b"], {"strategy": "merged"}, ("a", "b")),
        (["a", "b"], {"strategy": "merged", "lookup": True}, ("a", "b", "lookup")),
        (["a"], {}, ("a",)),
    ]:
        drafters = dict(zip(given, tiny_drafters(2)))
        decoding = taps_hf.SpeculativeDecoding(drafters, **settings)
        assert tuple(decoding.drafters) == names
    decoding = taps_hf.SpeculativeDecoding({"a": tiny_drafters(1)[0], "own": own})
    assert list(decoding.drafters.values())[1:] == [own]
    with pytest.raises(ValueError, match="`lookup` is 'yes'"):
        taps_hf.SpeculativeDecoding(tiny_drafters(2), lookup="yes")


def test_it_samples_no_proposals():
    tree = FixedTree([(0,)])
    refused("cannot sample", assistant_models=PromptLookup(), verification="rejection", tree=tree)


def test_a_lookup_that_is_asked_for_takes_part_beside_a_single_drafter():
    out = tiny_target().generate(
        prompt(30),
        max_new_tokens=30,
        do_sample=False,
        assistant_models=tiny_drafters(1)[0],
        lookup=True,
        return_dict_in_generate=True,
    )
    assert any(1 in cycle.drafters for cycle in out.draft_trace.cycles)


def test_more_than_is_known_can_be_forgotten():
    session = LookupSession(PromptLookup())
    session.observe(torch.arange(15), {})
    assert not session.forget(20)
    session.observe(torch.tensor([3, 4, 3, 4, 3]), {})
    assert session.forget(1)
