from __future__ import annotations

import pytest
import torch

from taps_hf import DraftTree, DynamicTree, FixedTree, Merged, Single
from taps_hf.drafters.base import DraftRequest
from taps_hf.evaluation.oracle import Oracle
from taps_hf.evaluation.replay import replay
from taps_hf.evaluation.variants import Variant, oracle_variant

from ..tiny import VOCAB, prompt, tiny_drafters, tiny_target
from .test_replay import make


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("depth", [1, 3])
def test_of_a_greedy_text_all_is_accepted(tmp_path, family, depth):
    target, _, records = make(tmp_path, 0.0, family)
    variants = [
        oracle_variant("oracle", DynamicTree(depth=depth, top_k=3, num_nodes=depth)),
        Variant("fixed", ("oracle",), Single(0), FixedTree.from_branching([2] * depth)),
    ]
    weights = {"oracle": "oracle"}
    for rows in replay(records, target, {"oracle": Oracle()}, variants, weights):
        for row in rows:
            whole, rest = divmod(row.tokens, depth + 1)
            assert row.emitted == [depth + 1] * whole + [rest] * (rest > 0)
            assert sum(row.accepted) >= row.tokens - len(row.accepted)


def true_confidence(target, text: torch.Tensor, tree: DraftTree, temperature: float) -> list[float]:
    """Of each node the product of the target's probabilities, one text after the other."""
    found, paths = [1.0], [[]]
    for node in range(1, len(tree)):
        parent = int(tree.parents[node])
        logits = target(torch.cat([text, torch.tensor(paths[parent]).long()])[None]).logits[0, -1]
        token = int(tree.tokens[node])
        found.append(found[parent] * (logits / temperature).softmax(0)[token].item())
        paths.append([*paths[parent], token])
    return found


def trees_along(drafter, target, text, shape, spots) -> list[DraftTree]:
    session, read, trees = type(drafter).start([drafter], target), 0, []
    states = target.base_model(text[None]).last_hidden_state[0]
    for end in spots:
        session.observe(text[read:end], {-1: states[max(read - 1, 0) : end - 1]})
        request = DraftRequest(text[end - 1 : end], shape, 9, with_entropy=True)
        trees.append(session.propose((0,), request)[0])
        read = end
    return trees


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@torch.no_grad()
def test_confidences_are_the_targets_probabilities(family, temperature):
    target, text = tiny_target(family), prompt(25)[0]
    shape, spots = DynamicTree(depth=3, top_k=3, num_nodes=9), [1, 6, 7, 11, 25]
    for end, tree in zip(spots, trees_along(Oracle(temperature), target, text, shape, spots)):
        expected = torch.tensor([true_confidence(target, text[:end], tree, temperature)])
        torch.testing.assert_close(tree.path_confidence, expected, rtol=1e-3, atol=1e-5)
        logits = target(text[None, :end]).logits[0, -1] / temperature
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(tree.entropy[0, 1], entropy, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_no_drafters_tree_may_expect_more(tmp_path):
    """Where all tokens are candidates, the sum of the probabilities of an oracle's nodes is the
    largest that a tree of so many nodes can have."""
    target, text, spots = tiny_target(), prompt(25)[0], list(range(4, 25, 5))
    shape = DynamicTree(depth=2, top_k=VOCAB, num_nodes=6)
    expected: dict[str, list[float]] = {}
    for name, drafter in {"oracle": Oracle(1.0), "math": tiny_drafters(1)[0]}.items():
        trees = trees_along(drafter, target, text, shape, spots)
        assert {len(tree) for tree in trees} == {7}
        expected[name] = [
            sum(true_confidence(target, text[:end], tree, 1.0)) for end, tree in zip(spots, trees)
        ]
    pairs = list(zip(expected["oracle"], expected["math"]))
    assert all(most >= some - 1e-4 for most, some in pairs)
    assert any(most > some + 0.1 for most, some in pairs)


def test_it_composes_with_drafters(tmp_path):
    target, _, records = make(tmp_path, 1.0)
    drafters = {"oracle": Oracle(1.0), "math": tiny_drafters(1)[0]}
    tree = DynamicTree(depth=2, top_k=3, num_nodes=6)
    variants = [
        oracle_variant("oracle", tree),
        Variant("merged", ("oracle", "math"), Merged(), tree),
    ]
    weights = {"oracle": "oracle", "math": "math"}
    for alone, merged in replay(records, target, drafters, variants, weights):
        assert alone.tokens == merged.tokens
        assert max(merged.nodes) > max(alone.nodes)


def test_oracles_of_different_temperatures_are_told_apart():
    assert Oracle(1.0).digest() != Oracle(0.5).digest()
    assert Oracle(1.0).digest() == Oracle(1.0).digest()
    with pytest.raises(ValueError, match="`temperature` is -1"):
        Oracle(-1)
