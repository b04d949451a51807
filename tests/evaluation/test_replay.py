from __future__ import annotations

import copy

import pytest
import torch

from taps_hf import (
    Auto,
    ChainTree,
    Choice,
    Confidence,
    Costs,
    DraftCost,
    DraftTree,
    DynamicTree,
    FixedTree,
    Merged,
    PromptLookup,
    Single,
    Strategy,
)
from taps_hf.evaluation.benchmarks import Question
from taps_hf.evaluation.forest import Forest, Spot
from taps_hf.evaluation.live import run_live
from taps_hf.evaluation.records import RecordOptions, RecordStore, record, states_of
from taps_hf.evaluation.replay import OneByOne, replay
from taps_hf.evaluation.variants import Variant, standard_variants

from ..phrases import Phrases
from ..tiny import DIALECTS, FAMILIES, VOCAB, tiny_drafters, tiny_eagle3, tiny_target
from ..training.chat import CHATML, chat_tokenizer

QUESTIONS = [
    Question("sums", str(i), (f"t5 t{6 + i} t7", "t8 t9")[: 1 + i % 2], "odd") for i in range(3)
]
NAMES = ("math", "chat", "code")
COMPARED = ("variant_key", "record", "tokens", "accepted", "nodes", "chosen", "emitted")
WEIGHTS = {name: name for name in (*NAMES, "again", "lookup", "near")}


class Alternating(Strategy):
    """Asks one drafter after the other: another one after a cycle without success."""

    def begin(self, context):
        began = Alternating()
        began.index = 0
        return began

    def ask(self, everyone):
        return (everyone[self.index % len(everyone)],)

    def compose(self, trees):
        return Single(next(iter(trees))).compose(trees)

    def observe(self, outcome):
        self.index += bool(outcome.drafters) and not outcome.accepted


class Unhashable(DynamicTree):
    """A shape of somebody else's: equal to others like it, without a hash."""

    __hash__ = None


class Deeper(Strategy):
    """Proposes something itself, as deep as it likes."""

    def compose(self, trees):
        tree = next(iter(trees.values()))
        nodes = torch.arange(30)
        tokens = torch.cat([tree.tokens[:1], nodes[1:] % VOCAB])
        known = torch.ones(tree.num_drafters, 30)
        return Choice(DraftTree(tokens, nodes - 1, nodes, known, known, known), (0,))


def make(folder, temperature: float, family: str = "llama"):
    target = tiny_target(family)
    options = RecordOptions(temperature=temperature, max_new_tokens=14, seed=3)
    store = RecordStore(folder, {"target": family})
    files = record(target, chat_tokenizer(CHATML), QUESTIONS, options, store)
    return target, options, [store.load(file) for file in files]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_replay_gives_every_cycle_of_the_live_run(tmp_path, family, temperature):
    target, options, records = make(tmp_path, temperature, family)
    drafters = dict(zip(NAMES, tiny_drafters(3, family)))
    # Random drafters are so sure that their four likeliest tokens have all the probability there
    # is, and two means of 1 / 4 are a tie that rounding decides: hence three.
    tree = DynamicTree(depth=4, top_k=3, num_nodes=10)
    drafters["lookup"] = PromptLookup()
    drafters["near"] = copy.deepcopy(drafters["math"])
    drafters["near"].config.context_window = 5
    variants = standard_variants(NAMES, NAMES[:2], tree, "lookup")
    variants += [
        Variant("alternating", NAMES, Alternating(), tree),
        Variant("three", NAMES, Merged(num_nodes=12), tree),
        Variant("chain", ("code",), Single(0), ChainTree(3)),
        Variant("near", ("near",), Single(0), tree),
        Variant("fixed", ("chat", "math"), Merged(), FixedTree.from_branching([2, 2])),
        Variant("unhashable", NAMES[:2], Merged(), Unhashable(3, 2, 5)),
    ]
    assert len(records) == 4
    lengths = set()
    ended = {rows[0].record: rows for rows in replay(records, target, drafters, variants, WEIGHTS)}
    for kept in records:
        replayed = ended[kept.key]
        live = run_live(kept, target, drafters, variants, WEIGHTS, options)
        for found, expected in zip(replayed, live):
            assert expected.differs_at is None
            for name in COMPARED:
                assert getattr(found, name) == getattr(expected, name), (name, found, expected)
            lengths.update(found.accepted)
    assert {0, 1} <= lengths
    assert family != "llama" or 2 in lengths


CHEAP, DEAR = DraftCost(0.01, 0.01), DraftCost(0.3, 0.2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_kinds_and_strategies_that_learn_are_replayed(tmp_path, temperature):
    """A drafter without any model, and `auto`, whose decisions follow from what it has seen."""
    target, options, records = make(tmp_path, temperature)
    text = records[0].tokens.tolist()
    phrases = [text[records[0].answer_start - 2 :], list(range(VOCAB))]
    drafters = dict(zip(NAMES, (*tiny_drafters(2), Phrases(*phrases, confidence=0.4))))
    drafters["lookup"] = PromptLookup()
    tree = DynamicTree(depth=4, top_k=3, num_nodes=10)
    groups, points = ((0, 1), (2,)), ((1, 1.0), (12, 1.3))
    variants = [Variant("phrases", ("code",), Single(0), tree)]
    for name, each in (("cheap", CHEAP), ("dear", DEAR)):
        auto = Auto(explore=2, costs=Costs(points, groups, (each,) * 2, (each,) * 2))
        variants.append(Variant(f"auto, {name}", NAMES, auto, tree))
        variants.append(Variant(f"auto, {name}, free", (*NAMES, "lookup"), auto, tree))
    for strategy in (Merged(), Confidence(), Confidence("prompt"), Merged(num_nodes=5), Deeper()):
        variants.append(Variant(repr(strategy), NAMES, strategy, tree))
    ended = {rows[0].record: rows for rows in replay(records, target, drafters, variants, WEIGHTS)}
    asked = set()
    for kept in records:
        live = run_live(kept, target, drafters, variants, WEIGHTS, options)
        for found, expected in zip(ended[kept.key], live):
            for name in COMPARED:
                assert getattr(found, name) == getattr(expected, name), (name, found, expected)
            if found.variant.startswith("auto"):
                asked |= {(found.variant, tuple(chosen)) for chosen in found.chosen}
    assert len(asked) > 2  # it does decide
    heart = ended[records[0].key][0]
    assert max(heart.accepted) >= 2
    # It has no distributions, and so no entropies.
    assert {value for values in heart.accepted_entropy for value in values} == {None}


def test_costs_are_assumed_in_a_replay(tmp_path):
    target, _, records = make(tmp_path, 0.0)
    drafters = dict(zip(NAMES, tiny_drafters(2)))
    variants = [Variant("auto", NAMES[:2], Auto(), DynamicTree())]
    with pytest.raises(ValueError, match="give the strategy its costs"):
        next(replay(records, target, drafters, variants, WEIGHTS))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_drafters_that_read_more_than_records_hold(tmp_path, family):
    """EAGLE-3 reads other layers, whose states are computed: the cycles are those of live runs."""
    target, options, records = make(tmp_path, 1.0, family)
    drafters = dict(zip(NAMES, (*tiny_eagle3(2, family), *tiny_drafters(1, family))))
    tree = DynamicTree(depth=4, top_k=3, num_nodes=10)
    variants = [
        Variant("eagle3", NAMES[:1], Single(0), tree),
        Variant("kinds", NAMES, Merged(num_nodes=12), tree),
        Variant("routed", NAMES, Confidence(), tree),
    ]
    accepted = set()
    ended = {rows[0].record: rows for rows in replay(records, target, drafters, variants, WEIGHTS)}
    for kept in records:
        live = run_live(kept, target, drafters, variants, WEIGHTS, options)
        for found, expected in zip(ended[kept.key], live):
            for name in COMPARED:
                assert getattr(found, name) == getattr(expected, name), (name, found, expected)
            accepted.update(found.accepted)
    assert {0, 1} <= accepted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draft_vocab", [None, 6])
def test_trees_grown_together_are_those_grown_alone(tmp_path, family, draft_vocab):
    target, _, records = make(tmp_path, 0.0, family)
    drafter = tiny_drafters(1, family, draft_vocab=draft_vocab)[0]
    compare_growers(drafter, target, records)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_so_are_those_of_eagle3_in_all_dialects(tmp_path, family, dialect):
    target, _, records = make(tmp_path, 0.0, family)
    drafter = tiny_eagle3(1, family, dialect)[0]
    compare_growers(drafter, target, records)
    near = copy.deepcopy(drafter)
    near.config.context_window = 5
    compare_growers(near, target, records)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_eagle3_replayed_together_has_the_cycles_of_one_by_one(tmp_path, monkeypatch, temperature):
    target, _, records = make(tmp_path, temperature)
    drafters = dict(zip(NAMES, (*tiny_eagle3(2), *tiny_drafters(1))))
    variants = standard_variants(NAMES, NAMES, DynamicTree(depth=4, top_k=3, num_nodes=10))
    given = (records, target, drafters, variants, WEIGHTS)
    together = {rows[0].record: rows for rows in replay(*given)}
    monkeypatch.setattr("taps_hf.evaluation.replay._TOGETHER", ())
    for expected in replay(*given):
        for found, alone in zip(together.pop(expected[0].record), expected):
            for name in COMPARED:
                assert getattr(found, name) == getattr(alone, name), (name, found, alone)
    assert not together


def compare_growers(drafter, target, records) -> None:
    """Trees at every position of the answers, from the two growers."""
    shape = DynamicTree(depth=4, top_k=3, num_nodes=8)
    states = [states_of(kept, target, drafter.reads_layers) for kept in records]
    with torch.no_grad():
        forest = Forest(drafter, target, shape, records, states)
    alone = OneByOne(drafter, target, shape, records, states)
    spots = [
        Spot(number, root, min(5, len(kept.tokens) - root))
        for number, kept in enumerate(records)
        for root in range(kept.answer_start - 1, len(kept.tokens) - 1)
    ]
    with torch.no_grad():
        pairs = zip(forest.grow(spots), alone.grow(spots))
    for found, expected in pairs:
        for name in ("tokens", "parents", "depths"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist()
        for name in ("confidence", "path_confidence", "entropy"):
            torch.testing.assert_close(
                getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-4, equal_nan=True
            )


def test_entropies_and_overlap_are_those_of_the_trees(tmp_path):
    target, _, records = make(tmp_path, 1.0)
    drafters = dict(zip(NAMES, tiny_drafters(2)))
    kept = records[0]
    tree = DynamicTree(depth=2, top_k=3, num_nodes=9)
    variants = [
        Variant("math", ("math",), Single(0), tree),
        Variant("same", ("math", "again"), Merged(), tree),
        Variant("both", ("math", "chat"), Merged(), tree),
        Variant("copies", ("math", "chat"), Merged(packing="concatenate"), tree),
    ]
    drafters["again"] = drafters["math"]
    ((math, same, both, copies),) = replay([kept], target, drafters, variants, WEIGHTS)
    assert set(math.overlap) == {None}
    assert {x for x in same.overlap if x is not None} == {1.0}
    assert same.accepted == math.accepted
    shared = [x for x in both.overlap if x is not None]
    assert 0 < max(shared) < 1
    assert copies.overlap == both.overlap
    assert copies.accepted == both.accepted
    assert copies.accepted_entropy == both.accepted_entropy
    assert copies.rejected_entropy == both.rejected_entropy
    # The first cycle, by hand: the drafter's distribution at the root.
    with torch.no_grad():
        start = kept.answer_start - 1
        embeds = target.get_input_embeddings()(kept.tokens[1 : start + 1])[None]
        hidden = drafters["math"](embeds, kept.features[None, :start]).last_hidden_state[0, -1]
        draft = torch.distributions.Categorical(logits=target.lm_head(hidden)).entropy().item()
        logits = target(kept.tokens[None, : start + 1]).logits[0, -1]
    of_target = torch.distributions.Categorical(logits=logits).entropy().item()
    if math.accepted[0]:
        assert math.accepted_entropy[0][0] == pytest.approx(draft, rel=1e-4)
        assert math.accepted_target_entropy[0][0] == pytest.approx(of_target, rel=1e-4)
    else:
        assert math.rejected_entropy[0] == pytest.approx(draft, rel=1e-4)
        assert math.rejected_target_entropy[0] == pytest.approx(of_target, rel=1e-4)
    for accepted, values in zip(math.accepted, math.accepted_entropy):
        assert len(values) == accepted
