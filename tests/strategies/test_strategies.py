from __future__ import annotations

import copy

import pytest
import torch

from taps_hf import (
    Auto,
    ChainTree,
    Choice,
    Confidence,
    DraftTree,
    Entropy,
    GenerationContext,
    Merged,
    Single,
    Strategy,
    TreeCandidateGenerator,
    concatenate,
    list_strategies,
    merge,
    register_strategy,
)
from taps_hf.strategies import base, get_strategy
from taps_hf.strategies.routing import TIE
from taps_hf.target import LAST

from ..tiny import prompt, tiny_drafters, tiny_target


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


def chain(drafter: int, confidences: list[float], entropies: list[float], num_drafters: int = 2):
    """A drafter's chain of tokens, numbered so that only equal drafters propose equal tokens."""
    size = len(confidences) + 1

    def row(values: list[float], at_root: float) -> torch.Tensor:
        full = torch.full((num_drafters, size), torch.nan)
        full[drafter, 1:] = torch.tensor(values)
        full[:, 0] = at_root
        return full

    confidence = row(confidences, 1.0)
    return DraftTree(
        tokens=torch.arange(size) + 100 * drafter * (torch.arange(size) > 0),
        parents=torch.arange(size) - 1,
        depths=torch.arange(size),
        confidence=confidence,
        path_confidence=confidence.cumprod(dim=1),
        entropy=row(entropies, torch.nan),
    )


def test_the_strategies_are_registered():
    kinds = {"auto": Auto, "confidence": Confidence, "entropy": Entropy}
    kinds |= {"merged": Merged, "single": Single}
    assert set(kinds) <= set(list_strategies())
    assert list(list_strategies()) == sorted(list_strategies())
    for name, kind in kinds.items():
        assert get_strategy(name) == kind()


@pytest.mark.usefixtures("registry")
def test_register_and_look_up():
    @register_strategy("last")
    class Last(Strategy):
        def compose(self, trees):
            index = max(trees)
            return Choice(trees[index], (index,))

    assert "last" in list_strategies()
    assert type(get_strategy("last")) is Last
    mine = Last()
    assert get_strategy(mine) is mine
    assert register_strategy("last")(Last) is Last  # the same class again changes nothing
    with pytest.raises(ValueError, match="'last' is registered already"):
        register_strategy("last")(Single)
    assert type(get_strategy("last")) is Last


def test_a_test_registry_is_undone():
    assert "last" not in list_strategies()


@pytest.mark.parametrize("wrong", ["mergd", "", None, 3, Merged])
def test_unknown_strategies_are_refused(wrong):
    with pytest.raises(ValueError, match="expected one of") as info:
        get_strategy(wrong)
    assert repr(wrong) in str(info.value)
    assert all(name in str(info.value) for name in list_strategies())


def test_single_uses_its_drafter_only():
    trees = [chain(i, [0.5], [0.1], 3) for i in range(3)]
    for index in range(3):
        strategy = Single(index)
        strategy.check(3)
        assert strategy.ask((0, 1, 2)) == (index,)
        choice = strategy.compose({index: trees[index]})
        assert choice.tree is trees[index]
        assert choice.drafters == (index,)
    for index in (-1, 3):
        with pytest.raises(ValueError, match=rf"Single\(index={index}\) was given 3 drafters"):
            Single(index).check(3)


# The third drafter's tree is larger; means, not sums, decide. Surest and least uncertain differ.
ROUTED = {
    0: chain(0, [0.9, 0.2], [0.2, 0.4], 3),  # means 0.55 and 0.3
    1: chain(1, [0.7], [0.6], 3),  # means 0.7 and 0.6
    2: chain(2, [0.6, 0.6, 0.6, 0.6], [0.4, 0.4, 0.4, 0.4], 3),  # means 0.6 and 0.4
}


@pytest.mark.parametrize(("strategy", "best"), [(Confidence(), 1), (Entropy(), 0)])
def test_routing_takes_the_tree_with_the_best_mean(strategy, best):
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        choice = strategy.compose({i: ROUTED[i] for i in order})
        assert choice.tree is ROUTED[best]
        assert choice.drafters == (best,)
    without = {i: tree for i, tree in ROUTED.items() if i != best}
    assert strategy.compose(without).drafters == (2,)  # second best by either score
    strategy.check(1)
    assert strategy.ask((0, 1, 2)) == (0, 1, 2)


@pytest.mark.parametrize("strategy", [Confidence(), Entropy()])
def test_the_first_of_the_drafters_that_tie_within_rounding_is_routed_to(strategy):
    def scored(means: list[float]) -> dict[int, DraftTree]:
        return {i: chain(i, [0.5 + x], [0.5 - x], len(means)) for i, x in enumerate(means)}

    rounding = TIE / 2
    for means, first in (
        ([0.0, 0.0], 0),
        ([0.0, rounding], 0),
        ([rounding, 0.0], 0),
        ([0.0, 2 * TIE], 1),
        ([0.0, 0.1, 0.1 + rounding], 1),
        # Ties are with the best, not with the next one.
        ([0.0, 0.8 * TIE, 1.6 * TIE], 1),
        ([torch.nan, 0.0, rounding], 1),
        ([torch.nan, torch.nan], 0),
    ):
        trees = scored(means)
        for order in (trees, reversed(trees)):
            assert strategy.compose({i: trees[i] for i in order}).drafters == (first,), means


CONTEXT = GenerationContext(3, torch.device("cpu"), costs=None)


@pytest.mark.parametrize("kind", [Confidence, Entropy])
def test_routing_per_prompt_sticks_with_the_first_decision(kind):
    settings = kind("prompt")
    for best, first in ((1 if kind is Confidence else 0, ROUTED), (2, {2: ROUTED[2]})):
        strategy = settings.begin(CONTEXT)
        assert strategy.ask((0, 1, 2)) == (0, 1, 2)
        assert strategy.compose(first).drafters == (best,)
        assert strategy.ask((0, 1, 2)) == (best,)
        assert strategy.compose({0: ROUTED[0]}).drafters == (0,)
    always = kind("cycle").begin(CONTEXT)
    always.compose(ROUTED)
    assert always.ask((0, 1, 2)) == (0, 1, 2)


@pytest.mark.parametrize(
    ("strategy", "later"),
    [
        (Single(1), [1]),
        (Merged(), [0, 1, 2]),
        (Confidence(), [0, 1, 2]),
        (Confidence("prompt"), None),
        (Entropy("prompt"), None),
    ],
)
def test_only_the_drafters_asked_for_run(strategy, later):
    target, drafters = tiny_target(), [copy.deepcopy(d) for d in tiny_drafters(3)]
    run = set()
    for index, drafter in enumerate(drafters):
        # A hook keeps a drafter out of stacks, so that each runs by itself.
        drafter.register_forward_hook(lambda *_, index=index: run.add(index))
    generator = TreeCandidateGenerator(target, drafters, strategy, ChainTree(2))
    ids = prompt(12)
    ran, chosen = [], []
    with torch.no_grad():
        features = target.base_model(ids).last_hidden_state[0]
        for start in range(0, 9, 3):
            tokens = ids[0, start + 1 : start + 4]
            generator.observe(tokens, {LAST: features[start : start + 3]})
            chosen.append(generator.propose(ids[:, start + 3], max_depth=4).drafters)
            ran.append(sorted(run))
            run.clear()
    if later is None:
        assert ran[0] == [0, 1, 2]
        assert len(chosen[0]) == 1
        assert ran[1:] == [list(chosen[0])] * 2
    else:
        assert ran == [later] * 3


def test_merged_verifies_what_all_proposed():
    trees = {0: chain(0, [0.5, 0.5], [0, 0]), 1: chain(1, [0.9, 0.9, 0.9], [0, 0, 0])}
    ordered = list(trees.values())

    def same(choice, tree):
        assert choice.drafters == (0, 1)
        for name in ("tokens", "parents", "depths", "path_confidence"):
            torch.testing.assert_close(
                getattr(choice.tree, name), getattr(tree, name), equal_nan=True
            )

    same(Merged().compose(trees), merge(ordered))
    same(Merged(packing="concatenate").compose(trees), concatenate(ordered))
    for budget in (1, 3, 9):
        union = Merged(budget).compose(trees)
        same(union, merge(ordered).best(budget))
        assert len(union.tree) == 1 + min(budget, 5)
        packed = Merged(budget, "concatenate").compose(trees)
        same(packed, concatenate(ordered).best(budget))
    Merged().check(1)
    assert Merged().ask((0, 1, 2)) == (0, 1, 2)


def test_merged_counts_duplicates_once_only_in_the_union():
    trees = {i: chain(0, [0.5, 0.5], [0, 0]) for i in range(2)}
    assert len(Merged().compose(trees).tree) == 3
    assert len(Merged(packing="concatenate").compose(trees).tree) == 5


@pytest.mark.parametrize("kind", [Confidence, Entropy])
def test_unknown_periods_are_refused(kind):
    with pytest.raises(ValueError, match="`per` is 'token', expected 'cycle' or 'prompt'"):
        kind(per="token")


def test_nonsense_settings_of_merged_are_refused():
    with pytest.raises(ValueError, match="`packing` is 'stack'"):
        Merged(packing="stack")
    for bad in (0, -3):
        with pytest.raises(ValueError, match=f"`num_nodes` is {bad}"):
            Merged(num_nodes=bad)


def test_who_may_be_used_with_sampled_proposals():
    # Exactly those whose decision does not depend on what was sampled.
    assert Single().supports_sampled_proposals
    assert Single(1).supports_sampled_proposals
    assert Merged().supports_sampled_proposals
    assert Merged(packing="concatenate").supports_sampled_proposals
    assert not Merged(4).supports_sampled_proposals
    for kind in (Confidence, Entropy):
        for per in ("cycle", "prompt"):
            assert not kind(per).supports_sampled_proposals


def test_entropies_are_asked_for_where_they_are_read():
    tree = ChainTree(2)
    for strategy in (Single(), Merged(), Confidence(), Entropy()):
        generator = TreeCandidateGenerator(tiny_target(), tiny_drafters(2), strategy, tree)
        ids = prompt(4)
        with torch.no_grad():
            features = tiny_target().base_model(ids).last_hidden_state[0, :-1]
            generator.observe(ids[0, 1:], {LAST: features})
            found = generator.propose(ids[:, -1], 2).tree.entropy
        assert (found is not None) == isinstance(strategy, Entropy) == strategy.needs_entropy


def test_strategies_are_values():
    assert Merged(3) == Merged(3)
    assert len({Confidence("prompt"), Confidence("prompt"), Confidence(), Entropy()}) == 3
