"""What a strategy decided, checked: a mistake there must not become wrong text.

Cheap enough for every cycle (tens of microseconds): trees are small and on the CPU.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from ..trees.tree import DraftTree, SampledProposals
from .base import Choice, Strategy


def check_asked(
    strategy: Strategy, asked: Any, num_drafters: int, before: Collection[int] | None = None
) -> tuple[int, ...]:
    """The drafters that a strategy wants to run.

    Args:
        strategy: for the messages.
        asked: what its `ask` returned, or its `ask_also`.
        num_drafters: how many there are.
        before: those that were asked before these; None where these are the first.

    Raises:
        ValueError: unless they are distinct indices of drafters, none of them asked before.
    """
    if not _are_drafters(asked, num_drafters) or set(asked) & set(before or ()):
        name = f"{type(strategy).__name__}.{'ask' if before is None else 'ask_also'}"
        others = f", none of {tuple(before)}" if before else ""
        raise ValueError(
            f"{name} returned {asked!r}, expected distinct indices from 0 to {num_drafters - 1}"
            f"{others}."
        )
    return tuple(asked)


def checked_choice(
    strategy: Strategy,
    choice: Any,
    root: int,
    num_drafters: int,
    vocab_size: int,
    sampled: bool,
    max_depth: int,
) -> Choice:
    """What a strategy wants to be verified, checked and cut.

    Args:
        strategy: for the messages.
        choice: what its `compose` returned.
        root: the last emitted token.
        num_drafters: how many there are.
        vocab_size: of the target.
        sampled: whether proposals are sampled from the drafters' distributions.
        max_depth: deeper nodes are left out: a strategy that proposes something itself knows no
            limit.

    Raises:
        ValueError: unless it is a choice among these drafters with a well-formed tree.
    """
    name = f"{type(strategy).__name__}.compose"
    if not isinstance(choice, Choice):
        raise ValueError(f"{name} returned a {type(choice).__name__}, expected a taps_hf.Choice.")
    if not _are_drafters(choice.drafters, num_drafters):
        raise ValueError(
            f"{name} returned a Choice of drafters {choice.drafters!r}, expected distinct indices "
            f"from 0 to {num_drafters - 1}."
        )
    if not isinstance(choice.tree, DraftTree):
        raise ValueError(
            f"{name} returned a Choice with a {type(choice.tree).__name__}, expected a DraftTree."
        )
    wrong = _fault(choice.tree, root, num_drafters, vocab_size)
    if wrong is None and len(choice.tree) > 1 and sampled != (choice.tree.proposals is not None):
        wrong = f"was {'not ' * sampled}sampled, expected {'sampled' if sampled else 'none'}"
    if wrong is None and choice.tree.proposals is not None:
        wrong = _fault_of_proposals(choice.tree, choice.tree.proposals)
    if wrong is not None:
        raise ValueError(f"{name} returned a tree that {wrong}.")
    depths = choice.tree.depths.tolist()
    if max(depths) > max_depth:
        kept = [node for node, depth in enumerate(depths) if depth <= max_depth]
        return replace(choice, tree=choice.tree.select(torch.tensor(kept, device="cpu")))
    return choice


def _are_drafters(found: Any, num_drafters: int) -> bool:
    if not isinstance(found, Collection):
        return False
    indices = [i for i in found if isinstance(i, int) and 0 <= i < num_drafters]
    return len(set(indices)) == len(indices) == len(found)


def _fault(tree: DraftTree, root: int, num_drafters: int, vocab_size: int) -> str | None:
    """What is wrong with a tree, if anything."""
    size = len(tree.tokens)
    shapes = {"tokens": (size,), "parents": (size,), "depths": (size,)}
    shapes |= dict.fromkeys(("confidence", "path_confidence"), (num_drafters, size))
    if tree.entropy is not None:
        shapes["entropy"] = (num_drafters, size)
    for name, shape in shapes.items():
        value = getattr(tree, name)
        if tuple(value.shape) != shape or size == 0:
            return f"has `{name}` of shape {tuple(value.shape)}, expected {shape} with a root"
        if value.device.type != "cpu":
            return f"has `{name}` on {value.device}, expected the CPU"
        if len(shape) == 1 and value.dtype != torch.long:
            return f"has `{name}` of {value.dtype}, expected int64"
    tokens, parents, depths = tree.tokens.tolist(), tree.parents.tolist(), tree.depths.tolist()
    if (tokens[0], parents[0], depths[0]) != (root, -1, 0):
        return (
            f"begins with token {tokens[0]}, parent {parents[0]}, depth {depths[0]}, expected the "
            f"last emitted token {root}, -1 and 0"
        )
    for node in range(1, size):
        parent = parents[node]
        if not 0 <= parent < node:
            return f"has node {node} under parent {parent}, expected parents to come before it"
        if depths[node] != depths[parent] + 1:
            return f"has node {node} at depth {depths[node]}, expected {depths[parent] + 1}"
        if not 0 <= tokens[node] < vocab_size:
            return f"has token {tokens[node]} at node {node}, expected 0 to {vocab_size - 1}"
    return None


def _fault_of_proposals(tree: DraftTree, proposals: SampledProposals) -> str | None:
    """What is wrong with the attempts behind a sampled tree, if anything."""
    rows = len(proposals.probabilities)
    parents = tree.parents.tolist()
    attempts = zip(proposals.parents.tolist(), proposals.children.tolist(), proposals.rows.tolist())
    for parent, child, row in attempts:
        if not 0 < child < len(parents) or parents[child] != parent:
            return f"has an attempt at node {child} under {parent}, which is none of its edges"
        if not 0 <= row < rows:
            return f"has an attempt from row {row} of `probabilities`, expected 0 to {rows - 1}"
    return None
