"""Growing B draft trees together, level by level; loops run over depths, never over nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch

from .tree import DraftTree, SampledProposals, move_together

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
    """Candidates at one depth of B trees, n in each: children of F expanded nodes.

    Args:
        tokens: (B, n) int64.
        log_confidence: (B, n) float32: log c.
        log_path: (B, n) float32: log V.
        expanded: (B, F) int64: which candidates of the level above were expanded; 0 for the root.
        source: n numbers: which of the expanded nodes a candidate is a child of.
        entropy: (B, F) float32, nats, of the expanded nodes' distributions; None if not asked.
        probabilities: (B, F, vocabulary) float32: those distributions; sampled children only.
    """

    tokens: torch.Tensor
    log_confidence: torch.Tensor
    log_path: torch.Tensor
    expanded: torch.Tensor
    source: Sequence[int]
    entropy: torch.Tensor | None
    probabilities: torch.Tensor | None


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
    tokens, log_path = children.tokens.flatten(1), children.log_confidence.flatten(1)
    k = tokens.shape[1]
    root = torch.zeros(batch, 1, dtype=torch.long, device=device)
    levels = [
        Level(tokens, log_path, log_path, root, [0] * k, children.entropy, children.probabilities)
    ]
    # What is expanded next, at first all: candidates, tokens, and features at their parents.
    best = torch.arange(k, device=device).expand(batch, -1)
    hidden = hidden.expand(-1, k, -1)
    itself = torch.eye(top_k, dtype=torch.bool, device=device).expand(batch, -1, -1)
    visible = itself[:, :k, :k]
    for deeper in range(2, depth + 1):
        if deeper > 2:
            last = levels[-1]
            log_path, best = last.log_path.topk(min(top_k, last.log_path.shape[1]), dim=1)
            tokens = last.tokens.gather(1, best)
            row = (best // k)[:, :, None]
            hidden = hidden.gather(1, row.expand(-1, -1, hidden.shape[2]))
            above = visible.gather(1, row.expand(-1, -1, visible.shape[2]))
            width = best.shape[1]
            visible = torch.cat([above, itself[:, :width, :width]], dim=2)
        if go_on is not None and not go_on(deeper - 1, log_path):
            break
        hidden = drafting.step(tokens, hidden, visible, deeper - 1)
        children = drafting.expand(hidden, k)
        levels.append(
            Level(
                children.tokens.flatten(1),
                children.log_confidence.flatten(1),
                (log_path[:, :, None] + children.log_confidence).flatten(1),
                best,
                [i // k for i in range(best.shape[1] * k)],
                children.entropy,
                children.probabilities,
            )
        )
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
    widths = [max(ranks) + 1 for _, ranks, _ in plan]
    # Per level: parents, places among all children of all parents, and who is expanded.
    indices = iter(
        move_together(
            [
                torch.tensor(index, dtype=torch.long, device="cpu")
                for (parents, ranks, inner), width in zip(plan, widths)
                for index in (
                    parents,
                    [parent * width + rank for parent, rank in zip(parents, ranks)],
                    inner,
                )
            ],
            device,
        )
    )
    expanded = torch.zeros(batch, 1, dtype=torch.long, device=device)
    above = torch.zeros(batch, 1, 0, dtype=torch.bool, device=device)
    log_path = torch.zeros(batch, 1, device=device)
    levels: list[Level] = []
    for depth, ((source, _, _), width) in enumerate(zip(plan, widths), start=1):
        row, places, inner = next(indices), next(indices), next(indices)
        children = drafting.expand(hidden, width)
        confidence = children.log_confidence.flatten(1)[:, places]
        level = Level(
            children.tokens.flatten(1)[:, places],
            confidence,
            log_path[:, row] + confidence,
            expanded,
            source,
            children.entropy,
            children.probabilities,
        )
        levels.append(level)
        log_path = level.log_path[:, inner]
        if depth == len(plan) or (go_on is not None and not go_on(depth, log_path)):
            break
        expanded = inner.expand(batch, -1)
        itself = torch.eye(len(inner), dtype=torch.bool, device=device).expand(batch, -1, -1)
        visible = torch.cat([above[:, row[inner]], itself], dim=2)
        hidden = drafting.step(level.tokens[:, inner], hidden[:, row[inner]], visible, depth)
        above = visible
    return levels


def on_host(levels: Sequence[Level]) -> list[Level]:
    """Levels on the CPU, in one transfer; distributions stay where they are."""
    slots = [
        (index, field.name)
        for index, level in enumerate(levels)
        for field in fields(level)
        if field.name != "probabilities" and isinstance(getattr(level, field.name), torch.Tensor)
    ]
    tensors = [getattr(levels[index], name) for index, name in slots]
    moved = list(levels)
    for (index, name), tensor in zip(slots, move_together(tensors, torch.device("cpu"))):
        moved[index] = replace(moved[index], **{name: tensor})
    return moved


def assemble(levels: Sequence[Level], row: int, root: torch.Tensor) -> DraftTree:
    """Tree `row` of the batch on the CPU, with all its candidates, as proposed by one drafter.

    Args:
        levels: from depth 1 on. Trees of several rows want them [`on_host`] first, once for all.
        row: which tree.
        root: (1,) int64: its root's token.
    """
    levels = on_host(levels)
    depths, sources, offsets = [0], [], []  # of nodes; of candidates; of expanded nodes
    above, first = 0, 1  # node indices of the first candidates of the level above, and of a level
    for depth, level in enumerate(levels, start=1):
        depths += [depth] * len(level.source)
        sources += [len(offsets) + source for source in level.source]
        offsets += [above] * level.expanded.shape[1]
        above, first = first, first + len(level.source)
    source = torch.tensor(sources, device="cpu")
    parents = torch.cat([level.expanded[row] for level in levels]) + torch.tensor(
        offsets, device="cpu"
    )
    proposals = None
    if levels[0].probabilities is not None:
        proposals = SampledProposals(
            parents=parents[source],
            children=torch.arange(1, first, device="cpu"),
            rows=source,
            probabilities=torch.cat([level.probabilities[row] for level in levels]),
        )
    zero = torch.zeros(1, device="cpu")
    logs = [
        [zero, *(level.log_confidence[row] for level in levels)],
        [zero, *(level.log_path[row] for level in levels)],
    ]
    confidence, path_confidence = torch.cat([*logs[0], *logs[1]]).exp_().view(2, 1, first)
    entropy = None
    if levels[0].entropy is not None:
        of_sources = torch.cat([level.entropy[row] for level in levels])[source]
        entropy = torch.cat([torch.tensor([torch.nan], device="cpu"), of_sources])[None]
    return DraftTree(
        tokens=torch.cat([root.cpu(), *(level.tokens[row] for level in levels)]),
        parents=torch.cat([torch.tensor([-1], device="cpu"), parents[source]]),
        depths=torch.tensor(depths, device="cpu"),
        confidence=confidence,
        path_confidence=path_confidence,
        entropy=entropy,
        proposals=proposals,
    )
