from __future__ import annotations

import itertools

import pytest
import torch

from taps_hf import ChainTree, DynamicTree, FixedTree, TreeShape
from taps_hf.drafters.base import DraftRequest
from taps_hf.drafters.heads import expand, kept_head
from taps_hf.target import LAST

from ..tiny import VOCAB, prompt, tiny_drafters, tiny_target

Path = tuple[int, ...]


class Reference:
    """A drafter without cache or tree mask: every path is run alone, from the first slot on."""

    def __init__(
        self, family: str = "llama", draft_vocab: int | None = None, seed: int = 0
    ) -> None:
        self.target = tiny_target(family)
        (self.drafter,) = tiny_drafters(1, family, draft_vocab=draft_vocab)
        ids = prompt(9, seed)
        with torch.no_grad():
            features = self.target.base_model(ids).last_hidden_state[0]
        self.tokens, self.features = ids[0, 1:], features[:-1]
        self.root = ids[0, -1:]
        self.hidden = {(): self._run(self.tokens, self.features)}

    def grow(self, shape: TreeShape, max_depth: int = 99, **kwargs):
        session = self.drafter.start([self.drafter], self.target)
        session.observe(self.tokens, {LAST: self.features})
        return session.propose((0,), DraftRequest(self.root, shape, max_depth, **kwargs))[0]

    @torch.no_grad()
    def _run(self, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        embeds = self.target.get_input_embeddings()(tokens)[None]
        return self.drafter(embeds, features[None]).last_hidden_state[0, -1]

    def hidden_at(self, path: Path) -> torch.Tensor:
        if path not in self.hidden:
            drafted = [self.hidden_at(path[:depth]) for depth in range(len(path))]
            self.hidden[path] = self._run(
                torch.cat([self.tokens, torch.tensor(path)]),
                torch.cat([self.features, torch.stack(drafted)]),
            )
        return self.hidden[path]

    @torch.no_grad()
    def distribution(self, path: Path, temperature: float = 1.0) -> dict[int, float]:
        """Token -> probability, likeliest first."""
        logits = self.target.get_output_embeddings()(self.hidden_at(path)).double() / temperature
        ids = self.drafter.draft_token_ids
        ids = range(VOCAB) if ids is None else ids.tolist()
        p = logits[list(ids)].softmax(0).tolist()
        return dict(sorted(zip(ids, p), key=lambda item: -item[1]))


def by_path(tree) -> dict[Path, tuple[float, float]]:
    """Token path -> (c, V), in the order of the nodes."""
    paths: list[Path] = [()]
    for node in range(1, len(tree)):
        paths.append((*paths[tree.parents[node]], int(tree.tokens[node])))
    assert len(set(paths)) == len(paths)
    assert [len(path) for path in paths] == tree.depths.tolist()
    columns = zip(tree.confidence[0].tolist(), tree.path_confidence[0].tolist())
    return dict(list(zip(paths, columns))[1:])


def assert_same(found: dict[Path, tuple[float, float]], expected: dict[Path, tuple]) -> None:
    assert set(found) == set(expected)
    for path, cells in expected.items():
        assert found[path] == pytest.approx(cells, rel=1e-3, abs=1e-6)


def dynamic_reference(reference: Reference, depth: int, top_k: int, num_nodes: int):
    """EAGLE-2, section 4: expand the best of each level, then keep the best of all."""
    found: dict[Path, tuple[float, float]] = {}
    value: dict[Path, float] = {(): 1.0}
    frontier: list[Path] = [()]
    for _ in range(depth):
        level = []
        for path in frontier:
            for token, p in itertools.islice(reference.distribution(path).items(), top_k):
                child = (*path, token)
                value[child] = value[path] * p
                found[child] = (p, value[child])
                level.append(child)
        frontier = sorted(level, key=lambda path: -value[path])[:top_k]
    best = sorted(found, key=lambda path: -value[path])[:num_nodes]
    return {path: found[path] for path in best}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize(("depth", "top_k", "num_nodes"), [(1, 3, 9), (4, 2, 9), (3, 5, 14)])
def test_dynamic_tree_is_eagle_2s(family, depth, top_k, num_nodes):
    for seed in range(2):
        reference = Reference(family, seed=seed)
        tree = reference.grow(DynamicTree(depth, top_k, num_nodes))
        assert_same(by_path(tree), dynamic_reference(reference, depth, top_k, num_nodes))


def test_dynamic_tree_wider_than_the_draft_vocabulary():
    # Four tokens are scored, so four children per node, but the eight best nodes are expanded.
    reference = Reference(draft_vocab=4)
    tree = reference.grow(DynamicTree(depth=3, top_k=8, num_nodes=40))
    assert_same(by_path(tree), dynamic_reference(reference, 3, 8, 40))


@pytest.mark.parametrize(
    "shape",
    [
        FixedTree([(0,), (1,), (2,), (0, 0), (1, 0), (1, 1), (1, 1, 0), (0, 0, 0), (1, 1, 0, 0)]),
        FixedTree.from_branching([3, 1, 2]),
        FixedTree.from_branching([1, 4]),
        ChainTree(5),
        DynamicTree(depth=4, top_k=3, num_nodes=30),
    ],
)
@pytest.mark.parametrize("draft_vocab", [None, 6])
@pytest.mark.parametrize("max_depth", [1, 2, 9])
def test_shapes_against_ranks(shape, draft_vocab, max_depth):
    reference = Reference(draft_vocab=draft_vocab)
    found = by_path(reference.grow(shape, max_depth))
    if isinstance(shape, DynamicTree):
        depth = min(shape.depth, max_depth)
        expected = dynamic_reference(reference, depth, shape.top_k, shape.num_nodes)
    else:
        expected = {}
        for ranks in shape.paths:
            path: Path = ()
            value = 1.0
            for rank in ranks[:max_depth]:
                token, p = list(reference.distribution(path).items())[rank]
                path, value = (*path, token), value * p
                expected[path] = (p, value)
    assert_same(found, expected)
    assert max(map(len, found)) == min(shape.depth, max_depth)
    if draft_vocab is not None:
        assert {t for path in found for t in path} <= set(
            reference.drafter.draft_token_ids.tolist()
        )


def test_another_drafters_rows_are_unknown():
    tree = Reference().grow(DynamicTree(), 3, with_entropy=True).of_drafter(1, 3)
    for values in (tree.confidence, tree.path_confidence, tree.entropy):
        assert values.shape == (3, len(tree))
        assert values[[0, 2], 1:].isnan().all()
        assert not values[1, 1:].isnan().any()
    assert tree.entropy[:, 0].isnan().all()


@pytest.mark.parametrize("shape", [DynamicTree(3, 3, 20), FixedTree.from_branching([2, 3])])
@pytest.mark.parametrize("draft_vocab", [None, 6])
def test_entropy_is_that_of_the_parents_distribution(shape, draft_vocab):
    reference = Reference(draft_vocab=draft_vocab)
    tree = reference.grow(shape, with_entropy=True)
    for path, found in zip(by_path(tree), tree.entropy[0, 1:].tolist()):
        p = torch.tensor(list(reference.distribution(path[:-1]).values()))
        assert found == pytest.approx(float(torch.special.entr(p).sum()), abs=1e-4)


@pytest.mark.parametrize("shape", [FixedTree.from_branching([3, 2, 2]), ChainTree(3)])
@pytest.mark.parametrize("draft_vocab", [None, 6])
def test_sampled_proposals_are_the_drafters_distributions(shape, draft_vocab):
    reference = Reference(draft_vocab=draft_vocab)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tree = reference.grow(shape, sample_temperature=1.7)
    assert len(tree) == shape.num_nodes + 1
    paths = list(by_path(tree))  # by_path fails where siblings are equal
    p = tree.proposals
    assert p.children.tolist() == list(range(1, len(tree)))
    assert torch.equal(tree.parents[p.children], p.parents)
    for child, row in zip(p.children.tolist(), p.rows.tolist()):
        path = paths[child - 1]
        expected = torch.zeros(VOCAB)
        for token, q in reference.distribution(path[:-1], temperature=1.7).items():
            expected[token] = q
        torch.testing.assert_close(p.probabilities[row], expected, rtol=1e-3, atol=1e-6)
        assert float(tree.confidence[0, child]) == pytest.approx(
            float(expected[path[-1]]), rel=1e-3, abs=1e-6
        )


def chi_squared_p_value(observed: torch.Tensor, expected: torch.Tensor) -> float:
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(expected) - 1) / 2)
    return float(torch.special.gammaincc(degrees, statistic / 2))


def test_children_are_draws_without_replacement():
    reference = Reference(draft_vocab=4)
    q = reference.distribution((), temperature=3.0)
    draws = 20_000
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        head = kept_head([reference.drafter], reference.target)
        hidden = reference.hidden_at(()).expand(1, draws, -1)
        (tokens,) = expand(head, hidden, 2, sample_temperature=3.0).tokens
    pairs = list(itertools.permutations(q, 2))
    first = torch.tensor([float((tokens[:, 0] == a).sum()) for a in q])
    both = torch.tensor(
        [float(((tokens[:, 0] == a) & (tokens[:, 1] == b)).sum()) for a, b in pairs]
    )
    assert both.sum() == draws  # siblings are distinct
    assert chi_squared_p_value(first, draws * torch.tensor(list(q.values()))) > 0.01
    expected = draws * torch.tensor([q[a] * q[b] / (1 - q[a]) for a, b in pairs])
    assert chi_squared_p_value(both, expected) > 0.01
    # The test has power: it tells these draws from those of another temperature.
    other = draws * torch.tensor(list(reference.distribution((), temperature=2.5).values()))
    assert chi_squared_p_value(first, other) < 1e-6


def test_deterministic_shapes_draw_no_random_numbers():
    reference = Reference()
    before = torch.get_rng_state()
    for shape in (DynamicTree(), ChainTree(3)):
        reference.grow(shape)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, None])
@pytest.mark.parametrize("name", ["depth", "top_k", "num_nodes"])
def test_dynamic_trees_of_nonsense_are_refused(name, bad):
    with pytest.raises(ValueError, match=rf"DynamicTree\({name}=.*\) got {bad!r}, expected"):
        DynamicTree(**{name: bad})


@pytest.mark.parametrize(
    "paths",
    [
        [],
        [()],
        [(0,), (0,)],
        [(0, 0)],
        [(0,), (1, 0)],
        [(-1,)],
        # A sampled second child is distributed as the rule assumes only beside a first one.
        [(1,)],
        [(0,), (0, 0), (0, 2)],
    ],
)
def test_fixed_trees_of_nonsense_are_refused(paths):
    with pytest.raises(ValueError, match=r"`paths` (is|has)"):
        FixedTree(paths)


@pytest.mark.parametrize("bad", [0, -2, 1.0, False])
def test_chains_and_branchings_of_nonsense_are_refused(bad):
    with pytest.raises(ValueError, match="expected a positive integer"):
        ChainTree(bad)
    with pytest.raises(ValueError, match="expected a positive integer"):
        FixedTree.from_branching([2, bad])
    with pytest.raises(ValueError, match="non-empty"):
        FixedTree.from_branching([])


def test_a_shape_says_how_many_tokens_must_be_scored():
    shape = FixedTree.from_branching([2, 4])
    assert shape.min_vocab_size == 4
    assert len(Reference(draft_vocab=4).grow(shape)) == 1 + 2 + 8
    assert DynamicTree(top_k=9).min_vocab_size == 1  # takes as many as there are


def test_fixed_trees_are_equal_when_their_paths_are():
    shape = FixedTree([(0, 0), (1,), (0,)])
    assert shape == FixedTree([[0], [1], [0, 0]])
    assert hash(shape) == hash(FixedTree([[0], [1], [0, 0]]))
    assert repr(shape) == "FixedTree([(0,), (1,), (0, 0)])"
    assert (shape.depth, shape.num_nodes) == (2, 3)
    assert shape != FixedTree([(0,), (1,)])
    assert ChainTree(3) == FixedTree([(0,), (0, 0), (0, 0, 0)])
    assert shape != "FixedTree"
