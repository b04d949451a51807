from __future__ import annotations

import copy
import gc

import pytest
import torch

from benchmarks.families import tiny_model
from taps_hf import ChainTree, DynamicTree, EagleDrafter
from taps_hf.drafters.base import DraftRequest
from taps_hf.drafters.ensemble import groups_of
from taps_hf.drafters.session import EagleSession
from taps_hf.drafters.stacking import kept_stack, stack, stacking_key
from taps_hf.target import LAST

from ..tiny import DIALECTS, needs_family, prompt, tiny_drafters, tiny_eagle3, tiny_target

FAMILIES = ["llama", "qwen3", "gemma3_text"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def context(family: str, length: int = 25) -> tuple[torch.Tensor, torch.Tensor]:
    ids = prompt(length + 1, seed=3)
    features = tiny_target(family).base_model(ids).last_hidden_state[0]
    return ids[0, 1:], features[:-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_computes_what_its_drafters_compute(family):
    drafters = tiny_drafters(3, family)
    width = drafters[0].config.hidden_size
    embeds, features = torch.randn(2, 3, 7, width, generator=torch.Generator().manual_seed(0))
    found = stack(drafters)(inputs_embeds=embeds, features=features).last_hidden_state
    for drafter, row, e, f in zip(drafters, found, embeds, features):
        alone = drafter(inputs_embeds=e[None], features=f[None]).last_hidden_state[0]
        torch.testing.assert_close(row, alone)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_stack_of_eagle3_computes_what_its_drafters_compute(dialect):
    drafters = tiny_eagle3(3, dialect=dialect)
    generator = torch.Generator().manual_seed(0)
    embeds, states = torch.randn(3, 7, 32, generator=generator), torch.randn(3, 7, 64)
    together = kept_stack(drafters)
    hidden = together(embeds, together.fuse(states)).last_hidden_state
    scores = together.scores(hidden)
    for d, drafter in enumerate(drafters):
        row = slice(d, d + 1)
        alone = drafter(embeds[row], drafter.fuse(states[row])).last_hidden_state
        torch.testing.assert_close(hidden[row], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores[row], drafter.scores(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rounds", [[[0, 1, 2], [1], [2], [0, 2], [0, 1, 2]]])
def test_eagle3_drafters_run_as_one_grow_the_trees_they_grow_apart(rounds):
    drafters, target = tiny_eagle3(3), tiny_target()
    together = EagleSession(drafters, target)
    apart = [EagleSession([drafter], target) for drafter in drafters]
    generator = torch.Generator().manual_seed(1)
    for asked in rounds:
        tokens = torch.randint(0, 16, (4,), generator=generator)
        states = {layer: torch.randn(4, 32, generator=generator) for layer in (0, 1)}
        for session in (together, *apart):
            session.observe(tokens, states)
        request = DraftRequest(tokens[-1:], DynamicTree(4, 3, 12), 4)
        found = together.propose(asked, request)
        for index in asked:
            tree = apart[index].propose((0,), request)[0]
            assert torch.equal(found[index].tokens, tree.tokens)
            torch.testing.assert_close(
                found[index].path_confidence, tree.path_confidence, rtol=1e-3, atol=1e-5
            )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draft_vocab", [None, 6])
@pytest.mark.parametrize("shape", [DynamicTree(4, 3, 12), ChainTree(3)])
@pytest.mark.parametrize(
    "rounds",
    [
        [[0, 1, 2], [1], [1], [2], [0, 2], [0], [0], [0, 1, 2]],
        [[1], [1], [2], [1], [0, 1, 2], [2], [0, 1, 2]],
    ],
)
def test_drafters_run_as_one_grow_the_trees_they_grow_apart(family, draft_vocab, shape, rounds):
    """Whoever is asked, and whoever sat out before."""
    drafters = tiny_drafters(3, family, draft_vocab=draft_vocab)
    target = tiny_target(family)
    together = EagleSession(drafters, target)
    apart = [EagleSession([drafter], target) for drafter in drafters]
    tokens, features = context(family, 4 * len(rounds))
    for asked, chunk in zip(rounds, torch.arange(len(tokens)).split(4), strict=True):
        for session in (together, *apart):
            session.observe(tokens[chunk], {LAST: features[chunk]})
        request = DraftRequest(tokens[chunk][-1:], shape, 4, with_entropy=True)
        found = together.propose(asked, request)
        assert len(found) == (1 if len(asked) == 1 else 3)
        for index in asked:
            tree = apart[index].propose((0,), request)[0]
            assert torch.equal(found[index].tokens, tree.tokens)
            assert torch.equal(found[index].parents, tree.parents)
            for name in ("confidence", "path_confidence", "entropy"):
                torch.testing.assert_close(
                    getattr(found[index], name),
                    getattr(tree, name),
                    rtol=1e-3,
                    atol=1e-5,
                    equal_nan=True,
                )


def test_what_can_be_stacked():
    one, two = tiny_drafters(2)
    assert stacking_key(one) == stacking_key(two)
    others = [
        tiny_drafters(1, "qwen3")[0],
        tiny_drafters(1, draft_vocab=6)[0],
        tiny_drafters(1, dtype=torch.bfloat16)[0],
    ]
    assert len({stacking_key(drafter) for drafter in (one, *others)}) == 4


def test_a_stack_is_made_once_and_again_when_a_weight_changes():
    drafters = [copy.deepcopy(drafter) for drafter in tiny_drafters(2)]
    first = kept_stack(drafters)
    assert kept_stack(drafters) is first
    drafters[1].fc.weight.mul_(2.0)
    second = kept_stack(drafters)
    assert second is not first
    inputs = torch.randn(2, 2, 3, drafters[0].config.hidden_size)
    found = second(inputs_embeds=inputs[0], features=inputs[1]).last_hidden_state[1]
    alone = drafters[1](inputs_embeds=inputs[0][1:], features=inputs[1][1:]).last_hidden_state[0]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def changed(drafter, how: str) -> None:
    weight = drafter.trunk.layers[0].self_attn.q_proj.weight
    if how == "data":
        weight.data.mul_(2.0)
    elif how == "data of a tensor":
        weight.data.copy_(torch.randn(weight.shape))
    else:
        with torch.inference_mode():
            weight.mul_(2.0)


@pytest.mark.parametrize("how", ["data", "data of a tensor", "inference"])
@pytest.mark.parametrize("made_in_inference_mode", [False, True])
def test_changes_in_place_are_noticed(how, made_in_inference_mode):
    drafters = [copy.deepcopy(drafter) for drafter in tiny_drafters(2)]
    if made_in_inference_mode:
        with torch.inference_mode():
            for parameter in drafters[1].parameters():
                parameter.data = parameter.data.clone()
    first = kept_stack(drafters)
    assert kept_stack(drafters) is first
    changed(drafters[1], how)
    assert kept_stack(drafters) is not first


def kept() -> int:
    from taps_hf.drafters import stacking

    return len(stacking._kept)


@pytest.fixture
def _nothing_kept():
    from taps_hf.drafters import stacking

    stacking._kept.clear()


@pytest.mark.usefixtures("_nothing_kept")
@pytest.mark.parametrize("draft_vocab", [None, 6])
def test_a_stack_lives_no_longer_than_any_of_its_drafters(draft_vocab):
    target = tiny_target()
    drafters = [copy.deepcopy(d) for d in tiny_drafters(2, draft_vocab=draft_vocab)]
    for _ in range(12):
        EagleSession(drafters, target)
        assert kept() == (1 if draft_vocab is None else 2)
        drafters[1] = copy.deepcopy(drafters[1])  # the first stays, its partner goes
    gc.collect()
    assert kept() == 0


@pytest.mark.usefixtures("_nothing_kept")
def test_no_more_than_some_stacks_are_kept():
    """Of drafters that live on, in ever other combinations."""
    from taps_hf.drafters import stacking

    one, *others = [copy.deepcopy(tiny_drafters(1)[0]) for _ in range(stacking._MOST_KEPT + 3)]
    stacks = [kept_stack([one, other]) for other in others]
    assert kept() == stacking._MOST_KEPT
    assert kept_stack([one, others[-1]]) is stacks[-1]
    assert kept_stack([one, others[0]]) is not stacks[0]


def wide_drafters(family: str, **kwargs) -> list[EagleDrafter]:
    target = tiny_model(family)
    return [EagleDrafter.from_target(target, **kwargs).eval() for _ in range(2)]


@pytest.mark.parametrize(
    ("family", "kwargs"),
    [
        ("mixtral", {"dense": False}),  # experts' weights in one tensor
        ("gpt_oss", {"dense": False}),  # attention sinks
        ("flint", {}),
        ("doge", {}),
        ("diffllama", {}),
    ],
)
def test_what_cannot_be_stacked_runs_one_after_the_other(family, kwargs):
    needs_family(family)
    drafters = wide_drafters(family, **kwargs)
    assert groups_of(drafters) == [(0,), (1,)]
    with pytest.raises(ValueError, match="cannot run as one"):
        EagleSession(drafters, tiny_model(family))


@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3", "apertus"])
def test_latent_attention_and_learnt_activations_are_stacked(family):
    needs_family(family)
    assert groups_of(wide_drafters(family)) == [(0, 1)]


def test_hooks_keep_drafters_apart():
    """A stack would not call them."""
    drafters = [copy.deepcopy(drafter) for drafter in tiny_drafters(2)]
    assert groups_of(drafters) == [(0, 1)]
    drafters = [copy.deepcopy(drafter) for drafter in tiny_drafters(2)]
    drafters[1].fc.register_forward_hook(lambda module, inputs, output: output * 2)
    assert groups_of(drafters) == [(0,), (1,)]


def test_a_stack_that_computes_something_else_is_not_used(monkeypatch):
    from taps_hf.drafters import stacking

    drafters = [copy.deepcopy(drafter) for drafter in tiny_drafters(2)]
    monkeypatch.setattr(stacking, "stack", lambda drafters: stack(drafters[::-1]))
    assert groups_of(drafters) == [(0,), (1,)]
