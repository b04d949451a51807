"""What a custom strategy decides leaves the output exact, or the error says what it broke."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import taps_hf
from taps_hf import Choice, DraftTree
from tests.tiny import VOCAB, prompt, tiny_drafters, tiny_target

TREE = taps_hf.DynamicTree(depth=4, top_k=6, num_nodes=30)


class Custom(taps_hf.Strategy):
    """Merges, and changes the result in the third cycle."""

    supports_sampled_proposals = True

    def __init__(self, change=lambda choice: choice, asked=(0, 1)):
        self.change, self.asked = change, asked

    def begin(self, context):
        began = copy.copy(self)
        began.cycles = 0
        return began

    def ask(self, everyone):
        return everyone if self.cycles < 2 else self.asked

    def compose(self, trees):
        choice = Choice(taps_hf.merge(list(trees.values())), tuple(trees))
        return self.change(choice) if self.cycles == 2 else choice

    def observe(self, outcome):
        self.cycles += 1


def generate(strategy: taps_hf.Strategy, **kwargs) -> torch.Tensor:
    common = {"max_new_tokens": 20, "do_sample": False}
    ours = {"assistant_models": tiny_drafters(2), "strategy": strategy, "tree": TREE}
    return tiny_target().generate(prompt(), **{**common, **ours, **kwargs})


def tree(**fields):
    """A change of the chosen tree: by name, what each tensor becomes."""

    def change(choice: Choice) -> Choice:
        found = choice.tree
        changed = {name: make(getattr(found, name).clone()) for name, make in fields.items()}
        return replace(choice, tree=replace(found, **changed))

    return change


def put(node: int, value: int):
    def change(values: torch.Tensor) -> torch.Tensor:
        values[node] = value
        return values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.tree, "DraftTree, expected a taps_hf.Choice"),
        (lambda c: Choice(None, ()), "Choice with a NoneType"),
        (lambda c: Choice(c.tree, (7,)), r"drafters \(7,\), expected .* from 0 to 1"),
        (lambda c: Choice(c.tree, (0, 0)), r"drafters \(0, 0\)"),
        (lambda c: Choice(c.tree, 0), "drafters 0, expected"),
        (lambda c: Choice(c.tree, ("math",)), "drafters .*math"),
        (tree(tokens=lambda t: t.index_fill(0, torch.tensor([0]), VOCAB)), f"token {VOCAB}, par"),
        (tree(tokens=lambda t: t.roll(1) * 0 - 1), "token -1, parent -1"),
        (tree(tokens=put(3, VOCAB)), f"token {VOCAB} at node 3, expected 0 to {VOCAB - 1}"),
        (tree(tokens=put(2, -4)), "token -4 at node 2"),
        (tree(tokens=lambda t: t.float()), "`tokens` of torch.float32, expected int64"),
        (tree(tokens=lambda t: t[None]), "`tokens` of shape"),
        (tree(parents=put(1, 2)), "node 1 under parent 2"),
        (tree(parents=put(1, -1)), "node 1 under parent -1"),
        (tree(parents=put(0, 0)), "parent 0, depth 0"),
        (tree(depths=put(1, 2)), "node 1 at depth 2, expected 1"),
        (tree(depths=lambda t: t + 1), "depth 1, expected"),
        (tree(parents=lambda t: t[:-1]), "`parents` of shape"),
        (tree(confidence=lambda t: t[:1]), "`confidence` of shape"),
        (tree(path_confidence=lambda t: t[:, 1:]), "`path_confidence` of shape"),
    ],
)
def test_a_broken_choice_names_the_strategy_and_what_it_broke(change, message: str):
    with pytest.raises(ValueError, match=rf"Custom\.compose returned .*{message}"):
        generate(Custom(change))


@pytest.mark.parametrize("asked", [(2,), (-1,), (0, 0), 1, None, "01", (0.0,)])
def test_drafters_that_are_not_there(asked):
    with pytest.raises(ValueError, match=r"Custom\.ask returned .*from 0 to 1"):
        generate(Custom(asked=asked))


class Hearing(Custom):
    """Asks the first drafter, and having heard it the second."""

    def __init__(self, also=(1,)):
        super().__init__(asked=(0,))
        self.also, self.heard = also, []

    def ask_also(self, trees):
        self.heard.append(tuple(trees))
        return self.also if self.cycles >= 2 else ()


def test_drafters_may_be_asked_when_others_have_proposed():
    strategy = Hearing()
    assert torch.equal(generate(strategy), generate(taps_hf.Merged()))
    assert strategy.heard[:2] == [(0, 1)] * 2
    assert strategy.heard[2:] == [(0,)] * len(strategy.heard[2:])
    out = generate(strategy, return_dict_in_generate=True)
    assert all(cycle.drafters == (0, 1) for cycle in out.draft_trace.cycles[:-1])


@pytest.mark.parametrize("also", [(0,), (1, 0), (2,), (1, 1), None, "1"])
def test_nobody_is_asked_twice(also):
    with pytest.raises(ValueError, match=r"Hearing\.ask_also returned .*none of \(0,\)"):
        generate(Hearing(also))


def test_a_strategy_that_begins_with_something_else():
    class Broken(Custom):
        def begin(self, context):
            return "merged"

    with pytest.raises(ValueError, match=r"Broken\.begin returned a str"):
        generate(Broken())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: None, "was not sampled"),
        (lambda p: replace(p, children=p.children + 500), "which is none of its edges"),
        (lambda p: replace(p, rows=p.rows + 500), "from row 500"),
    ],
)
def test_sampled_trees_keep_their_proposals(change, message: str):
    def broken(choice: Choice) -> Choice:
        return replace(choice, tree=replace(choice.tree, proposals=change(choice.tree.proposals)))

    sampled = {"verification": "rejection", "tree": taps_hf.FixedTree.from_branching([2, 2])}
    generate(Custom(), **sampled)
    with pytest.raises(ValueError, match=message):
        generate(Custom(broken), **sampled)


class OwnProposals(taps_hf.Strategy):
    """Proposes what no drafter did: each token up to the right one, and deeper than may be."""

    def __init__(self, continuation: list[int]):
        self.continuation = continuation

        self.done = 0

    def compose(self, trees):
        path = [int(trees[0].tokens[0]), *self.continuation[self.done : self.done + 3], 5, 6, 7]
        nodes = torch.arange(len(path))
        ones = torch.full((2, len(path)), 0.5)
        return Choice(DraftTree(torch.tensor(path), nodes - 1, nodes, ones, ones), [1])

    def observe(self, outcome):
        self.done += len(outcome.tokens)


def test_proposals_of_a_strategys_own_are_exact():
    plain = tiny_target().generate(prompt(), max_new_tokens=20, do_sample=False)
    out = generate(
        OwnProposals(plain[0, 9:].tolist()), return_dict_in_generate=True, output_draft_trees=True
    )
    assert torch.equal(out.sequences, plain)
    emitted = 0
    for cycle in out.draft_trace.cycles:  # all of them cut to what may still be emitted
        assert int(cycle.tree.depths.max()) <= 20 - emitted - 1
        emitted += len(cycle.emitted)
    assert len(out.draft_trace.cycles) <= 7
