"""Ordinary causal language models as drafters: small ones, with the target's tokenizer.

The model reads the text with a cache of its own and grows a tree level by level, as feature
drafters do: one pass a level over the nodes that are expanded, which see the text and their
ancestors.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from ..cache import CACHE, InPlaceCache
from ..masks import additive
from ..target import masks_windows
from ..trees.growth import Expansion, assemble
from ..trees.tree import DraftTree
from .base import Drafter, DrafterSession, DraftRequest
from .heads import expand
from .stacking import state_of

_ATTENTION = ("eager", "sdpa")  # that take a mask of a tree


class CausalDrafter(Drafter):
    """A causal language model that drafts for a larger one.

    `assistant_models` takes the model itself and makes one of these, once ([`of`]).

    Args:
        model: with an LM head, full attention ("sdpa" or "eager") and the target's tokenizer, in
            evaluation mode. It reads tokens only, and may be on another device than the target.

    Raises:
        ValueError: for another kind of model.
    """

    samples = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.name_or_path = model.name_or_path
        kind = type(model).__name__
        if model.get_output_embeddings() is None or model.config.is_encoder_decoder:
            raise ValueError(f"{kind} has no LM head of its own, expected a causal language model.")
        self.parameters = frozenset(inspect.signature(type(model).forward).parameters)
        if not {"position_ids", CACHE} <= self.parameters:
            raise ValueError(
                f"{kind}.forward takes no `position_ids` or no `{CACHE}`, which nodes of a "
                "tree need; expected a causal language model that does."
            )
        config = model.config.get_text_config(decoder=True)
        types = set(getattr(config, "layer_types", None) or ())
        windowed = getattr(config, "sliding_window", None) is not None and masks_windows(model)
        if types - {"full_attention"} or (not types and windowed):
            raise ValueError(
                f"{kind} has layers that do not attend to everything "
                f"({', '.join(sorted(types)) or 'sliding windows'}), expected full attention."
            )
        if config._attn_implementation not in _ATTENTION:
            raise ValueError(
                f"{kind} attends by {config._attn_implementation!r}, which takes no mask of a "
                f"tree; expected {' or '.join(_ATTENTION)}."
            )

    @classmethod
    def of(cls, model: PreTrainedModel) -> CausalDrafter:
        """The drafter of a model: always the same one, so that what is known of it is known again.

        Raises:
            ValueError: as the class.
        """
        known = vars(model).get("_taps_hf_drafter")
        if known is None or known.model is not model:
            known = vars(model)["_taps_hf_drafter"] = cls(model)
        return known

    @property
    def vocab_size(self) -> int:
        """Tokens it reads."""
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def num_scored_tokens(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    def check_target(self, name: str, target: PreTrainedModel) -> None:
        """Raise `ValueError` for the target itself, or one with quite another vocabulary.

        Vocabularies of one family may differ in padding. That both have the same tokenizer cannot
        be seen in the models.
        """
        if target is self.model:
            raise ValueError(f"Drafter {name!r} is the target itself, expected a smaller model.")
        if self.model.training:  # dropout would draw random numbers that plain generate has
            raise ValueError(f"Drafter {name!r} is in training mode; call its eval().")
        size = target.config.get_text_config(decoder=True).vocab_size
        if not 0.9 <= self.vocab_size / size <= 1.1:
            raise ValueError(
                f"Drafter {name!r} knows {self.vocab_size} tokens and the target {size}; expected "
                "a model with the target's tokenizer."
            )

    @classmethod
    def start(cls, drafters: Sequence[Drafter], target: PreTrainedModel) -> CausalSession:
        (drafter,) = drafters
        return CausalSession(drafter, target)

    def digest(self) -> str:
        found = hashlib.sha256(self.model.config.to_json_string().encode())
        for name, weight in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return found.hexdigest()[:16]


class CausalSession(DrafterSession):
    """A model in one generation, or several.

    Args:
        drafter: whose model drafts.
        target: for which.
    """

    def __init__(self, drafter: CausalDrafter, target: PreTrainedModel) -> None:
        self.drafter, self.model = drafter, drafter.model
        self.device = self.model.get_input_embeddings().weight.device
        config = self.model.config.get_text_config(decoder=True)
        vocab_size = target.config.get_text_config(decoder=True).vocab_size
        self.head = _AsTheyAre(vocab_size)
        # Beyond the vocabulary of either there is padding only, which could be proposed.
        self.scored = min(drafter.num_scored_tokens, vocab_size)
        self.additive = config._attn_implementation == "eager" or self.device.type == "cpu"
        self.cache = InPlaceCache(DynamicCache(config=config))
        self._positions = getattr(config, "max_position_embeddings", None)
        self._began_as = self._state()
        self._pending: list[torch.Tensor] = []  # tokens that were heard and not read

    def _state(self) -> tuple[object, ...]:
        return state_of([self.model]), self.device, torch.is_inference_mode_enabled()

    def is_current(self) -> bool:
        return self._state() == self._began_as

    def observe(self, tokens: torch.Tensor, states: Mapping[int, torch.Tensor]) -> None:
        self._pending.append(tokens)

    def forget(self, count: int) -> bool:
        known = self.cache.length + sum(map(len, self._pending))
        if count >= known:
            return False
        while count and self._pending:
            tokens = self._pending.pop()
            if len(tokens) > count:
                self._pending.append(tokens[: len(tokens) - count])
            count = max(count - len(tokens), 0)
        return count == 0 or self.cache.crop(self.cache.length - count)

    @torch.no_grad()
    def propose(self, rows: Sequence[int], request: DraftRequest) -> dict[int, DraftTree]:
        past = self.cache.length + sum(map(len, self._pending))
        depth = request.max_depth
        if self._positions is not None:
            depth = min(depth, self._positions - past)
        if not self._pending or depth < 1:
            # An earlier turn was taken back to what has been read, or its positions have ended.
            return {}
        tokens = torch.cat([tokens.to(self.device) for tokens in self._pending])
        positions = torch.arange(past - len(tokens), past, device=self.device)
        logits = self.run(tokens, positions, None, last=True)
        self._pending = []
        growth = _Growth(self, past, request)
        stored = self.cache.stored_lengths()
        levels = request.shape.grow(growth, logits, depth, request.go_on)
        self.cache.keep(stored, [])
        return {0: request.shape.prune(assemble(levels, 0, request.root))}

    def run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        last: bool = False,
    ) -> torch.Tensor:
        """One pass: (1, n, scored) logits after tokens (n,), or (1, 1, scored) after the `last`.

        Args:
            tokens, positions: (n,) int64.
            mask: (1, 1, n, past + n) bool; None where all see what stands before them.
        """
        if mask is not None and self.additive:
            mask = additive(mask, self.model.dtype)
        keep: dict[str, Any] = {}
        if last and "logits_to_keep" in self.drafter.parameters:
            keep["logits_to_keep"] = 1
        output = self.model(
            # Ids beyond its embedding are padding of the target's, which no tokenizer gives.
            input_ids=tokens.clamp(max=self.drafter.vocab_size - 1)[None],
            attention_mask=mask,
            position_ids=positions[None],
            **{CACHE: self.cache.cache},
            use_cache=True,
            return_dict=True,
            **keep,
        )
        logits = output.logits[:, -1:] if last else output.logits
        return logits[..., : self.scored]


class _Growth:
    """Growing one tree (`growth.Drafting`); what is predicted at a node are its children's logits.

    Args:
        session: whose tree it is.
        past: tokens read, the root included.
        request: what is wanted.
    """

    def __init__(self, session: CausalSession, past: int, request: DraftRequest) -> None:
        self._session, self._past, self._request = session, past, request

    def expand(self, hidden: torch.Tensor, k: int) -> Expansion:
        request = self._request
        head, temperature = self._session.head, request.sample_temperature
        return expand(head, hidden, k, temperature, request.with_entropy)

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, visible: torch.Tensor, depth: int
    ) -> torch.Tensor:
        past = visible.new_ones(*tokens.shape, self._past)
        mask = torch.cat([past, visible], dim=2)[:, None]
        positions = torch.full_like(tokens[0], self._past - 1 + depth)
        return self._session.run(tokens[0], positions, mask)


class _AsTheyAre:
    """What stands for a head where logits are known already.

    Args:
        vocab_size: of the target: tokens behind those that are scored are never proposed.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def token_ids(self, scored: torch.Tensor) -> torch.Tensor:
        """Those that are scored are the first."""
        return scored

    def over_vocabulary(self, probabilities: torch.Tensor) -> torch.Tensor:
        """(B, n, vocabulary) from (B, n, scored)."""
        return F.pad(probabilities, (0, self._vocab_size - probabilities.shape[2]))
