"""The rejection rule samples from the target's distribution; a wrong rule is caught by the test."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

import taps_hf
from taps_hf import verification
from taps_hf.verification import RejectionVerifier, Walk, WalkVerifier
from tests.tiny import prompt, tiny_drafters, tiny_target

LENGTH = 3  # tokens a continuation: short enough to know the distribution of whole continuations
TOP = 3  # the target's support at each step, by top_k: 27 continuations
SAMPLES = 1200
TEMPERATURE = 3.0  # flattens the tiny target, so that many continuations are likely


@pytest.fixture(scope="module")
def expected() -> dict[tuple[int, ...], float]:
    """The target's own probability of each continuation, by enumeration."""
    target = tiny_target()
    found = {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for path, p in found.items():
            ids = torch.cat([prompt(), torch.tensor([path], dtype=torch.long)], dim=1)
            with torch.no_grad():
                logits = target(input_ids=ids).logits[0, -1] / TEMPERATURE
            values, tokens = logits.topk(TOP)
            for q, token in zip(values.softmax(0).tolist(), tokens.tolist()):
                longer[(*path, token)] = p * q
        found = longer
    return found


def chi_squared(expected: dict[tuple[int, ...], float], **kwargs) -> float:
    """p-value of the hypothesis that sampled continuations come from `expected`."""
    target, counts = tiny_target(), dict.fromkeys(expected, 0)
    for _ in range(SAMPLES):
        out = target.generate(
            prompt(),
            max_new_tokens=LENGTH,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP,
            assistant_models=tiny_drafters(2),
            **kwargs,
        )
        counts[tuple(out[0, -LENGTH:].tolist())] += 1  # KeyError: outside of the support
    statistic, cells, rest_n, rest_p = 0.0, 0, 0, 0.0
    for path, p in expected.items():
        if p * SAMPLES < 5:  # the usual rule: pool cells that are too small
            rest_n, rest_p = rest_n + counts[path], rest_p + p
            continue
        statistic += (counts[path] - p * SAMPLES) ** 2 / (p * SAMPLES)
        cells += 1
    if rest_p * SAMPLES >= 5:
        statistic += (rest_n - rest_p * SAMPLES) ** 2 / (rest_p * SAMPLES)
        cells += 1
    freedom = torch.tensor((cells - 1) / 2.0)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2.0)))


@pytest.mark.parametrize(
    ("strategy", "tree"),
    [
        ("single", taps_hf.FixedTree.from_branching([3, 2])),
        ("merged", taps_hf.FixedTree.from_branching([2, 2])),
        (taps_hf.Merged(packing="concatenate"), taps_hf.FixedTree.from_branching([2, 1])),
    ],
    ids=str,
)
def test_rejection_samples_from_the_target(expected, strategy, tree):
    torch.manual_seed(0)
    p_value = chi_squared(expected, strategy=strategy, tree=tree, verification="rejection")
    assert p_value > 0.001


def test_a_wrong_rule_is_caught(expected, monkeypatch):
    """Accepting with min(1, p / q) but drawing the correction from p is a classic mistake."""

    class NoResidual(RejectionVerifier):
        def step(self, node, scores):
            target = torch.softmax(scores[0], dim=-1)
            for child, row in self._attempts.get(node, ()):
                token = self._tokens[child]
                if torch.rand(()) * self._probabilities[row, token] < target[token]:
                    return token, child
            return int(torch.multinomial(target, 1)), None

    monkeypatch.setitem(verification.VERIFIERS, "rejection", NoResidual)
    torch.manual_seed(0)
    p_value = chi_squared(
        expected,
        strategy="single",
        tree=taps_hf.FixedTree.from_branching([3, 2]),
        verification="rejection",
    )
    assert p_value < 1e-6


def test_rejection_is_plain_greedy_search_without_sampling():
    target = tiny_target()
    plain = target.generate(prompt(), max_new_tokens=30, do_sample=False)
    for strategy, seed in itertools.product(("single", "merged"), range(3)):
        torch.manual_seed(seed)
        ours = target.generate(
            prompt(),
            max_new_tokens=30,
            do_sample=False,
            assistant_models=tiny_drafters(2),
            strategy=strategy,
            tree=taps_hf.FixedTree.from_branching([4, 2, 2]),
            verification="rejection",
        )
        assert torch.equal(plain, ours)


def test_rejection_accepts_what_the_drafter_is_sure_of():
    """A drafter that equals the target is never rejected: its q is p."""
    scores = torch.tensor([[0.3, 1.2, -0.5, 0.8]])
    q = scores.softmax(dim=-1)
    for token in range(4):
        tree = taps_hf.DraftTree(
            tokens=torch.tensor([0, token]),
            parents=torch.tensor([-1, 0]),
            depths=torch.tensor([0, 1]),
            confidence=torch.ones(1, 2),
            path_confidence=torch.ones(1, 2),
            proposals=taps_hf.trees.tree.SampledProposals(
                torch.tensor([0]), torch.tensor([1]), torch.tensor([0]), q
            ),
        )
        for _ in range(20):
            assert RejectionVerifier(tree, do_sample=True).step(0, scores)[1] == 1


def test_the_walk_loses_nothing_that_follows_either_of_two_copies():
    """The paper's packing holds a path twice, and what follows it below either."""

    def tree_of(drafter: int, tokens: list[int]) -> taps_hf.DraftTree:
        nodes = torch.arange(len(tokens))
        ones = torch.ones(1, len(tokens))
        tree = taps_hf.DraftTree(torch.tensor(tokens), nodes - 1, nodes, ones, ones)
        return tree.of_drafter(drafter, 2)

    tree = taps_hf.concatenate([tree_of(0, [0, 1, 2]), tree_of(1, [0, 1, 3])])
    assert tree.tokens.tolist() == [0, 1, 2, 1, 3]
    for follows in (2, 3):
        walk = WalkVerifier(tree, do_sample=False)
        path, node = [], 0
        for right in (1, follows, 0):
            scores = torch.zeros(1, 4)
            scores[0, right] = 9.0
            token, node = walk.step(node, scores)
            assert token == right
            path.append(node)
        assert tree.tokens[path[:2]].tolist() == [1, follows]
        assert path[2] is None
        assert tree.proposers(path[0]) == (0, 1)
        assert tree.proposers(path[1]) == (follows - 2,)


def test_tokens_read_back_at_once_are_those_read_one_by_one():
    """As on a GPU, greedily and without processors; criteria of unknown kinds see each token."""
    generator = torch.Generator().manual_seed(0)
    parents = torch.tensor([-1, 0, 0, 1, 1])
    tokens, depths = torch.tensor([3, 0, 1, 0, 2]), torch.tensor([0, 1, 1, 2, 2])
    ones = torch.ones(1, 5)
    tree = taps_hf.DraftTree(tokens, parents, depths, ones, ones)
    lengths = set()
    for _ in range(50):
        logits = torch.randint(0, 4, (5, 4), generator=generator).to(torch.bfloat16)  # with ties
        for length in (3, 9):
            walks = []
            for at_once in (False, True):
                stop = StoppingCriteriaList([MaxLengthCriteria(length)])
                start = torch.tensor([[1, 3]])
                walk = Walk(start, LogitsProcessorList(), stop, WalkVerifier, False)
                assert not walk._chooses_at_once  # on a CPU
                walk._chooses_at_once = at_once
                path = walk.along(tree, logits)
                walks.append((path.nodes, path.accepted, path.tokens.tolist(), walk.is_finished))
            assert walks[0] == walks[1]
            lengths.add(len(walks[0][0]))
    assert lengths == {1, 2, 3}


def test_a_walk_is_plain_generates_inner_loop():
    """Processors, criteria and streamers see what they would see token by token."""
    seen = {"processor": [], "criterion": [], "token": []}

    def process(input_ids, scores):
        seen["processor"].append(input_ids[0].tolist())
        return scores

    def stop(input_ids, scores):
        seen["criterion"].append(input_ids[0].tolist())
        return torch.tensor([input_ids[0, -1] == 6])

    nodes = torch.arange(4)
    ones = torch.ones(1, 4)
    tree = taps_hf.DraftTree(torch.tensor([3, 4, 5, 6]), nodes - 1, nodes, ones, ones)
    logits = torch.eye(8)[[4, 5, 6, 7]]
    for end, tokens, accepted in ((4, [4, 5, 6], 3), (3, [4, 5, 1], 2)):
        start, listen = torch.tensor([[3]]), seen["token"].append
        walk = Walk(start, process, stop, WalkVerifier, False, True, True, listen)
        scored = logits.clone()
        if end == 3:
            scored[2] = torch.eye(8)[1]
        path = walk.along(tree, scored)
        assert (path.tokens.tolist(), path.nodes) == (tokens, [0, 1, 2])
        assert path.accepted == [1, 2, 3][:accepted]
        assert walk.is_finished == (end == 4)
        assert walk.input_ids.tolist() == [[3, *tokens]]
        assert len(walk.scores) == len(walk.logits) == 3
        assert seen["processor"][-3:] == [[3], [3, *tokens[:1]], [3, *tokens[:2]]]
        assert seen["criterion"][-3:] == [[3, *tokens[:n]] for n in (1, 2, 3)]
        assert [int(token) for token in seen["token"][-3:]] == tokens
