from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch

import taps_hf
from taps_hf import (
    Auto,
    ChainTree,
    Costs,
    CycleOutcome,
    DraftCost,
    DraftTree,
    DynamicTree,
    EmittedToken,
    GenerationContext,
    SpeculativeDecoding,
)
from taps_hf.strategies.auto import CAUTION, _Running
from taps_hf.strategies.experience import Experience, experience_of

from ..tiny import prompt, tiny_drafters, tiny_target


def costs(rows: float, draft: float = 0.0, num_drafters: int = 2, plain: float = 1.0) -> Costs:
    """A pass over one row costs `plain`, each further one `rows`; drafters run one by one."""
    each = DraftCost(draft, draft)
    points = ((1, plain), (2, plain + rows))
    return Costs(points, tuple((i,) for i in range(num_drafters)), *2 * [(each,) * num_drafters])


def running(table: Costs, num_drafters: int = 2, **settings) -> object:
    def refuse() -> Costs:
        raise AssertionError("costs were given, and measured nevertheless")

    context = GenerationContext(num_drafters, torch.device("cpu"), refuse)
    return Auto(costs=table, **settings).begin(context)


def chain(drafter: int, confidences: list[float], num_drafters: int = 2) -> DraftTree:
    """Drafter d proposes the tokens 10 d + 1, 10 d + 2, ..."""
    size = len(confidences) + 1
    known = torch.full((num_drafters, size), torch.nan)
    known[:, 0] = 1.0
    known[drafter, 1:] = torch.tensor(confidences)
    tokens = torch.arange(size) + 10 * drafter * (torch.arange(size) > 0)
    index = torch.arange(size)
    return DraftTree(tokens, index - 1, index, known, known.cumprod(dim=1))


def outcome(drafters: tuple[int, ...], by: tuple[int, ...], tokens: tuple[int, ...]):
    """A cycle in which tokens were emitted, the first ones proposed by one drafter each."""
    own = (EmittedToken(token, None, (), (), ()) for token in tokens[len(by) :])
    drafted = (EmittedToken(t, i, (d,), (1.0,), ()) for i, (t, d) in enumerate(zip(tokens, by), 1))
    path = tuple(range(1, len(by) + 1))
    return CycleOutcome(drafters, 9, path, (*drafted, *own), 1.0, 1.0, 0.0)


def cycle(strategy, right: dict[int, int], confidences=(0.6, 0.6, 0.6)) -> tuple[int, ...]:
    """One cycle in which drafter d is right for `right[d]` tokens; returns who drafted."""
    asked = strategy.ask((0, 1))
    if not asked:
        strategy.observe(outcome((), (), (99,)))
        return ()
    trees = {index: chain(index, list(confidences)) for index in asked}
    choice = strategy.compose(trees)
    verified = {index: int((~choice.tree.confidence[index, 1:].isnan()).sum()) for index in asked}
    best = max(asked, key=lambda index: min(right.get(index, 0), verified[index]))
    length = min(right.get(best, 0), verified[best])
    tokens = tuple(10 * best + 1 + i for i in range(length)) + (99,)
    strategy.observe(outcome(choice.drafters, (best,) * length, tokens))
    return asked


def test_the_nodes_verified_are_those_with_the_largest_net_gain():
    """Against trying every number of nodes, best first."""
    generator = torch.Generator().manual_seed(0)
    for rows in (0.0, 0.01, 0.05, 0.2, 0.5, 2.0):
        strategy = running(costs(rows))
        assert strategy.ask((0, 1)) == (0, 1)
        values = torch.rand(2, 5, generator=generator)
        values[:, 0] /= 2  # both cannot be surer: no more than one of the root's children is right
        trees = {i: chain(i, values[i].tolist()) for i in range(2)}
        tree = strategy.compose(trees).tree
        paths = sorted(values.cumprod(1).flatten().tolist(), reverse=True)
        price = CAUTION * strategy.rate
        nets = [sum(paths[:n]) - price * (1.0 + rows * n) for n in range(11)]
        assert len(tree) - 1 == nets.index(max(nets))
        kept = tree.path_confidence[:, 1:].nan_to_num(nan=0).amax(dim=0)
        assert sorted(kept.tolist(), reverse=True) == pytest.approx(paths[: len(tree) - 1])


def test_trees_may_be_larger_than_any_that_was_measured():
    strategy = running(costs(0.0))
    strategy.ask((0, 1))
    trees = {i: chain(i, [0.99] * 200) for i in range(2)}
    assert len(strategy.compose(trees).tree) == 401


def test_free_drafts_are_taken_and_dear_ones_are_not():
    free, dear = running(costs(0.0)), running(costs(0.01, draft=5.0))
    assert all(cycle(free, {0: 3, 1: 3}) for _ in range(50))
    asked = [cycle(dear, {0: 3, 1: 3}) for _ in range(100)]
    assert asked.count(()) > 80


def test_drafters_that_are_always_wrong_are_asked_ever_less_often():
    strategy = running(costs(0.05, draft=0.2), longest_pause=32)
    asked = [bool(cycle(strategy, {})) for _ in range(300)]
    pauses = [len(run) for run in "".join("x" if a else "." for a in asked).split("x") if run]
    assert pauses[:4] == [4, 8, 16, 32]
    assert set(pauses[4:-1]) == {32}


def test_a_drafter_that_falls_silent_does_not_keep_the_others_out():
    """Whoever is asked may have nothing to propose: then nothing is composed."""
    strategy = running(costs(0.02, draft=0.05), explore=8)
    for _ in range(20):
        cycle(strategy, {0: 3})
    asked = []
    for _ in range(12):
        asked.append(strategy.ask((0, 1)))
        if 1 in asked[-1]:
            strategy.compose({1: chain(1, [0.6, 0.6])})
            strategy.observe(outcome((1,), (1, 1), (11, 12, 99)))
        else:  # the first has nothing
            strategy.observe(outcome((), (), (99,)))
    assert next(i for i, a in enumerate(asked) if 1 in a) <= 2
    assert sum(1 in a for a in asked) >= 9


def test_drafts_that_pay_are_not_given_up_because_others_paid_more():
    """Slow next to what was reached lately, the cycles looked at were faster than plain steps."""
    strategy = running(costs(0.05, draft=0.5), explore=8)
    asked = [cycle(strategy, {0: 1 if i < 2 or i % 8 == 1 else 3}) for i in range(60)]
    assert all(asked)
    assert asked.count((0, 1)) < 12


def test_it_comes_back_when_drafting_pays_again():
    strategy = running(costs(0.02, draft=0.05), longest_pause=16)
    for _ in range(100):
        cycle(strategy, {})
    asked = [cycle(strategy, {0: 3}) for _ in range(60)]
    first = next(i for i, a in enumerate(asked) if a)
    assert first <= 16
    assert sum(map(bool, asked[first + 3 :])) == len(asked[first + 3 :])


def test_the_drafter_that_helps_runs_alone_and_the_other_is_looked_at_now_and_then():
    strategy = running(costs(0.02, draft=0.15), explore=8)
    asked = [cycle(strategy, {1: 3}) for _ in range(60)][2:]
    assert set(asked) == {(1,), (0, 1)}
    looks = [i for i, a in enumerate(asked) if a == (0, 1)]
    assert {b - a for a, b in pairwise(looks)} == {8}


def test_a_change_of_topic_brings_the_other_drafter_back():
    strategy = running(costs(0.02, draft=0.15), explore=8)
    for _ in range(40):
        cycle(strategy, {0: 3})
    asked = [cycle(strategy, {1: 3}) for _ in range(30)]
    assert next(i for i, a in enumerate(asked) if 1 in a) <= 3  # two misses, then all are asked
    assert all(1 in a for a in asked[6:])


def test_a_level_is_grown_if_it_is_likely_to_be_reached():
    strategy = running(costs(0.01, draft=0.3))
    strategy.ask((0, 1))
    assert strategy.go_on(1, torch.tensor([[0.9, 0.05]]).log().expand(2, -1)) is False  # 0.6 s
    cheap = running(costs(0.01, draft=0.05))
    cheap.ask((0, 1))
    assert cheap.go_on(1, torch.tensor([[0.9, 0.05]]).log())
    assert not cheap.go_on(2, torch.tensor([[0.02, 0.01]]).log())


def test_a_cycle_in_which_nobody_was_asked_teaches_nothing():
    """The last one of a generation has no room for drafts, and no strategy is asked."""
    told, untold = running(costs(0.02)), running(costs(0.02))
    for strategy in (told, untold):
        for _ in range(5):
            cycle(strategy, {0: 3})
    told.observe(outcome((), (), (1,)))
    trees = {i: chain(i, [0.7, 0.5, 0.3]) for i in range(2)}
    for strategy in (told, untold):
        assert strategy.ask((0, 1)) == (0,)
    chosen = [strategy.compose({0: trees[0]}).tree for strategy in (told, untold)]
    assert torch.equal(*(tree.tokens for tree in chosen))


@pytest.mark.parametrize("field", ["explore", "longest_pause"])
@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_nonsense_is_refused(field, bad):
    with pytest.raises(ValueError, match=f"`{field}` is {bad}"):
        Auto(**{field: bad})


def test_auto_is_what_several_drafters_get_unless_proposals_are_sampled():
    several = tiny_drafters(2)
    assert SpeculativeDecoding(several).strategy == Auto()
    assert SpeculativeDecoding(several).tree == DynamicTree(*Auto.tree_limits)
    fixed = DynamicTree(2, 2, 4)
    assert SpeculativeDecoding(several, tree=fixed).tree is fixed
    with pytest.raises(ValueError, match="choosing among them"):
        SpeculativeDecoding(several, "auto", tree=ChainTree(2), verification="rejection")


@pytest.mark.parametrize("draft", [0.0, 0.4, 9.0])
@pytest.mark.parametrize("do_sample", [False, True])
def test_whatever_is_assumed_to_cost_what_the_output_is_the_same(draft, do_sample):
    target, drafters = tiny_target(), tiny_drafters(3)
    expected = None
    for table in (costs(0.3, draft, 3), costs(0.0, draft, 3)):
        for settings in ({}, {"assistant_models": drafters, "strategy": Auto(costs=table)}):
            torch.manual_seed(0)
            found = target.generate(prompt(9), max_new_tokens=60, do_sample=do_sample, **settings)
            expected = found if expected is None else expected
            assert torch.equal(found, expected)


def test_a_shape_that_cannot_be_hashed_is_grown_and_costed():
    class Own(taps_hf.TreeShape):
        """Three children of the root, whatever they are."""

        follows_tokens = True
        num_nodes = 3
        __hash__ = None

        def grow(self, drafting, hidden, max_depth, go_on=None):
            return DynamicTree(1, 3, 3).grow(drafting, hidden, max_depth, go_on)

    target = tiny_target()
    plain = target.generate(prompt(9), max_new_tokens=20, do_sample=False)
    for shape in (Own(), Own()):
        found = target.generate(
            prompt(9),
            max_new_tokens=20,
            do_sample=False,
            assistant_models=tiny_drafters(2),
            strategy="auto",
            tree=shape,
            return_dict_in_generate=True,
        )
        assert torch.equal(found.sequences, plain)
        # Of three drafters, a lookup among them.
        assert max(cycle.num_nodes for cycle in found.draft_trace.cycles) <= 9


def with_free(rows: float, draft: float, experience: Experience | None = None) -> object:
    """Two drafters that cost time, and a third that does not."""
    table = costs(rows, draft)
    context = GenerationContext(3, torch.device("cpu"), pytest.fail, free=(2,))
    return _Running(Auto(), table, context, experience or Experience(3))


def free_cycle(strategy, sure: float, right: int) -> tuple[int, ...]:
    """One in which the free drafter is sure of three tokens, and so many of them are right; those
    of the others always are. Returns who drafted."""
    asked = strategy.ask((0, 1, 2))
    trees = {index: chain(index, [0.9] * 3, 3) for index in asked if index < 2}
    trees[2] = chain(2, [sure] * 3, 3)
    also = strategy.ask_also(trees)
    assert not set(also) & set(asked)
    trees |= {index: chain(index, [0.9] * 3, 3) for index in also}
    strategy.compose(trees)
    by = 2 if right else min((*asked, *also))
    length = right or 3 * (by < 2)
    tokens = tuple(10 * by + 1 + i for i in range(length)) + (99,)
    strategy.observe(outcome(tuple(trees), (by,) * length, tokens))
    return (*asked, *also)


def test_free_drafters_are_always_asked_and_others_where_these_foresee_little():
    strategy = with_free(0.05, 0.3)
    asked = [free_cycle(strategy, *((0.97, 3) if i % 2 else (0.05, 0))) for i in range(80)]
    assert all(2 in who for who in asked)
    alone = [who == (2,) for who in asked[40:]]
    assert sum(alone[1::2]) > 14  # where it is sure
    assert not any(alone[::2])


def test_free_drafters_go_on_where_others_do_not_pay():
    strategy = with_free(0.05, 9.0)
    asked = [free_cycle(strategy, 0.9, 3) for _ in range(60)]
    assert all(2 in who for who in asked)
    assert sum(who == (2,) for who in asked) > 45


def test_where_all_drafters_are_free_there_is_nothing_to_look_at():
    context = GenerationContext(1, torch.device("cpu"), pytest.fail, free=(0,))
    strategy = Auto(costs=costs(0.3, num_drafters=1)).begin(context)
    for _ in range(20):
        assert strategy.ask((0,)) == (0,)
        assert strategy.ask_also({0: chain(0, [0.9] * 3, 1)}) == ()
        strategy.compose({0: chain(0, [0.9] * 3, 1)})
        strategy.observe(outcome((0,), (), (99,)))
    assert len(strategy.compose({0: chain(0, [0.9] * 3, 1)}).tree) == 1  # nobody believes it


def test_an_answer_begins_where_the_one_before_it_ended():
    """A drafter that is always wrong is looked at once in the second answer, not four times."""
    table, experience = costs(0.05, draft=0.2), Experience(2)
    tries, sizes = [], []
    for _ in range(2):
        context = GenerationContext(2, torch.device("cpu"), pytest.fail)
        strategy = _Running(Auto(), table, context, experience)
        asked = [cycle(strategy, {}) for _ in range(12)]
        tries.append(next(i for i, who in enumerate(asked) if not who))
        again = _Running(Auto(), table, context, experience)
        again.ask((0, 1))
        sizes.append(len(again.compose({0: chain(0, [0.6] * 3)}).tree))
    assert tries == [4, 1]
    assert sizes[0] <= 4  # the root and what was proposed, if that


def test_nothing_is_recalled_where_costs_are_assumed():
    target, drafters = tiny_target(), tiny_drafters(2)
    settings = {"assistant_models": drafters, "return_dict_in_generate": True, "max_new_tokens": 40}
    cycles = []
    for _ in range(2):
        auto = Auto(costs=costs(0.05, 0.1))
        out = target.generate(prompt(9), do_sample=False, strategy=auto, **settings)
        cycles.append([(c.drafters, c.num_nodes) for c in out.draft_trace.cycles])
        target.generate(prompt(9), do_sample=False, strategy="auto", **settings)
    assert cycles[0] == cycles[1]


def test_experience_is_kept_with_the_target_by_drafters():
    target = tiny_target()
    one = experience_of(target, (1, 2))
    assert experience_of(target, (1, 2)) is one
    assert experience_of(target, (2, 1)) is not one
    for number in range(100):
        experience_of(target, (number, -1))
    assert experience_of(target, (1, 2)) is not one  # not without end


def test_answers_of_several_threads_teach_and_learn_at_once():
    experience, errors = Experience(2), []

    def answer() -> None:
        try:
            for _ in range(10):
                context = GenerationContext(2, torch.device("cpu"), pytest.fail)
                strategy = _Running(Auto(), costs(0.05, 0.1), context, experience)
                for _ in range(10):
                    cycle(strategy, {0: 3})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=answer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    calibration, _, looks = experience.recall()
    assert calibration.acceptance(chain(0, [0.6]))[1] > 0.9
    assert looks
