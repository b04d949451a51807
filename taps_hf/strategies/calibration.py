"""Confidence is not acceptance probability: what is known of their relation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..trees.tree import DraftTree

_EDGES = (0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95)  # of confidence, between bins
_PRIOR = 4.0  # acceptances' worth of belief in what was known before
_KEPT = 0.97  # of the counts, from cycle to cycle: what is written about changes


class Calibration:
    """Turns confidences into acceptance probabilities, by what was accepted so far.

    For each drafter and bin of confidence: accepted nodes over the sum of their confidences, which
    is 1 for a calibrated drafter, and is believed to be what it was before (1 where nothing is
    known) until counts say otherwise.

    Args:
        num_drafters: rows of a tree's `confidence`.
        before: (num_drafters, bins) float32: the ratio believed in at first; None for 1.
        kept: share of the counts that is kept from cycle to cycle.
    """

    def __init__(
        self, num_drafters: int, before: torch.Tensor | None = None, kept: float = _KEPT
    ) -> None:
        self._edges = torch.tensor(_EDGES, device="cpu")
        self._kept = kept
        self._before = torch.full((num_drafters, len(_EDGES) + 1), _PRIOR, device="cpu")
        self._before_accepted = self._before if before is None else _PRIOR * before
        self._accepted, self._expected = self._before_accepted.clone(), self._before.clone()

    def begin(self) -> Calibration:
        """One that believes at first what this one has found, and learns by itself."""
        return Calibration(len(self._accepted), self._accepted / self._expected)

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
        children = torch.zeros(len(tree), device="cpu").index_add_(0, below, given_parent[1:])
        given_parent[1:] /= children[below].clamp(min=1.0)
        # Node by node: a tree may be one long chain, and levels of one node are slow in tensors.
        probability = [1.0]
        for parent, share in zip(below.tolist(), given_parent[1:].tolist()):
            probability.append(share * probability[parent])
        return torch.tensor(probability, device="cpu")

    def observe(
        self, tree: DraftTree, reached: Sequence[int], accepted: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Learn from one cycle.

        Args:
            tree: all that was proposed, verified or not, on the CPU.
            reached: nodes at which a token was emitted.
            accepted: nodes that carried these tokens.

        Returns:
            what was learnt, as [`add`] takes it.
        """
        judged = torch.isin(tree.parents, torch.tensor(reached, device="cpu"))
        hit = torch.zeros(len(tree), device="cpu")
        hit[list(accepted)] = 1.0
        known = ~tree.confidence.isnan() & judged
        bins = self._bins(tree.confidence)
        found = tuple(
            torch.zeros_like(self._before).scatter_add_(
                1, bins, values.where(known, values.new_zeros(()))
            )
            for values in (hit.expand_as(tree.confidence), tree.confidence)
        )
        self.add(*found)
        return found

    def add(self, accepted: torch.Tensor, expected: torch.Tensor) -> None:
        """Count what a cycle came to, here or elsewhere.

        Args:
            accepted, expected: (num_drafters, bins) float32: accepted nodes, and the sum of their
                confidences that there should have been.
        """
        # Not in place: these may have been made in inference mode, and now be used outside of it.
        self._accepted = self._accepted.lerp(self._before_accepted, 1 - self._kept) + accepted
        self._expected = self._expected.lerp(self._before, 1 - self._kept) + expected

    def _bins(self, confidence: torch.Tensor) -> torch.Tensor:
        return torch.bucketize(confidence.nan_to_num(nan=0.0), self._edges)
