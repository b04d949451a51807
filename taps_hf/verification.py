"""Verifiers: given the target's scores at a node, which token is emitted and which node is next.

Both are exact; they differ in what they are exact for (docs/architecture.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from .trees.tree import DraftTree


class Verifier(ABC):
    """Walks one tree, one emitted token at a time.

    Args:
        tree: the tree that the target has just scored.
        do_sample: whether tokens are sampled from the scores rather than their argmax.
    """

    def __init__(self, tree: DraftTree, do_sample: bool) -> None:
        self.do_sample = do_sample

    @abstractmethod
    def step(self, nodes: list[int], scores: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Choose the next token.

        Args:
            nodes: the node the walk stands at; several where a packing holds the same path twice.
            scores: (1, vocabulary) float32: the target's processed scores at the node.

        Returns:
            the token, (1,) int64, and the nodes that carry it: none if the walk ends here.
        """


class WalkVerifier(Verifier):
    """Plain generate's own choice of token; the walk goes on while the tree holds what was chosen.

    Exact for deterministic proposals, and seed-exact: the random numbers drawn, and what they are
    used for, are those of plain `generate`.
    """

    def __init__(self, tree: DraftTree, do_sample: bool) -> None:
        super().__init__(tree, do_sample)
        self._children: dict[tuple[int, int], list[int]] = {}
        pairs = torch.stack([tree.parents, tree.tokens]).tolist()  # one read-back
        for node, (parent, token) in enumerate(zip(*pairs)):
            self._children.setdefault((parent, token), []).append(node)

    def step(self, nodes: list[int], scores: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        if self.do_sample:
            probabilities = torch.softmax(scores, dim=-1)
            token = torch.multinomial(probabilities, num_samples=1).squeeze(1)
        else:
            token = torch.argmax(scores, dim=-1)
        chosen = int(token)
        return token, [child for node in nodes for child in self._children.get((node, chosen), ())]


class RejectionVerifier(Verifier):
    """Speculative sampling for proposals that were sampled from the drafters (TAPS, equations 1-2).

    A child x drawn from q is accepted with probability min(1, p(x) / q(x)); after a rejection p
    becomes the normalised max(0, p - q), x leaves q (the siblings were drawn without replacement),
    and the next child is tried. When none is left the token is drawn from what p has become. The
    tokens emitted are distributed as the target's own (arXiv 2211.17192; for several children,
    arXiv 2305.09781), though not the same as plain `generate` draws with the same seed.
    """

    def __init__(self, tree: DraftTree, do_sample: bool) -> None:
        super().__init__(tree, do_sample)
        if tree.proposals is None:
            if len(tree) > 1:
                raise ValueError("The tree was not sampled, expected one with its proposals.")
            self._attempts: dict[int, list[tuple[int, int]]] = {}
            return
        self._tokens = tree.tokens.tolist()
        self._probabilities = tree.proposals.probabilities
        self._attempts = {}
        triples = torch.stack([getattr(tree.proposals, x) for x in ("parents", "children", "rows")])
        for parent, child, row in zip(*triples.tolist()):
            self._attempts.setdefault(parent, []).append((child, row))

    def step(self, nodes: list[int], scores: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        (node,) = nodes
        if self.do_sample:
            target = torch.softmax(scores[0], dim=-1)
        else:
            target = torch.zeros_like(scores[0])
            target[scores[0].argmax()] = 1.0
        drafts: dict[int, torch.Tensor] = {}
        for child, row in self._attempts.get(node, ()):
            if row not in drafts:
                drafts[row] = self._probabilities[row].to(target.device, copy=True)
            draft, token = drafts[row], self._tokens[child]
            if torch.rand((), device=target.device) * draft[token] < target[token]:
                return scores.new_tensor([token], dtype=torch.long), [child]
            residual = (target - draft).clamp(min=0.0)
            total = residual.sum()
            # p = q exactly leaves nothing over; then rejection had probability 0 but for rounding.
            target = torch.where(total > 0, residual / total, target)
            draft[token] = 0.0
            drafts[row] = draft / draft.sum().clamp(min=torch.finfo(draft.dtype).tiny)
        return torch.multinomial(target, num_samples=1), []


VERIFIERS: dict[str, type[Verifier]] = {"walk": WalkVerifier, "rejection": RejectionVerifier}
