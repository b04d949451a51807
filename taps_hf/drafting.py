"""One drafter's side of one generation: its cache, its context, and single steps of drafting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from .cache import InPlaceCache
from .modeling_eagle import EagleDrafter


@dataclass
class Expansion:
    """Children proposed for F nodes, k each.

    Args:
        tokens: (F, k) int64.
        log_confidence: (F, k) float32: log c of each child, at most 0.
        entropy: (F, 1) float32, nats, of the distribution the children come from; NaN if not asked.
        probabilities: (F, vocabulary) float32: that distribution, for sampled children only.
    """

    tokens: torch.Tensor
    log_confidence: torch.Tensor
    entropy: torch.Tensor
    probabilities: torch.Tensor | None


class DrafterSession:
    """The state of one drafter during one generation.

    A *slot* is one position of the drafter's context: the pair (feature at t, token at t + 1).
    Slots made of the target's true features are queued by [`observe`] and run by [`begin`] when the
    drafter is next asked, so a drafter that sits out some cycles catches up in one pass.

    Args:
        drafter: the drafter; nothing is stored on it.
        target: the target whose embedding and LM head it uses.
        index: the drafter's row in a tree's `confidence`.
        num_drafters: number of drafters in this generation.
        sample_temperature: None proposes the k most likely tokens. A number samples children
            without replacement from softmax(logits / temperature).
        with_entropy: compute the entropy of every distribution that is expanded.
    """

    def __init__(
        self,
        drafter: EagleDrafter,
        target: PreTrainedModel,
        index: int,
        num_drafters: int,
        sample_temperature: float | None = None,
        with_entropy: bool = False,
    ) -> None:
        self.drafter = drafter
        self.index = index
        self.num_drafters = num_drafters
        self.sample_temperature = sample_temperature
        self.with_entropy = with_entropy
        self.device, self.dtype = drafter.device, drafter.dtype
        self._embedding = target.get_input_embeddings()
        self._head = target.get_output_embeddings()
        self._vocab_size = drafter.config.vocab_size
        self._token_ids = drafter.draft_token_ids
        if self._token_ids is not None:
            rows = self._token_ids.to(self._head.weight.device)
            self._head_rows = self._head.weight[rows].to(self.device, self.dtype)
            bias = getattr(self._head, "bias", None)
            self._head_bias = None if bias is None else bias[rows].to(self.device, self.dtype)
        self._cache = InPlaceCache(DynamicCache(config=drafter.trunk.config))
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._length = 0  # slots in the cache that hold true features
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
        return bool(self._length or self._pending)

    def begin(self) -> torch.Tensor:
        """Run the queued slots and return the predicted feature at the root, (1, hidden).

        Something must have been observed since the last call, as in every cycle something was.
        """
        tokens = torch.cat([tokens.to(self.device) for tokens, _ in self._pending])
        features = torch.cat([features.to(self.device) for _, features in self._pending])
        self._pending.clear()
        positions = torch.arange(self._length, self._length + len(tokens), device=self.device)
        hidden = self._forward(tokens, features, positions, None)[-1:]
        self._length += len(tokens)
        self._before_tree = self._cache.stored_lengths()
        return hidden

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, visible: torch.Tensor, depth: int
    ) -> torch.Tensor:
        """Run one level of tree nodes.

        Args:
            tokens: (F,) int64: tokens of the nodes at `depth`.
            hidden: (F, hidden): predicted features at their parents.
            visible: (F, S) bool: which of the S tree slots run so far, these F last, each may read.
            depth: 1 for children of the root.

        Returns:
            (F, hidden): predicted features at the nodes.
        """
        past = visible.new_ones(len(tokens), self._length)
        mask = torch.cat([past, visible], dim=1)[None, None]
        positions = torch.full_like(tokens, self._length - 1 + depth)
        return self._forward(tokens, hidden, positions, mask)

    def end(self) -> None:
        """Drop the tree's slots: the next cycle has true features for what was accepted."""
        self._cache.keep(self._before_tree, [])

    def expand(self, hidden: torch.Tensor, k: int) -> Expansion:
        """Propose k children for each of F nodes from their predicted features (F, hidden)."""
        logits = self._logits(hidden)
        k = min(k, logits.shape[1])
        entropy = logits.new_full((len(logits), 1), torch.nan)
        probabilities = None
        if self.sample_temperature is not None:
            logits = logits / self.sample_temperature
        normaliser = logits.logsumexp(dim=1, keepdim=True)
        if self.with_entropy:
            entropy = normaliser - (logits.softmax(1) * logits).sum(1, keepdim=True)
        if self.sample_temperature is None:
            top, tokens = logits.topk(k, dim=1)
        else:
            # Gumbel top-k: the k largest perturbed logits are k draws without replacement, in
            # order (Kool, van Hoof and Welling, arXiv 1903.06059).
            gumbel = -torch.empty_like(logits).exponential_().log()
            tokens = (logits + gumbel).topk(k, dim=1).indices
            top = logits.gather(1, tokens)
            probabilities = self._over_vocabulary(logits.softmax(dim=1))
        if self._token_ids is not None:
            tokens = self._token_ids[tokens]
        # Rounding must not make a child likelier than its parent.
        return Expansion(tokens, (top - normaliser).clamp(max=0.0), entropy, probabilities)

    def _forward(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        if mask is not None and self.drafter.trunk.config._attn_implementation == "eager":
            lowest = torch.finfo(self.dtype).min
            mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, lowest)
        embeds = self._embedding(tokens.to(self._embedding.weight.device))
        output = self.drafter(
            inputs_embeds=embeds.to(self.device, self.dtype)[None],
            features=features.to(self.dtype)[None],
            attention_mask=mask,
            position_ids=positions[None],
            past_key_values=self._cache.cache,
        )
        return output.last_hidden_state[0]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(F, scored tokens) float32."""
        if self._token_ids is not None:
            return F.linear(hidden, self._head_rows, self._head_bias).float()
        head = self._head.weight
        return self._head(hidden.to(head.device, head.dtype)).to(self.device).float()

    def _over_vocabulary(self, probabilities: torch.Tensor) -> torch.Tensor:
        if self._token_ids is None:
            return probabilities
        full = probabilities.new_zeros(len(probabilities), self._vocab_size)
        full[:, self._token_ids] = probabilities
        return full
