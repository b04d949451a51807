"""Shapes of draft trees: how one drafter's tree is grown.

Loops here run over depths, never over nodes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from .drafting import DrafterSession, Expansion
from .tree import DraftTree, SampledProposals


class TreeShape(ABC):
    """How a drafter's tree grows.

    `follows_tokens` says whether which nodes are grown or kept depends on the tokens proposed. Such
    shapes cannot be used with sampled proposals: keeping a sampled token *because* of what it is
    changes its distribution, and the rejection rule would no longer be exact.
    """

    follows_tokens: ClassVar[bool]

    @property
    def min_vocab_size(self) -> int:
        """How many tokens a drafter must score for the tree to be grown."""
        return 1

    @abstractmethod
    def grow(self, session: DrafterSession, root: torch.Tensor, max_depth: int) -> DraftTree:
        """Grow a tree.

        Args:
            session: the drafter; `session.has_context` holds.
            root: (1,) int64: the last emitted token, on the drafter's device.
            max_depth: at least 1: no node may lie deeper.
        """


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

    def grow(self, session: DrafterSession, root: torch.Tensor, max_depth: int) -> DraftTree:
        device = root.device
        hidden = session.begin()
        children = session.expand(hidden, self.top_k)
        k = children.tokens.shape[1]
        # Candidates of all levels, in the order of their levels. Candidate i becomes node i + 1.
        levels = [_Level(children, torch.zeros(1, dtype=torch.long, device=device), 1)]
        log_path = [children.log_confidence]  # (F, k) per level: log V
        best = torch.arange(k, device=device)  # which candidates of the last level are expanded
        first = 1  # node index of the last level's first candidate
        parent_hidden = hidden.expand(k, -1)
        above = torch.zeros(k, 0, dtype=torch.bool, device=device)  # tree slots of their ancestors
        for depth in range(2, min(self.depth, max_depth) + 1):
            tokens = children.tokens.flatten()[best]
            visible = torch.cat([above, _eye(len(best), device)], dim=1)
            hidden = session.step(tokens, parent_hidden, visible, depth - 1)
            expanded = best + first
            first += children.tokens.numel()
            children = session.expand(hidden, k)
            levels.append(_Level(children, expanded, depth))
            path = log_path[-1].flatten()[best][:, None] + children.log_confidence
            log_path.append(path)
            best = path.flatten().topk(min(self.top_k, path.numel())).indices
            row = best // k
            parent_hidden = hidden[row]
            above = visible[row]
        session.end()
        tree = _assemble(session, root, levels, torch.cat([x.flatten() for x in log_path]))
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
        return f"FixedTree(num_nodes={self.num_nodes}, depth={self.depth})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FixedTree) and self.paths == other.paths

    def __hash__(self) -> int:
        return hash(self.paths)

    @cached_property
    def _plan(self) -> list[tuple[list[int], list[int], list[int], int]]:
        """Per level: for each node its parent's row and its rank; which nodes are expanded; k."""
        inner = {path[:-1] for path in self.paths}
        plan = []
        rows = {(): 0}
        for depth in range(1, self.depth + 1):
            level = [path for path in self.paths if len(path) == depth]
            parents = [rows[path[:-1]] for path in level]
            ranks = [path[-1] for path in level]
            expanded = [i for i, path in enumerate(level) if path in inner]
            rows = {level[i]: row for row, i in enumerate(expanded)}
            plan.append((parents, ranks, expanded, max(ranks) + 1))
        return plan

    def grow(self, session: DrafterSession, root: torch.Tensor, max_depth: int) -> DraftTree:
        device = root.device
        hidden = session.begin()
        nodes = torch.zeros(1, dtype=torch.long, device=device)  # node indices of the expanded
        above = torch.zeros(1, 0, dtype=torch.bool, device=device)
        log_path = torch.zeros(1, device=device)  # log V of the expanded nodes
        levels, paths, first = [], [], 1
        for depth, (parents, ranks, expanded, k) in enumerate(self._plan, start=1):
            children = session.expand(hidden, k)
            row, rank, inner = (torch.tensor(x, device=device) for x in (parents, ranks, expanded))
            level = _Level(children, nodes, depth, row, rank)
            levels.append(level)
            paths.append(log_path[row] + children.log_confidence[row, rank])
            if depth == min(self.depth, max_depth):
                break
            nodes, log_path = inner + first, paths[-1][inner]
            first += len(parents)
            visible = torch.cat([above[row[inner]], _eye(len(expanded), device)], dim=1)
            tokens = children.tokens[row, rank][inner]
            hidden = session.step(tokens, hidden[row[inner]], visible, depth)
            above = visible
        session.end()
        return _assemble(session, root, levels, torch.cat(paths))


def ChainTree(length: int) -> FixedTree:  # noqa: N802 (reads as the shape it makes)
    """A single path of `length` nodes, each the most likely (or the one sampled) continuation."""
    _check_positive("ChainTree(length)", length)
    return FixedTree.from_branching([1] * length)


@dataclass
class _Level:
    """Candidates at one depth: all k children of the expanded nodes, or those chosen by rank."""

    children: Expansion
    parents: torch.Tensor  # (F,) int64: node indices of the expanded nodes
    depth: int
    row: torch.Tensor | None = None  # (n,) int64: which expanded node a candidate belongs to
    rank: torch.Tensor | None = None  # (n,) int64: which of its children it is

    def __post_init__(self) -> None:
        if self.row is None:
            count, k = self.children.tokens.shape
            index = torch.arange(count * k, device=self.parents.device)
            self.row, self.rank = index // k, index % k


def _assemble(
    session: DrafterSession, root: torch.Tensor, levels: list[_Level], log_path: torch.Tensor
) -> DraftTree:
    """The tree of all candidates of all levels, as proposed by the session's drafter.

    `log_path`: (candidates,) float32, log V.
    """
    tokens = [level.children.tokens[level.row, level.rank] for level in levels]
    parents = [level.parents[level.row] for level in levels]
    depths = [torch.full_like(t, level.depth) for t, level in zip(tokens, levels)]
    log_confidence = [level.children.log_confidence[level.row, level.rank] for level in levels]

    def row_of_drafter(values: torch.Tensor, at_root: float) -> torch.Tensor:
        full = values.new_full((session.num_drafters, len(values) + 1), torch.nan)
        full[session.index, 1:] = values
        full[:, 0] = at_root
        return full

    entropy = proposals = None
    if session.with_entropy:
        entropy = row_of_drafter(
            torch.cat([level.children.entropy[level.row, 0] for level in levels]), torch.nan
        )
    parents_of = torch.cat(parents)
    if levels[0].children.probabilities is not None:
        counts = [0]
        for level in levels:
            counts.append(counts[-1] + len(level.parents))
        proposals = SampledProposals(
            parents=parents_of,
            children=torch.arange(1, len(parents_of) + 1, device=root.device),
            rows=torch.cat([level.row + start for level, start in zip(levels, counts)]),
            probabilities=torch.cat([level.children.probabilities for level in levels]),
        )
    return DraftTree(
        tokens=torch.cat([root, *tokens]),
        parents=torch.cat([torch.full_like(root, -1), parents_of]),
        depths=torch.cat([torch.zeros_like(root), *depths]),
        confidence=row_of_drafter(torch.cat(log_confidence).exp(), 1.0),
        path_confidence=row_of_drafter(log_path.exp(), 1.0),
        entropy=entropy,
        proposals=proposals,
    )


def _eye(size: int, device: torch.device) -> torch.Tensor:
    return torch.eye(size, dtype=torch.bool, device=device)


def _check_positive(what: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} got {value!r}, expected a positive integer.")
