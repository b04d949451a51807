"""Drafters go on where an earlier turn left them."""

from __future__ import annotations

import copy
import gc
import inspect

import pytest
import torch
from transformers import DynamicCache, GenerationMixin

import taps_hf
from taps_hf.cache import CACHE
from taps_hf.drafters import ensemble

from ..phrases import Phrases
from ..tiny import FAMILIES, prompt, tiny_drafters, tiny_target

COMMON = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True}
TREE = taps_hf.DynamicTree(depth=3, top_k=3, num_nodes=8)
FREE = taps_hf.Costs(((1, 1.0), (40, 1.5)), ((0, 1),), *2 * [(taps_hf.DraftCost(0.1, 0.1),)])


def generate(ids, drafters, family="llama", **kwargs):
    settings = {**COMMON, "tree": TREE, "strategy": "merged", **kwargs}
    return tiny_target(family).generate(ids, assistant_models=drafters, **settings)


def cycles(out) -> list:
    """What was proposed, whose it was and what became of it."""
    return [
        (
            cycle.drafters,
            cycle.num_nodes,
            cycle.path,
            [(t.token, t.drafters) for t in cycle.emitted],
        )
        for cycle in out.draft_trace.cycles
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "strategy", ["merged", "single", "confidence", taps_hf.Auto(costs=FREE)], ids=str
)
def test_a_second_turn_is_as_a_run_over_the_whole_conversation(family, strategy):
    drafters = tiny_drafters(2, family)
    first = generate(prompt(9), drafters, family, strategy=strategy)
    longer = torch.cat([first.sequences, prompt(6, seed=5)], dim=1)
    second = generate(longer, drafters, family, strategy=strategy, **{CACHE: first[CACHE]})
    at_once = generate(longer, drafters, family, strategy=strategy)
    assert cycles(second) == cycles(at_once)
    third = torch.cat([second.sequences, prompt(3, seed=6)], dim=1)
    again = generate(third, drafters, family, strategy=strategy, **{CACHE: second[CACHE]})
    assert cycles(again) == cycles(generate(third, drafters, family, strategy=strategy))


def test_without_what_they_know_they_draft_otherwise():
    """That the test above tests something."""
    drafters = tiny_drafters(2)
    first = generate(prompt(9), drafters)
    longer = torch.cat([first.sequences, prompt(6, seed=5)], dim=1)
    blind = generate(longer, drafters, **{CACHE: copy.deepcopy(first[CACHE])})
    at_once = generate(longer, drafters)
    assert torch.equal(blind.sequences, at_once.sequences)
    confidence = [[t.confidence for t in x.draft_trace.emitted] for x in (blind, at_once)]
    assert cycles(blind) != cycles(at_once) or confidence[0] != confidence[1]


def test_only_the_new_tokens_are_given():
    if "_mask_length" not in inspect.getsource(GenerationMixin.generate):
        pytest.skip("this generate wants the whole sequence along with a cache")
    drafters = tiny_drafters(2)
    first = generate(prompt(9), drafters)
    longer = torch.cat([first.sequences, prompt(6, seed=5)], dim=1)
    new = longer[:, first[CACHE].get_seq_length() :]
    mask = torch.ones_like(longer)
    second = generate(new, drafters, attention_mask=mask, **{CACHE: first[CACHE]})
    assert cycles(second) == cycles(generate(longer, drafters))


@pytest.mark.parametrize("back", [1, 4, 13, 18])
def test_a_conversation_that_goes_on_from_further_up(back):
    """The cache is cropped: into the answer, or into the prompt."""
    drafters = tiny_drafters(2)
    first = generate(prompt(9), drafters)
    kept = first.sequences.shape[1] - 1 - back
    first[CACHE].crop(-back)
    # What stands next is what stood there: its slot is known (another token's would be missing).
    other = torch.cat([first.sequences[:, : kept + 1], prompt(6, seed=5)], dim=1)
    second = generate(other, drafters, **{CACHE: first[CACHE]})
    assert cycles(second) == cycles(generate(other, drafters))


def test_the_last_token_of_a_turn_may_change():
    drafters = [*tiny_drafters(2), Phrases([1, 2])]
    first = generate(prompt(9), drafters)
    longer = torch.cat([first.sequences, prompt(6, seed=5)], dim=1)
    longer[0, first.sequences.shape[1] - 1] += 1
    longer %= 16
    out = generate(longer, drafters, **{CACHE: first[CACHE]})
    assert torch.equal(out.sequences, generate(longer, drafters).sequences)


@pytest.mark.parametrize(
    "what", ["other drafters", "other weights", "one more", "longer cache", "other text"]
)
def test_others_begin_anew(what):
    drafters = [copy.deepcopy(drafter) for drafter in tiny_drafters(2)]
    first = generate(prompt(9), drafters)
    ids, cache = first.sequences, first[CACHE]
    expected = tiny_target().generate(
        torch.cat([ids, prompt(6, seed=5)], dim=1), max_new_tokens=14, do_sample=False
    )
    if what == "other drafters":
        drafters = [copy.deepcopy(drafter) for drafter in drafters]
    elif what == "other weights":
        drafters[0].fc.weight.data.mul_(2.0)
    elif what == "one more":
        drafters = [*drafters, tiny_drafters(3)[2]]
    elif what == "longer cache":  # somebody else has run the target on it meanwhile
        with torch.no_grad():
            tiny_target()(ids[:, -1:], **{CACHE: cache})
    else:  # and has gone back before
        cache.crop(-3)
        ids[0, -4:] = (ids[0, -4:] + 1) % 16
        with torch.no_grad():
            tiny_target()(ids[:, -4:-1], **{CACHE: cache})
        expected = tiny_target().generate(
            torch.cat([ids, prompt(6, seed=5)], dim=1), max_new_tokens=14, do_sample=False
        )
    out = generate(torch.cat([ids, prompt(6, seed=5)], dim=1), drafters, **{CACHE: cache})
    assert torch.equal(out.sequences, expected)


def test_what_is_known_lives_as_long_as_the_cache():
    drafters = tiny_drafters(2)
    gc.collect()
    before = len(ensemble._laid_by)
    first = generate(prompt(9), drafters)
    assert len(ensemble._laid_by) == before + 1
    del first
    gc.collect()
    assert len(ensemble._laid_by) == before
    generate(prompt(9), drafters, return_dict_in_generate=False)
    gc.collect()
    assert len(ensemble._laid_by) == before


def test_two_conversations_do_not_mix():
    drafters = tiny_drafters(2)
    turns = {seed: generate(prompt(9, seed=seed), drafters) for seed in (0, 1)}
    for seed, first in turns.items():
        longer = torch.cat([first.sequences, prompt(6, seed=5)], dim=1)
        second = generate(longer, drafters, **{CACHE: first[CACHE]})
        assert cycles(second) == cycles(generate(longer, drafters)), seed


def turns(drafters, between=lambda drafters: None, **kwargs):
    """Two turns, and the second one without what is known from the first."""
    first = generate(prompt(9), drafters, **kwargs)
    longer = torch.cat([first.sequences, prompt(6, seed=5)], dim=1)
    between(drafters)
    return generate(longer, drafters, **{CACHE: first[CACHE]}, **kwargs), longer


@pytest.mark.parametrize(
    "between",
    [
        lambda drafters: drafters[0].fc.weight.data.mul_(2.0),
        lambda drafters: drafters[0].score_only(4),
        lambda drafters: drafters[0].to(torch.bfloat16),
    ],
    ids=["weights", "tokens scored", "dtype"],
)
def test_a_drafter_that_was_changed_begins_anew(between):
    """Alone, too: as if the cache had been filled by somebody else."""
    drafters = [copy.deepcopy(tiny_drafters(1)[0])]
    found, longer = turns(drafters, between)
    cache = DynamicCache(config=tiny_target().config)
    with torch.no_grad():
        tiny_target()(longer[:, : 9 + 14 - 1], **{CACHE: cache})
    assert cycles(found) == cycles(generate(longer, drafters, **{CACHE: cache}))


def test_a_turn_in_inference_mode_and_one_without():
    drafters = tiny_drafters(2)
    with torch.inference_mode():
        first = generate(prompt(9), drafters)
    longer = torch.cat([first.sequences.clone(), prompt(6, seed=5)], dim=1)
    out = generate(longer, drafters, **{CACHE: first[CACHE]})
    assert torch.equal(out.sequences, generate(longer, drafters).sequences)


def test_another_target_with_the_same_cache():
    drafters, other = tiny_drafters(2), copy.deepcopy(tiny_target())
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    first = generate(prompt(9), drafters)
    ids = torch.cat([first.sequences, prompt(6, seed=5)], dim=1)
    settings = {**COMMON, "assistant_models": drafters, "strategy": "merged", "tree": TREE}
    copied = copy.deepcopy(first[CACHE])
    found = other.generate(ids, **settings, **{CACHE: first[CACHE]})
    assert cycles(found) == cycles(other.generate(ids, **settings, **{CACHE: copied}))


def test_the_same_drafter_twice_and_one_without_a_hash():
    class Equal(Phrases):
        __hash__ = None

        def __eq__(self, other):
            return isinstance(other, Phrases)

    text = generate(prompt(9), tiny_drafters(1)).sequences[0].tolist()
    one = Equal(text, confidence=0.5)
    found, longer = turns([one, one, tiny_drafters(1)[0]])
    assert torch.equal(found.sequences, generate(longer, tiny_drafters(1)).sequences)


def test_what_is_kept_of_the_text_is_the_text():
    first = generate(prompt(9), tiny_drafters(2), max_new_tokens=60)
    kept, _ = ensemble._laid_by[first[CACHE]]
    held = {tensor.untyped_storage().data_ptr(): tensor for tensor in kept._tokens}
    assert sum(tensor.untyped_storage().nbytes() // 8 for tensor in held.values()) == 9 + 60
