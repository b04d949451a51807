from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taps_hf import DraftTree, concatenate, merge
from taps_hf.trees.tree import SampledProposals, move

quick = settings(deadline=None, max_examples=50)

VOCAB = 4
Path = tuple[int, ...]
Trie = dict[Path, tuple[float, float]]  # path -> (confidence, entropy), parents before children

# Few, dyadic values: products are exact in float32 and ties are frequent. 1.0 makes a child tie
# with its parent, the case in which a node budget could cut a node off.
CONFIDENCES = [1.0, 1.0, 0.5, 0.25]


@st.composite
def tries(draw, max_nodes: int = 10) -> Trie:
    trie: Trie = {}
    known: list[Path] = [()]
    for _ in range(draw(st.integers(0, max_nodes))):
        path = (*draw(st.sampled_from(known)), draw(st.integers(0, VOCAB - 1)))
        if path not in trie:
            trie[path] = (draw(st.sampled_from(CONFIDENCES)), draw(st.integers(0, 8)) / 4)
            known.append(path)
    return trie


def several_tries(most: int = 3):
    return st.lists(tries(), min_size=1, max_size=most)


def value(trie: Trie, path: Path) -> float:
    return math.prod(trie[path[:depth]][0] for depth in range(1, len(path) + 1))


def tree_of(trie: Trie, drafter: int = 0, num_drafters: int = 1, sampled: bool = False):
    """The trie as one drafter's tree, nodes in the dictionary's order (not sorted by depth)."""
    index = {(): 0, **{path: i for i, path in enumerate(trie, start=1)}}

    def column(of, at_root: float) -> torch.Tensor:
        full = torch.full((num_drafters, len(index)), torch.nan)
        full[drafter, 1:] = torch.tensor([of(path) for path in trie])
        full[:, 0] = at_root
        return full

    proposals = None
    if sampled:
        # One distribution for each node that has children, recognisable by its values.
        inner = list(dict.fromkeys(path[:-1] for path in trie))
        proposals = SampledProposals(
            parents=torch.tensor([index[path[:-1]] for path in trie], dtype=torch.long),
            children=torch.tensor([index[path] for path in trie], dtype=torch.long),
            rows=torch.tensor([inner.index(path[:-1]) for path in trie], dtype=torch.long),
            probabilities=torch.tensor([distribution(drafter, path) for path in inner]).reshape(
                len(inner), VOCAB
            ),
        )
    return DraftTree(
        tokens=torch.tensor([9, *(path[-1] for path in trie)]),
        parents=torch.tensor([-1, *(index[path[:-1]] for path in trie)]),
        depths=torch.tensor([0, *(len(path) for path in trie)]),
        confidence=column(lambda path: trie[path][0], 1.0),
        path_confidence=column(lambda path: value(trie, path), 1.0),
        entropy=column(lambda path: trie[path][1], torch.nan),
        proposals=proposals,
    )


def distribution(drafter: int, path: Path) -> list[float]:
    code = hash((drafter, path)) % 997  # ints and tuples of them hash alike in every run
    return [float(code), float(drafter), float(len(path)), 0.0]


def trees_of(some: list[Trie], sampled: bool = False) -> list[DraftTree]:
    return [tree_of(trie, i, len(some), sampled) for i, trie in enumerate(some)]


def paths_of(tree: DraftTree) -> list[Path]:
    """The token path of every node; fails unless parents precede children."""
    assert tree.parents[0] == -1
    paths: list[Path] = [()]
    for node in range(1, len(tree)):
        parent = int(tree.parents[node])
        assert 0 <= parent < node
        assert tree.depths[node] == tree.depths[parent] + 1
        paths.append((*paths[parent], int(tree.tokens[node])))
    return paths


def content(tree: DraftTree) -> dict[tuple[Path, int], tuple[float, float, float]]:
    """(path, drafter) -> (c, V, entropy), for what drafters proposed; siblings must differ."""
    paths = paths_of(tree)
    assert len(set(paths)) == len(paths)
    found = {}
    for node, path in enumerate(paths[1:], start=1):
        for drafter in range(tree.num_drafters):
            cells = [x[drafter, node] for x in (tree.confidence, tree.path_confidence)]
            known = {bool(cell.isnan()) for cell in cells}
            assert len(known) == 1
            if not cells[0].isnan():
                found[path, drafter] = (*map(float, cells), float(tree.entropy[drafter, node]))
        assert any((path, drafter) in found for drafter in range(tree.num_drafters))
    return found


def union_of(some: list[Trie]) -> dict[tuple[Path, int], tuple[float, float, float]]:
    return {
        (path, drafter): (confidence, value(trie, path), entropy)
        for drafter, trie in enumerate(some)
        for path, (confidence, entropy) in trie.items()
    }


@quick
@given(tries())
def test_ancestors_are_the_prefixes(trie):
    tree = tree_of(trie)
    paths = paths_of(tree)
    expected = [[a == b[: len(a)] for a in paths] for b in paths]
    assert tree.ancestors().tolist() == expected


@quick
@given(tries(), st.data())
def test_select_keeps_what_it_is_given(trie, data):
    kept: list[Path] = []
    for path in trie:  # a connected part: a node may stay if its parent did
        if (len(path) == 1 or path[:-1] in kept) and data.draw(st.booleans()):
            kept.append(path)
    index = list(trie)
    nodes = torch.tensor([0, *(index.index(path) + 1 for path in kept)])
    assert content(tree_of(trie).select(nodes)) == {
        key: cells for key, cells in union_of([trie]).items() if key[0] in kept
    }


@quick
@given(several_tries(), st.integers(0, 12))
def test_best_keeps_the_surest_connected_nodes(some, budget):
    union = merge(trees_of(some))
    best = union.best(budget)
    expected = union_of(some)
    surest: dict[Path, float] = {}
    for (path, _), (_, path_confidence, _) in expected.items():
        surest[path] = max(surest.get(path, 0.0), path_confidence)
    kept = set(paths_of(best)) - {()}  # paths_of fails if a parent is missing
    ranked = sorted(surest.values(), reverse=True)
    assert sorted((surest[path] for path in kept), reverse=True) == ranked[:budget]
    assert content(best) == {key: cells for key, cells in expected.items() if key[0] in kept}
    assert paths_of(best)[1:] == [path for path in paths_of(union) if path in kept]
    assert paths_of(merge(trees_of(some), num_nodes=budget)) == paths_of(best)


@quick
@given(several_tries(), st.integers(0, 12))
def test_best_keeps_parents_in_the_papers_packing(some, budget):
    packed = concatenate(trees_of(some))
    best = packed.best(budget)
    paths_of(best)
    assert len(best) == min(budget, len(packed) - 1) + 1


def test_ties_go_to_the_earlier_node():
    trie = {(0,): (1.0, 0.0), (1,): (1.0, 0.0), (0, 2): (1.0, 0.0), (1, 3): (1.0, 0.0)}
    for budget in range(5):
        assert paths_of(tree_of(trie).best(budget))[1:] == list(trie)[:budget]


@quick
@given(several_tries())
def test_merge_is_the_union_of_paths(some):
    union = merge(trees_of(some))
    assert set(paths_of(union)) == {(), *itertools.chain(*some)}
    assert content(union) == union_of(some)
    assert union.tokens[0] == 9
    assert (
        union.confidence[:, 0].tolist() == union.path_confidence[:, 0].tolist() == [1] * len(some)
    )


@quick
@given(several_tries())
def test_merged_nodes_are_ordered_by_depth_parent_and_token(some):
    # Of a single tree merge keeps the order, so a tree that proposes nothing stands beside it.
    union = merge([*trees_of(some), tree_of({}, 0, len(some))])
    keys = torch.stack([union.depths, union.parents, union.tokens], dim=1).tolist()
    assert keys[1:] == sorted(keys[1:])


@quick
@given(several_tries(), st.randoms(use_true_random=False))
def test_merge_does_not_depend_on_the_order(some, random):
    trees = trees_of(some)
    shuffled = random.sample(trees, len(trees))
    assert content(merge(shuffled)) == content(merge(trees))


@quick
@given(st.lists(tries(), min_size=3, max_size=3))
def test_merge_is_associative_and_idempotent(some):
    trees = trees_of(some)
    union = merge(trees)
    stepwise = merge([trees[0], merge(trees[1:])])
    again = merge([union, union])
    for other in (stepwise, again):
        assert paths_of(other) == paths_of(union)
        assert content(other) == content(union)


@quick
@given(several_tries())
def test_concatenate_places_the_trees_side_by_side(some):
    """Every tree's nodes in their order; of equal paths the first says what all drafters said."""
    packed = concatenate(trees_of(some))
    assert len(packed) == 1 + sum(map(len, some))
    paths = paths_of(packed)[1:]
    assert paths == [path for trie in some for path in trie]
    columns = (packed.confidence, packed.path_confidence, packed.entropy)
    seen = set()
    for node, path in enumerate(paths, start=1):
        parent = paths[packed.parents[node] - 1] if packed.parents[node] else ()
        assert parent == path[:-1]
        if path[:-1]:  # what follows a path hangs below its first copy
            assert paths.index(path[:-1]) + 1 == packed.parents[node]
        owner = next(d for d, trie in enumerate(some) if node <= sum(map(len, some[: d + 1])))
        for drafter, trie in enumerate(some):
            found = [float(x[drafter, node]) for x in columns]
            if drafter == owner or (path in trie and path not in seen):
                c, h = trie[path]
                assert found == [c, value(trie, path), h]
            else:
                assert all(map(math.isnan, found))
        seen.add(path)


@quick
@given(several_tries(), st.sampled_from([merge, concatenate]))
def test_sampled_proposals_keep_pointing_at_their_nodes(some, pack):
    tree = pack(trees_of(some, sampled=True))
    paths = paths_of(tree)
    p = tree.proposals
    found = [
        (paths[parent], paths[child], p.probabilities[row].tolist())
        for parent, child, row in zip(p.parents.tolist(), p.children.tolist(), p.rows.tolist())
    ]
    # All attempts, in the order of the drafters and, within one, in the order they were drawn.
    assert found == [
        (path[:-1], path, distribution(drafter, path[:-1]))
        for drafter, trie in enumerate(some)
        for path in trie
    ]
    assert torch.equal(tree.parents[p.children], p.parents)


@quick
@given(several_tries())
def test_means_leave_out_the_root_and_other_drafters(some):
    union = merge(trees_of(some))
    for drafter, trie in enumerate(some):
        confidence, entropy = union.mean_confidence()[drafter], union.mean_entropy()[drafter]
        if not trie:
            assert confidence.isnan()
            assert entropy.isnan()
        else:
            size = len(trie)
            assert confidence.item() == pytest.approx(sum(c for c, _ in trie.values()) / size)
            assert entropy.item() == pytest.approx(sum(h for _, h in trie.values()) / size)


def test_a_root_proposes_nothing():
    root = DraftTree.root(torch.tensor([7]), num_drafters=3)
    assert paths_of(root) == [()]
    assert root.tokens.tolist() == [7]
    assert (root.num_drafters, root.max_depth) == (3, 0)
    assert root.ancestors().tolist() == [[True]]
    assert len(merge([root, root])) == len(concatenate([root, root])) == len(root.best(4)) == 1
    with pytest.raises(ValueError, match="without entropies"):
        root.mean_entropy()


def test_to_moves_every_tensor_but_the_probabilities():
    tree = tree_of({(1,): (0.5, 1.0), (1, 2): (0.5, 1.0)}, sampled=True)
    assert tree.to(torch.device("cpu")) is tree
    moved = tree.to(torch.device("meta"))
    assert moved.proposals.probabilities is tree.proposals.probabilities
    indices = {k: v for k, v in vars(moved.proposals).items() if k != "probabilities"}
    tensors = [*vars(moved).values(), *indices.values()]
    assert {x.device.type for x in tensors if isinstance(x, torch.Tensor)} == {"meta"}
    assert [x.shape for x in tensors[:6]] == [x.shape for x in list(vars(tree).values())[:6]]


def test_trees_that_move_together_keep_their_values():
    trees = [
        tree_of({(1,): (0.5, 1.0), (1, 2): (0.5, 1.0), (3,): (0.25, 0.5)}, sampled=True),
        tree_of({(4,): (0.75, 2.0)}),
        DraftTree.root(torch.tensor([7]), 2),
    ]
    # Another name of the same device: the data takes the way it takes between devices.
    for before, after in zip(trees, move(trees, torch.device("cpu", 0)), strict=True):
        assert after is not before
        pairs = list(zip(vars(before).values(), vars(after).values(), strict=True))
        if before.proposals is not None:
            pairs += zip(vars(before.proposals).values(), vars(after.proposals).values())
        tensors = [pair for pair in pairs if isinstance(pair[0], torch.Tensor)]
        for a, b in tensors:
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("pack", [merge, concatenate])
def test_what_does_not_go_together_is_refused(pack):
    trie = {(1,): (0.5, 1.0)}
    with pytest.raises(ValueError, match="at least one"):
        pack([])
    with pytest.raises(ValueError, match="different numbers of drafters"):
        pack([tree_of(trie, 0, 1), tree_of(trie, 0, 2)])
    with pytest.raises(ValueError, match="differ in kind"):
        pack([tree_of(trie), tree_of(trie, sampled=True)])
    with pytest.raises(ValueError, match="differ in kind"):
        pack([tree_of(trie), DraftTree.root(torch.tensor([9]), 1)])


def test_a_node_budget_on_sampled_trees_is_refused():
    trees = trees_of([{(1,): (0.5, 1.0)}, {(2,): (0.5, 1.0)}], sampled=True)
    for some in (trees, trees[:1]):
        with pytest.raises(ValueError, match=r"`num_nodes` is 3, .* expected None"):
            merge(some, num_nodes=3)
