"""Shapes of draft trees: which nodes a drafter's tree has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from .growth import Drafting, GoOn, Level, grow_dynamic, grow_fixed
from .tree import DraftTree


class TreeShape(ABC):
    """How a drafter's tree grows.

    A shape says which nodes there are, and asks a [`Drafting`] for them; it knows nothing of
    models. Drafters that do not grow level by level (n-grams) keep to its [`num_nodes`] and propose
    what they have.

    `follows_tokens` says whether which nodes are grown or kept depends on the tokens proposed. Such
    shapes cannot be used with sampled proposals: keeping a sampled token *because* of what it is
    changes its distribution, and the rejection rule would no longer be exact.

    A shape needs no `__hash__`. One with a `repr` that tells its settings is told from others in
    the figures of an evaluation.
    """

    follows_tokens: ClassVar[bool]

    num_nodes: int = 64
    """Most nodes a tree has, the root not counted."""

    @property
    def min_vocab_size(self) -> int:
        """How many tokens a drafter must score for the tree to be grown."""
        return 1

    @abstractmethod
    def grow(
        self, drafting: Drafting, hidden: torch.Tensor, max_depth: int, go_on: GoOn | None = None
    ) -> list[Level]:
        """Grow B trees together.

        The levels must not depend on `max_depth` but for how many they are: grown deeper and cut,
        they are the same.

        Args:
            drafting: what proposes children and predicts features.
            hidden: (B, 1, hidden): predicted features at the roots.
            max_depth: at least 1: no node may lie deeper.
            go_on: asked after each level whether another one is worth its time.

        Returns:
            the candidates of each level, from depth 1 on.
        """

    def prune(self, tree: DraftTree) -> DraftTree:
        """What is proposed of one tree with all its candidates: all of it, unless overridden."""
        return tree


@dataclass(frozen=True)
class DynamicTree(TreeShape):
    """EAGLE-2's tree, shaped by confidence (arXiv 2406.16858, section 4).

    Level by level the `top_k` most likely children of the `top_k` best nodes (by path confidence
    V) are proposed; of all candidates the `num_nodes` best by V are kept.

    Args:
        depth: levels below the root.
        top_k: children per node, and nodes expanded per level.
        num_nodes: nodes kept, not counting the root.
    """

    depth: int = 5
    top_k: int = 8
    num_nodes: int = 24
    follows_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("depth", "top_k", "num_nodes"):
            _check_positive(f"DynamicTree({name}=...)", getattr(self, name))

    def grow(
        self, drafting: Drafting, hidden: torch.Tensor, max_depth: int, go_on: GoOn | None = None
    ) -> list[Level]:
        return grow_dynamic(drafting, hidden, self.top_k, min(self.depth, max_depth), go_on)

    def prune(self, tree: DraftTree) -> DraftTree:
        return tree.best(self.num_nodes)


class FixedTree(TreeShape):
    """A tree whose shape is fixed beforehand, by ranks (as Medusa's and EAGLE-1's).

    Args:
        paths: every node as the ranks of the choices that lead to it: `(0,)` is the most likely
            child of the root, `(0, 1)` the second most likely child of that. Any order; a node's
            parent and its siblings of lower rank must be there. (When proposals are sampled, a
            second draw without its first is not distributed as the rejection rule assumes.)

    Raises:
        ValueError: for no paths, repeated ones, or one whose parent or elder sibling is missing.
    """

    follows_tokens: ClassVar[bool] = False

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        try:
            nodes = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        except TypeError:
            raise ValueError(f"`paths` is {paths!r}, expected paths of ranks.") from None
        known = {(), *nodes}
        if not nodes or () in nodes or len(known) != len(nodes) + 1:
            raise ValueError(f"`paths` is {paths!r}, expected distinct, non-empty paths.")
        for path in nodes:
            if path[-1] < 0:
                raise ValueError(f"`paths` has {path}, expected ranks from 0.")
            needed = [path[:-1]] + [(*path[:-1], path[-1] - 1)] * (path[-1] > 0)
            for other in needed:
                if other not in known:
                    raise ValueError(
                        f"`paths` has {path} but not {other}; expected a node's parent and its "
                        "siblings of lower rank."
                    )
        self.paths = tuple(nodes)

    @classmethod
    def from_branching(cls, branching: Sequence[int]) -> FixedTree:
        """The full tree in which every node at depth d has `branching[d]` children."""
        if not isinstance(branching, Sequence):
            raise ValueError(f"`branching` is {branching!r}, expected a number for each depth.")
        for width in branching:
            _check_positive("FixedTree.from_branching([...])", width)
        paths: list[tuple[int, ...]] = []
        level: list[tuple[int, ...]] = [()]
        for width in branching:
            level = [(*path, rank) for path in level for rank in range(width)]
            paths += level
        return cls(paths)

    @property
    def min_vocab_size(self) -> int:
        return 1 + max(path[-1] for path in self.paths)

    @property
    def depth(self) -> int:
        return len(self.paths[-1])

    @property
    def num_nodes(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"FixedTree({list(self.paths)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FixedTree) and self.paths == other.paths

    def __hash__(self) -> int:
        return hash(self.paths)

    @cached_property
    def _plan(self) -> list[tuple[list[int], list[int], list[int]]]:
        """Per level: each node's parent (among the expanded) and rank; which nodes are expanded."""
        inner = {path[:-1] for path in self.paths}
        plan = []
        rows = {(): 0}
        for depth in range(1, self.depth + 1):
            level = [path for path in self.paths if len(path) == depth]
            parents = [rows[path[:-1]] for path in level]
            ranks = [path[-1] for path in level]
            expanded = [i for i, path in enumerate(level) if path in inner]
            rows = {level[i]: row for row, i in enumerate(expanded)}
            plan.append((parents, ranks, expanded))
        return plan

    def grow(
        self, drafting: Drafting, hidden: torch.Tensor, max_depth: int, go_on: GoOn | None = None
    ) -> list[Level]:
        return grow_fixed(drafting, hidden, self._plan[:max_depth], go_on)


def ChainTree(length: int) -> FixedTree:  # noqa: N802 (reads as the shape it makes)
    """A single path of `length` nodes, each the most likely (or the one sampled) continuation."""
    _check_positive("ChainTree(length)", length)
    return FixedTree.from_branching([1] * length)


def _check_positive(what: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} got {value!r}, expected a positive integer.")
