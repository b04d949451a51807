"""The drafters' side of one generation: caches, context, and single steps of drafting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from ..cache import InPlaceCache
from ..trees.growth import Expansion
from .modeling_eagle import EagleDrafter
from .stacking import DraftHead, kept_head, kept_stack

_ROWS = 16  # distributions that are worked on at a time
_BLOCK = 128


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


class DrafterSession:
    """The state of one drafter, or of several of one shape run as one, during one generation.

    A *slot* is one position of a drafter's context: the pair (feature at t, token at t + 1). Slots
    made of the target's true features are queued by [`observe`] and run by [`begin`] when drafters
    are next asked, so drafters that sit out some cycles catch up in one pass. One that is asked
    alone goes on from where all were by itself; when all are asked again, all run what came since.

    Tensors have a leading dimension of B trees, one for each drafter that was asked.

    Args:
        drafters: one, or several that [`stacking.groups_of`] puts in one group; nothing is stored
            on them.
        target: the target whose embedding and LM head they use.
        indices: the drafters' rows in a tree's `confidence`.
        num_drafters: number of drafters in this generation.
        sample_temperature: None proposes the k most likely tokens. A number samples children
            without replacement from softmax(logits / temperature).
        with_entropy: compute the entropy of every distribution that is expanded.

    Raises:
        ValueError: for several drafters that cannot be stacked.
    """

    def __init__(
        self,
        drafters: Sequence[EagleDrafter],
        target: PreTrainedModel,
        indices: Sequence[int] = (0,),
        num_drafters: int = 1,
        sample_temperature: float | None = None,
        with_entropy: bool = False,
    ) -> None:
        self.drafters = tuple(drafters)
        self.indices = tuple(indices)
        self.num_drafters = num_drafters
        self.sample_temperature = sample_temperature
        self.with_entropy = with_entropy
        first = self.drafters[0]
        self.device, self.dtype = first.device, first.dtype
        self._config = first.trunk.config
        self._eager = self._config._attn_implementation == "eager"
        self._embedding = target.get_input_embeddings()
        module = first if len(self.drafters) == 1 else kept_stack(self.drafters)
        if module is None:
            raise ValueError(
                f"{len(self.drafters)} drafters of the family {self._config.model_type!r} cannot "
                "run as one, expected those of one of `groups_of`'s groups."
            )
        self._all = _Rows(
            self.indices,
            module,
            kept_head(self.drafters, target),
            InPlaceCache(DynamicCache(config=self._config)),
        )
        self._alone: _Rows | None = None  # the one that was last asked alone, since all were
        self._asked = self._all  # the rows that draft in this cycle
        self._only: int | None = None
        # What was observed since all ran; how many entries of it the one asked alone has run.
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._run_alone = 0
        self._length = 0  # slots with true features of those that draft
        self._before_tree: list[int] = []

    def observe(self, tokens: torch.Tensor, features: torch.Tensor) -> None:
        """Queue n new slots.

        Args:
            tokens: (n,) int64: the tokens that *follow* the positions of `features`.
            features: (n, hidden): the target's last hidden states.
        """
        self._pending.append((tokens, features))

    @property
    def has_context(self) -> bool:
        """Whether there is a slot to draft from."""
        return bool(self._all.cache.length or self._pending)

    def ask(self, indices: Sequence[int]) -> None:
        """Say which of the drafters should draft from the next [`begin`] on.

        One, or all: of three asked for two, all are run as one.
        """
        self._only = indices[0] if len(indices) == 1 < len(self.drafters) else None

    def begin(self) -> torch.Tensor:
        """Run the queued slots and return the predicted features at the root, (B, 1, hidden).

        Something must have been observed since the last call, as in every cycle something was.
        """
        new = self._pending
        if self._only is None:
            self._asked, self._alone = self._all, None
            self._pending = []
        else:
            if self._alone is None or self._alone.indices != (self._only,):
                self._alone, self._run_alone = self._row(self._only), 0
            self._asked = self._alone
            new = new[self._run_alone :]
            self._run_alone = len(self._pending)
        tokens = torch.cat([tokens.to(self.device) for tokens, _ in new])
        features = torch.cat([features.to(self.device) for _, features in new])
        rows = len(self._asked.indices)
        start = self._asked.cache.length
        self._length = start + len(tokens)
        positions = torch.arange(start, self._length, device=self.device)
        hidden = self._forward(
            tokens.expand(rows, -1), features.expand(rows, -1, -1), positions, None
        )
        self._before_tree = self._asked.cache.stored_lengths()
        return hidden[:, -1:]

    def _row(self, index: int) -> _Rows:
        """One of the drafters, from where all were."""
        row = self.indices.index(index)
        cache = self._all.cache
        # Nothing to go on from: layers get their batch size with their first states.
        alone = cache.row(row) if cache.length else InPlaceCache(DynamicCache(config=self._config))
        return _Rows((index,), self.drafters[row], self._all.head.row(row), alone)

    @property
    def asked(self) -> tuple[int, ...]:
        """Who drafts in this cycle: the drafter of each of the B trees."""
        return self._asked.indices

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, visible: torch.Tensor, depth: int
    ) -> torch.Tensor:
        """Run one level of tree nodes.

        Args:
            tokens: (B, F) int64: tokens of the nodes at `depth`.
            hidden: (B, F, hidden): predicted features at their parents.
            visible: (B, F, S) bool: which of the S tree slots run so far, these F last, each may
                read.
            depth: 1 for children of the root.

        Returns:
            (B, F, hidden): predicted features at the nodes.
        """
        past = visible.new_ones(*tokens.shape, self._length)
        mask = torch.cat([past, visible], dim=2)[:, None]
        positions = torch.full_like(tokens[0], self._length - 1 + depth)
        return self._forward(tokens, hidden, positions, mask)

    def end(self) -> None:
        """Drop the trees' slots: the next cycle has true features for what was accepted."""
        self._asked.cache.keep(self._before_tree, [])

    def expand(self, hidden: torch.Tensor, k: int) -> Expansion:
        """Propose k children for each of F nodes from their predicted features (B, F, hidden)."""
        logits = self._asked.head(hidden)
        k = min(k, logits.shape[2])
        # What is computed of a row's tens of thousands of logits should stay in a CPU's cache.
        rows = max(_ROWS // hidden.shape[1], 1) if logits.device.type == "cpu" else len(hidden)
        parts = [self._choose(part.float(), k) for part in logits.split(rows)]
        tokens, log_confidence, entropy, probabilities = (
            values[0] if len(parts) == 1 or values[0] is None else torch.cat(values)
            for values in zip(*parts)
        )
        head = self._asked.head
        if probabilities is not None:
            probabilities = head.over_vocabulary(probabilities)
        return Expansion(head.token_ids(tokens), log_confidence, entropy, probabilities)

    def _choose(self, logits: torch.Tensor, k: int) -> tuple[torch.Tensor | None, ...]:
        """[`Expansion`]'s fields from (B, F, scored) float32, among the scored tokens."""
        entropy = probabilities = None
        if self.sample_temperature is not None:
            logits = logits / self.sample_temperature
        largest = logits.amax(dim=2, keepdim=True)
        # Tokens e^80 times less likely than the likeliest add nothing to the sum, but as denormal
        # numbers they would make a CPU take several times as long over it.
        below = (logits - largest).clamp_(min=-80.0)
        odds = below.exp()
        total = odds.sum(dim=2, keepdim=True)
        normaliser = largest + total.log()
        if self.with_entropy:
            expected = torch.linalg.vecdot(odds, below)[..., None] / total
            entropy = (total.log() - expected)[..., 0]
        if self.sample_temperature is None:
            top, tokens = topk_by_blocks(logits, k)
        else:
            # Gumbel top-k: the k largest perturbed logits are k draws without replacement, in
            # order (Kool, van Hoof and Welling, arXiv 1903.06059).
            gumbel = -torch.empty_like(logits).exponential_().log()
            tokens = topk_by_blocks(logits + gumbel, k)[1]
            top = logits.gather(2, tokens)
            probabilities = logits.softmax(dim=2)
        # Rounding must not make a child likelier than its parent.
        return tokens, (top - normaliser).clamp(max=0.0), entropy, probabilities

    def _forward(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        if mask is not None and self._eager:
            lowest = torch.finfo(self.dtype).min
            mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, lowest)
        embeds = self._embedding(tokens.to(self._embedding.weight.device))
        return self._asked.module(
            inputs_embeds=embeds.to(self.device, self.dtype),
            features=features.to(self.dtype),
            attention_mask=mask,
            position_ids=positions[None],
            past_key_values=self._asked.cache.cache,
        ).last_hidden_state


@dataclass(frozen=True)
class _Rows:
    """What runs the trees of some of a session's drafters."""

    indices: tuple[int, ...]
    module: torch.nn.Module
    head: DraftHead
    cache: InPlaceCache
