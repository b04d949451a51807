"""The walk through a scored tree, and its verifiers: which token is emitted, which node is next.

Both verifiers are exact; they differ in what they are exact for (docs/architecture.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

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
    def step(self, node: int, scores: torch.Tensor) -> tuple[int, int | None]:
        """Choose the next token.

        Args:
            node: where the walk stands.
            scores: (1, vocabulary) float32: the target's processed scores there.

        Returns:
            the token, and the child that carries it; None if the walk ends here.
        """


class WalkVerifier(Verifier):
    """Plain generate's own choice of token; the walk goes on while the tree holds what was chosen.

    Exact for deterministic proposals, and seed-exact: the random numbers drawn, and what they are
    used for, are those of plain `generate`.
    """

    def __init__(self, tree: DraftTree, do_sample: bool) -> None:
        super().__init__(tree, do_sample)
        self._children = tree.children()

    def step(self, node: int, scores: torch.Tensor) -> tuple[int, int | None]:
        if self.do_sample:
            probabilities = torch.softmax(scores, dim=-1)
            token = int(torch.multinomial(probabilities, num_samples=1))
        else:
            token = int(torch.argmax(scores, dim=-1))
        return token, self.child(node, token)

    def child(self, node: int, token: int) -> int | None:
        """The child of a node that carries a token."""
        return self._children.get((node, token))


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

    def step(self, node: int, scores: torch.Tensor) -> tuple[int, int | None]:
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
                return token, child
            residual = (target - draft).clamp(min=0.0)
            total = residual.sum()
            # p = q exactly leaves nothing over; then rejection had probability 0 but for rounding.
            target = torch.where(total > 0, residual / total, target)
            draft[token] = 0.0
            drafts[row] = draft / draft.sum().clamp(min=torch.finfo(draft.dtype).tiny)
        return int(torch.multinomial(target, num_samples=1)), None


# Those of transformers that read nothing but the text, and decide by it alone (or by the clock).
_READ_THE_TEXT = (MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria, StopStringCriteria)

VERIFIERS: dict[str, type[Verifier]] = {"walk": WalkVerifier, "rejection": RejectionVerifier}


@dataclass(frozen=True)
class Walked:
    """The way of one walk.

    Args:
        nodes: at which a token was emitted, the root first: their states are kept.
        accepted: the nodes that carried the tokens emitted, from depth 1 on: as many as tokens, or
            one fewer where the last is the target's own.
        tokens: (m,) int64, on the CPU: emitted.
    """

    nodes: list[int]
    accepted: list[int]
    tokens: torch.Tensor


class Walk:
    """Plain generate's inner loop: from the scores of one position to the next token.

    The text is kept on the CPU, where the tree is. Processors, and criteria of unknown kinds, get
    it where `input_ids` was.

    Args:
        input_ids: (1, T) int64: what there is so far.
        logits_processor, stopping_criteria: as `generate` prepared them.
        verifier: the class of verifier.
        do_sample: whether tokens are sampled.
        keep_scores, keep_logits: whether to keep what each token was chosen from.
        on_token: called with each token emitted, (1,) int64.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        verifier: type[Verifier],
        do_sample: bool,
        keep_scores: bool = False,
        keep_logits: bool = False,
        on_token: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self.text = input_ids.cpu()  # (1, T) int64
        self.is_finished = False
        # As `generate` returns them: of every token, (1, vocabulary) float32; None if not asked.
        self.scores: tuple[torch.Tensor, ...] | None = () if keep_scores else None
        self.logits: tuple[torch.Tensor, ...] | None = () if keep_logits else None
        self._processor, self._criteria = logits_processor, stopping_criteria
        self._verifier, self._do_sample, self._on_token = verifier, do_sample, on_token
        self._device = input_ids.device
        self._stops_by_text = isinstance(stopping_criteria, StoppingCriteriaList) and all(
            type(criterion) in _READ_THE_TEXT for criterion in stopping_criteria
        )
        # Every token that is read back makes the host wait for a GPU. Where logits alone decide
        # all nodes' are read at once; on a CPU that would be work for nothing.
        self._chooses_at_once = (
            input_ids.device.type != "cpu"
            and verifier is WalkVerifier
            and not (do_sample or keep_scores or keep_logits)
            and isinstance(logits_processor, LogitsProcessorList)
            and not logits_processor
        )

    @property
    def input_ids(self) -> torch.Tensor:
        """(1, T) int64: what there is so far, where it was at first."""
        return self.text.to(self._device, non_blocking=self._device.type == "cuda")

    def along(self, tree: DraftTree, logits: torch.Tensor) -> Walked:
        """Emit tokens for as long as the tree holds the token emitted, and one more.

        Args:
            tree: what the target has scored, on the CPU.
            logits: (N, vocabulary): its scores at the nodes.
        """
        verifier = self._verifier(tree, self._do_sample)
        chosen = logits.argmax(dim=-1).tolist() if self._chooses_at_once else None
        node, nodes, accepted = 0, [], []
        start = self.text.shape[1]
        while node is not None and not self.is_finished:
            nodes.append(node)
            if chosen is None:
                token, node = verifier.step(node, self._score(logits[node]))
            else:
                token, node = chosen[node], verifier.child(node, chosen[node])
            if node is not None:
                accepted.append(node)
            self.text = torch.cat([self.text, torch.tensor([[token]], device="cpu")], dim=-1)
            seen = self.text if self._stops_by_text else self.input_ids
            self.is_finished = bool(self._criteria(seen, self.scores).all())
            if self._on_token is not None:
                self._on_token(torch.tensor([token], device="cpu"))
        # A copy: whoever keeps it should not keep all of the text.
        return Walked(nodes, accepted, self.text[0, start:].clone())

    def _score(self, logits: torch.Tensor) -> torch.Tensor:
        """(1, vocabulary) float32, processed, from (vocabulary,)."""
        # A copy: processors may write into what they get.
        plain = logits[None].to(copy=True, dtype=torch.float32, device=self._device)
        scores = self._processor(self.input_ids, plain)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (plain,)
        return scores
