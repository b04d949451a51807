"""From a drafter's features to proposed tokens: heads, and the choice of children."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..trees.growth import Expansion
from .stacking import keep, kept_stack

if TYPE_CHECKING:
    from .modeling_feature import FeatureDrafter

_LOGITS = 2**19  # that a CPU works on at a time
_BLOCK = 128


class DraftHead(ABC):
    """What scores tokens after the features that drafters predict.

    Args:
        drafters: one, or several that run as one.
    """

    keeps_weights = False
    """Whether it holds copies of weights, which may change."""

    def __init__(self, drafters: Sequence[FeatureDrafter]) -> None:
        self.vocab_size = drafters[0].config.vocab_size
        self.ids: torch.Tensor | None = None  # (D, scored) int64; None where all are scored
        if drafters[0].draft_token_ids is not None:
            self.ids = torch.stack([drafter.draft_token_ids for drafter in drafters])

    @abstractmethod
    def row(self, row: int) -> DraftHead:
        """The head of one of the drafters."""

    @abstractmethod
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, n, scored), of the head's dtype, from (B, n, hidden); with one drafter, any B."""

    def token_ids(self, scored: torch.Tensor) -> torch.Tensor:
        """Token ids (B, n, k) of positions among the scored tokens."""
        if self.ids is None:
            return scored
        return self.ids.expand(len(scored), -1).gather(1, scored.flatten(1)).view_as(scored)

    def over_vocabulary(self, probabilities: torch.Tensor) -> torch.Tensor:
        """(B, n, vocabulary) from (B, n, scored)."""
        if self.ids is None:
            return probabilities
        full = probabilities.new_zeros(*probabilities.shape[:2], self.vocab_size)
        return full.scatter_(2, self.ids[:, None].expand_as(probabilities), probabilities)


class TargetHead(DraftHead):
    """The target's LM head over the tokens that each drafter scores.

    Args:
        drafters: with equal [`stacking_key`]s.
        target: whose head it is.
    """

    def __init__(self, drafters: Sequence[FeatureDrafter], target: PreTrainedModel) -> None:
        super().__init__(drafters)
        self.device, self.dtype = drafters[0].device, drafters[0].dtype
        head = target.get_output_embeddings()
        self.full: nn.Module | None = None  # the whole head, where all tokens are scored
        self.weight: torch.Tensor | None = None  # (D, scored, hidden)
        self.bias: torch.Tensor | None = None  # (D, 1, scored)
        if self.ids is None:
            self.full = head
            return
        rows = self.ids.to(head.weight.device)
        self.weight = head.weight.detach()[rows].to(self.device, self.dtype)
        if getattr(head, "bias", None) is not None:
            self.bias = head.bias.detach()[rows][:, None].to(self.device, self.dtype)

    @property
    def keeps_weights(self) -> bool:
        return self.full is None

    def row(self, row: int) -> TargetHead:
        one = copy.copy(self)
        for name in ("ids", "weight", "bias"):
            if (value := getattr(self, name)) is not None:
                setattr(one, name, value[row : row + 1])
        return one

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        # Of a slice with three dimensions torch would make a batched product, and copy the weight.
        flat = hidden.flatten(0, 1)
        if self.full is not None:
            weight = self.full.weight
            logits = self.full(flat.to(weight.device, weight.dtype)).to(self.device)
            return logits.view(*hidden.shape[:2], -1)
        if len(self.weight) == 1:
            bias = None if self.bias is None else self.bias[0, 0]
            return F.linear(flat, self.weight[0], bias).view(*hidden.shape[:2], -1)
        logits = torch.bmm(hidden, self.weight.transpose(1, 2))
        return logits if self.bias is None else logits + self.bias


class OwnHead(DraftHead):
    """The drafters' own heads.

    Args:
        drafters: with equal [`stacking_key`]s.
    """

    def __init__(self, drafters: Sequence[FeatureDrafter]) -> None:
        super().__init__(drafters)
        self._drafters = drafters
        self._module = drafters[0] if len(drafters) == 1 else kept_stack(drafters)

    def row(self, row: int) -> OwnHead:
        return OwnHead([self._drafters[row]])

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._module.scores(hidden)


def kept_head(drafters: Sequence[FeatureDrafter], target: PreTrainedModel) -> DraftHead:
    """The drafters' head; one with copies is made once, and again when weights have changed."""
    if drafters[0].has_own_head:
        return OwnHead(drafters)
    if drafters[0].draft_token_ids is None:
        return TargetHead(drafters, target)
    head = target.get_output_embeddings()
    return keep("head", [*drafters, head], lambda: TargetHead(drafters, target))


def expand(
    head: DraftHead,
    hidden: torch.Tensor,
    k: int,
    sample_temperature: float | None = None,
    with_entropy: bool = False,
) -> Expansion:
    """Propose k children for each of F nodes in each of B trees.

    Args:
        head: of the drafters.
        hidden: (B, F, hidden): predicted features at the nodes.
        k: children of each; fewer where fewer tokens are scored.
        sample_temperature: None proposes the k most likely tokens. A number samples children
            without replacement from softmax(logits / temperature).
        with_entropy: compute the entropy of every distribution.
    """
    logits = head(hidden)
    k = min(k, logits.shape[2])
    # What is computed of tens of thousands of logits should stay in a CPU's cache.
    rows = max(_LOGITS // logits[0].numel(), 1) if logits.device.type == "cpu" else len(hidden)
    parts = [
        _choose(part.float(), k, sample_temperature, with_entropy) for part in logits.split(rows)
    ]
    tokens, log_confidence, entropy, probabilities = (
        values[0] if len(parts) == 1 or values[0] is None else torch.cat(values)
        for values in zip(*parts)
    )
    if probabilities is not None:
        probabilities = head.over_vocabulary(probabilities)
    return Expansion(head.token_ids(tokens), log_confidence, entropy, probabilities)


def _choose(
    logits: torch.Tensor, k: int, sample_temperature: float | None, with_entropy: bool
) -> tuple[torch.Tensor | None, ...]:
    """[`Expansion`]'s fields from (B, F, scored) float32, among the scored tokens."""
    entropy = probabilities = None
    if sample_temperature is not None:
        logits = logits / sample_temperature
    # At most 0, rounded or not: the largest logit is taken off, then the logarithm of a sum of at
    # least 1. So no child is likelier than its parent.
    log_p = logits.log_softmax(dim=2)
    if with_entropy:
        # From the odds, not from `log_p`, whose rounding is much of a sharp distribution's entropy.
        # Tokens e^80 times less likely than the likeliest add nothing, but as denormal numbers they
        # would make a CPU take several times as long.
        below = (logits - logits.amax(dim=2, keepdim=True)).clamp_(min=-80.0)
        odds = below.exp()
        total = odds.sum(dim=2)
        entropy = total.log() - torch.linalg.vecdot(odds, below) / total
    if sample_temperature is None:
        log_confidence, tokens = topk_by_blocks(log_p, k)
    else:
        # Gumbel top-k: the k largest perturbed logits are k draws without replacement, in
        # order (Kool, van Hoof and Welling, arXiv 1903.06059).
        gumbel = -torch.empty_like(log_p).exponential_().log()
        tokens = topk_by_blocks(log_p + gumbel, k)[1]
        log_confidence = log_p.gather(2, tokens)
        probabilities = log_p.exp()
    return tokens, log_confidence, entropy, probabilities


def topk_by_blocks(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `values.topk(k)` in the last dimension, several times faster on a CPU where that is long.

    The k largest lie in the k blocks with the largest maxima: only those are sorted. Which of equal
    values is taken may differ.

    Returns:
        (..., k) each: the largest values, in descending order, and their indices.
    """
    blocks, rest = divmod(values.shape[-1], _BLOCK)
    if values.device.type != "cpu" or rest or blocks < 2 * k:
        return tuple(values.topk(k, dim=-1))
    apart = values.unflatten(-1, (blocks, _BLOCK))
    best = apart.amax(dim=-1).topk(k, dim=-1, sorted=False).indices
    few = apart.gather(-2, best[..., None].expand(*best.shape, _BLOCK)).flatten(-2)
    top, where = few.topk(k, dim=-1)
    return top, best.gather(-1, where // _BLOCK) * _BLOCK + where % _BLOCK
