"""Growing B draft trees together, level by level; loops run over depths, never over nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .tree import DraftTree, SampledProposals

GoOn = Callable[[int, torch.Tensor], bool]
"""Asked after each level: its depth and the log V of the nodes that would be expanded, (B, n)."""


@dataclass
class Expansion:
    """Children proposed for F nodes in each of B trees, k each.

    Args:
        tokens: (B, F, k) int64.
        log_confidence: (B, F, k) float32: log c of each child, at most 0.
        entropy: (B, F) float32, nats, of the distribution they come from; None if not asked.
        probabilities: (B, F, vocabulary) float32: that distribution, for sampled children only.
    """

    tokens: torch.Tensor
    log_confidence: torch.Tensor
    entropy: torch.Tensor | None
    probabilities: torch.Tensor | None


class Drafting(Protocol):
    """What tells a growing tree's nodes: drafters at the end of a text, or at several places."""

    def expand(self, hidden: torch.Tensor, k: int) -> Expansion:
        """Children of nodes with predicted features (B, F, hidden)."""

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, visible: torch.Tensor, depth: int
    ) -> torch.Tensor:
        """Run one level of nodes.

        Args:
            tokens: (B, F) int64: tokens of the nodes at `depth`.
            hidden: (B, F, hidden): predicted features at their parents.
            visible: (B, F, S) bool: which of the S tree slots run so far, these F last, each may
                read.
            depth: 1 for children of the root.

        Returns:
            (B, F, hidden): predicted features at the nodes.
        """


@dataclass
class Level:
    """Candidates at one depth of B trees, n in each.

    Args:
        depth: from 1.
        tokens: (B, n) int64.
        parents: (B, n) int64: node indices. Candidate i of all levels becomes node i + 1.
        log_confidence: (B, n) float32: log c.
        log_path: (B, n) float32: log V.
        entropy: (B, n) float32, nats: of the distribution the candidate is from; None if not asked.
        source: (n,) int64: which expanded node the candidate is a child of.
        probabilities: (B, F, vocabulary) float32: of each expanded node; sampled children only.
    """

    depth: int
    tokens: torch.Tensor
    parents: torch.Tensor
    log_confidence: torch.Tensor
    log_path: torch.Tensor
    entropy: torch.Tensor | None
    source: torch.Tensor
    probabilities: torch.Tensor | None


def level_of(
    children: Expansion,
    depth: int,
    nodes: torch.Tensor,
    log_path: torch.Tensor,
    chosen: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Level:
    """The candidates among the children of F expanded nodes.

    Args:
        children: k of each node.
        depth: theirs.
        nodes: (B, F) int64: indices of the expanded nodes.
        log_path: (B, F) float32: log V of the expanded nodes.
        chosen: (n,) int64 each: of which node and which of its children a candidate is; by default
            all are candidates.
    """
    width = children.tokens.shape[2]
    if chosen is None:
        index = torch.arange(nodes.shape[1] * width, device=nodes.device)
        row = index // width
    else:
        row, rank = chosen
        index = row * width + rank
    confidence = children.log_confidence.flatten(1)[:, index]
    return Level(
        depth,
        children.tokens.flatten(1)[:, index],
        nodes[:, row],
        confidence,
        log_path[:, row] + confidence,
        None if children.entropy is None else children.entropy[:, row],
        row,
        children.probabilities,
    )


def grow_dynamic(
    drafting: Drafting, hidden: torch.Tensor, top_k: int, depth: int, go_on: GoOn | None = None
) -> list[Level]:
    """All candidates of EAGLE-2's trees (arXiv 2406.16858, section 4.1).

    Level by level the `top_k` likeliest children of the `top_k` best nodes by path confidence.

    Args:
        drafting: the drafters.
        hidden: (B, 1, hidden): predicted features at the roots.
        top_k: children per node, and nodes expanded per level.
        depth: levels below the root, at least 1.
        go_on: whether another level is grown.
    """
    batch, device = len(hidden), hidden.device
    children = drafting.expand(hidden, top_k)
    k = children.tokens.shape[2]
    root = torch.zeros(batch, 1, dtype=torch.long, device=device)
    levels = [level_of(children, 1, root, torch.zeros(batch, 1, device=device))]
    best = torch.arange(k, device=device).expand(batch, -1)  # candidates that are expanded next
    above = torch.zeros(batch, k, 0, dtype=torch.bool, device=device)  # slots of their ancestors
    hidden = hidden.expand(-1, k, -1)  # predicted features at their parents
    first = 1  # node index of the last level's first candidate
    for deeper in range(2, depth + 1):
        last = levels[-1]
        log_path = last.log_path.gather(1, best)
        if go_on is not None and not go_on(last.depth, log_path):
            break
        visible = torch.cat([above, _eye(best.shape[1], batch, device)], dim=2)
        hidden = drafting.step(last.tokens.gather(1, best), hidden, visible, last.depth)
        children = drafting.expand(hidden, k)
        levels.append(level_of(children, deeper, best + first, log_path))
        first += last.tokens.shape[1]
        paths = levels[-1].log_path
        best = paths.topk(min(top_k, paths.shape[1]), dim=1).indices
        row = (best // k)[:, :, None]
        hidden = hidden.gather(1, row.expand(-1, -1, hidden.shape[2]))
        above = visible.gather(1, row.expand(-1, -1, visible.shape[2]))
    return levels


def grow_fixed(
    drafting: Drafting,
    hidden: torch.Tensor,
    plan: Sequence[tuple[list[int], list[int], list[int]]],
    go_on: GoOn | None = None,
) -> list[Level]:
    """The nodes of trees of one fixed shape.

    Args:
        drafting: the drafters.
        hidden: (B, 1, hidden): predicted features at the roots.
        plan: per level, for each node which expanded node is its parent and its rank among that
            one's children; and which nodes of the level are expanded.
        go_on: whether another level is grown.
    """
    batch, device = len(hidden), hidden.device
    nodes = torch.zeros(batch, 1, dtype=torch.long, device=device)
    above = torch.zeros(batch, 1, 0, dtype=torch.bool, device=device)
    log_path = torch.zeros(batch, 1, device=device)
    levels: list[Level] = []
    first = 1
    for depth, (parents, ranks, expanded) in enumerate(plan, start=1):
        children = drafting.expand(hidden, max(ranks) + 1)
        row, rank, inner = (
            torch.tensor(x, dtype=torch.long, device=device) for x in (parents, ranks, expanded)
        )
        level = level_of(children, depth, nodes, log_path, (row, rank))
        levels.append(level)
        log_path = level.log_path[:, inner]
        if depth == len(plan) or (go_on is not None and not go_on(depth, log_path)):
            break
        nodes = (inner + first).expand(batch, -1)
        first += len(parents)
        visible = torch.cat([above[:, row[inner]], _eye(len(expanded), batch, device)], dim=2)
        hidden = drafting.step(level.tokens[:, inner], hidden[:, row[inner]], visible, depth)
        above = visible
    return levels


def assemble(levels: Sequence[Level], row: int, root: torch.Tensor) -> DraftTree:
    """Tree `row` of the batch, with all its candidates, as proposed by one drafter.

    Args:
        levels: from depth 1 on.
        row: which tree.
        root: (1,) int64: its root's token.
    """

    def of_nodes(name: str, at_root: float) -> torch.Tensor:
        values = [getattr(level, name)[row] for level in levels]
        return torch.cat([values[0].new_full((1,), at_root), *values])[None]

    parents = torch.cat([level.parents[row] for level in levels])
    depths = [torch.full_like(level.source, level.depth) for level in levels]
    proposals = None
    if levels[0].probabilities is not None:
        rows, count = [], 0
        for level in levels:
            rows.append(level.source + count)
            count += level.probabilities.shape[1]
        proposals = SampledProposals(
            parents=parents,
            children=torch.arange(1, len(parents) + 1, device=root.device),
            rows=torch.cat(rows),
            probabilities=torch.cat([level.probabilities[row] for level in levels]),
        )
    return DraftTree(
        tokens=torch.cat([root, *(level.tokens[row] for level in levels)]),
        parents=torch.cat([torch.full_like(root, -1), parents]),
        depths=torch.cat([torch.zeros_like(root), *depths]),
        confidence=of_nodes("log_confidence", 0.0).exp(),
        path_confidence=of_nodes("log_path", 0.0).exp(),
        entropy=None if levels[0].entropy is None else of_nodes("entropy", torch.nan),
        proposals=proposals,
    )


def _eye(size: int, batch: int, device: torch.device) -> torch.Tensor:
    return torch.eye(size, dtype=torch.bool, device=device).expand(batch, -1, -1)
