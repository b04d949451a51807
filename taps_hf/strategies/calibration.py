"""Confidence is not acceptance probability: what is known of their relation in this generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..trees.tree import DraftTree

_EDGES = (0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95)  # of confidence, between bins
_PRIOR = 4.0  # acceptances' worth of belief that the confidence is right
_KEPT = 0.97  # of the counts, from cycle to cycle: what is written about changes


class Calibration:
    """Turns confidences into acceptance probabilities, by what was accepted so far.

    For each drafter and bin of confidence: accepted nodes over the sum of their confidences, which
    is 1 for a calibrated drafter, and is believed to be 1 until counts say otherwise.

    Args:
        num_drafters: rows of a tree's `confidence`.
    """

    def __init__(self, num_drafters: int) -> None:
        self._edges = torch.tensor(_EDGES)
        self._accepted = torch.full((num_drafters, len(_EDGES) + 1), _PRIOR)
        self._expected = torch.full((num_drafters, len(_EDGES) + 1), _PRIOR)

    def acceptance(self, tree: DraftTree) -> torch.Tensor:
        """(N,) float32: probability that a node is accepted, 1 at the root.

        Where several drafters propose a node, the surest counts. All children of a node together
        are at most as likely as it is: drafters that are sure of different tokens cannot all be
        right.

        Args:
            tree: on the CPU.
        """
        ratio = (self._accepted / self._expected).gather(1, self._bins(tree.confidence))
        given_parent = (tree.confidence * ratio).nan_to_num(nan=0.0).amax(dim=0)
        below = tree.parents[1:]
        children = torch.zeros(len(tree)).index_add_(0, below, given_parent[1:])
        given_parent[1:] /= children[below].clamp(min=1.0)
        probability = given_parent.clone()
        probability[0] = 1.0
        for depth in range(2, tree.max_depth + 1):
            at = (tree.depths == depth).nonzero().squeeze(1)
            probability[at] = given_parent[at] * probability[tree.parents[at]]
        return probability

    def observe(self, tree: DraftTree, reached: Sequence[int], accepted: Sequence[int]) -> None:
        """Learn from one cycle.

        Args:
            tree: all that was proposed, verified or not, on the CPU.
            reached: nodes at which a token was emitted.
            accepted: nodes that carried these tokens.
        """
        judged = torch.isin(tree.parents, torch.tensor(reached))
        hit = torch.zeros(len(tree))
        hit[list(accepted)] = 1.0
        known = ~tree.confidence.isnan() & judged
        bins = self._bins(tree.confidence)
        for counts, values in (
            (self._accepted, hit.expand_as(tree.confidence)),
            (self._expected, tree.confidence),
        ):
            counts.sub_(_PRIOR).mul_(_KEPT).add_(_PRIOR)
            counts.scatter_add_(1, bins, values.where(known, values.new_zeros(())))

    def _bins(self, confidence: torch.Tensor) -> torch.Tensor:
        return torch.bucketize(confidence.nan_to_num(nan=0.0), self._edges)
