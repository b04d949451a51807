"""Feature drafters (EAGLE-2, HASS, EAGLE-3) during generations: context, and growing trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache, PreTrainedModel

from ..cache import InPlaceCache
from ..masks import additive
from ..trees.growth import Expansion, assemble, on_host
from ..trees.tree import DraftTree
from .base import DrafterSession, DraftRequest
from .heads import DraftHead, expand, kept_head
from .stacking import kept_stack, state_of

if TYPE_CHECKING:
    from .modeling_feature import FeatureDrafter


class EagleSession(DrafterSession):
    """One drafter, or several of one shape that run as one.

    A *slot* is one position of a drafter's context: the pair (feature at t, token at t + 1). Slots
    made of the target's true features are queued and run when drafters are next asked, so drafters
    that sit out some cycles catch up in one pass. One that is asked alone goes on from where all
    were by itself; when all are asked again, all run what came since. (Of three asked for two, all
    run.)

    Args:
        drafters: one, or several that [`Drafter.runs_as_one`] says can.
        target: the target whose embedding they use, and its LM head if they have none.

    Raises:
        ValueError: for several drafters that cannot be stacked.
    """

    def __init__(self, drafters: Sequence[FeatureDrafter], target: PreTrainedModel) -> None:
        self.drafters = tuple(drafters)
        first = self.drafters[0]
        self.device, self.dtype = first.device, first.dtype
        self._config = first.trunk.config
        self.window = first.config.window
        self._target = target
        self._embedding = target.get_input_embeddings()
        module = self._module()
        if module is None:
            raise ValueError(
                f"{len(self.drafters)} drafters of the family {self._config.model_type!r} cannot "
                "run as one, expected those of one of `groups_of`'s groups."
            )
        self._all = _Runner(
            tuple(range(len(self.drafters))),
            module,
            kept_head(self.drafters, target),
            InPlaceCache(DynamicCache(config=self._config)),
        )
        self._began_as = self._state()
        self._alone: _Runner | None = None  # the one that was last asked alone, since all were
        # What was observed since all ran; how many entries of it the one asked alone has run.
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._run_alone = 0

    def _module(self) -> torch.nn.Module | None:
        return self.drafters[0] if len(self.drafters) == 1 else kept_stack(self.drafters)

    def _state(self) -> tuple[object, ...]:
        """What its caches were made by, and how."""
        return state_of(self.drafters), self.drafters[0].device, torch.is_inference_mode_enabled()

    def is_current(self) -> bool:
        if self._state() != self._began_as or self._module() is not self._all.module:
            return False
        head = self._all.head
        return not head.keeps_weights or kept_head(self.drafters, self._target) is head

    @property
    def num_slots(self) -> int:
        """Slots known, run or queued."""
        return self._all.cache.length + sum(len(tokens) for tokens, _ in self._pending)

    def observe(self, tokens: torch.Tensor, states: Mapping[int, torch.Tensor]) -> None:
        found = [states[layer] for layer in self.drafters[0].reads_layers if layer in states]
        if found and len(found[0]):
            features = torch.cat([one.to(found[0].device) for one in found], dim=-1)
            self._pending.append((tokens[-len(features) :], features))

    def forget(self, count: int) -> bool:
        if count >= self.num_slots:
            return False
        self._alone, self._run_alone = None, 0
        while count and self._pending:
            tokens, features = self._pending.pop()
            left = len(tokens) - count
            if left > 0:
                self._pending.append((tokens[:left], features[:left]))
            count = max(-left, 0)
        return count == 0 or self._all.cache.crop(self._all.cache.length - count)

    @torch.no_grad()
    def propose(self, rows: Sequence[int], request: DraftRequest) -> dict[int, DraftTree]:
        if not (self._all.cache.length or self._pending):  # a text of one token
            return {}
        runner, new = self._runner(rows)
        if not new:
            # An earlier turn was taken back to what has been run: there is nothing to go on from.
            return {}
        new = self.window.needed(new)
        past = runner.cache.length + sum(len(tokens) for tokens, _ in new)
        growth = _Growth(self, runner, past, request)
        hidden = growth.read(new)
        stored = runner.cache.stored_lengths()
        levels = request.shape.grow(growth, hidden, request.max_depth, request.go_on)
        # The next cycle has true features for what is accepted.
        runner.cache.keep(stored, [])
        levels = on_host(levels)  # from here on trees are small, and the walk reads them there
        return {
            row: request.shape.prune(assemble(levels, place, request.root))
            for place, row in enumerate(runner.rows)
        }

    def _runner(
        self, rows: Sequence[int]
    ) -> tuple[_Runner, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Who runs, and the queued slots that it has not run."""
        new = self._pending
        if len(rows) > 1 or len(self.drafters) == 1:
            self._alone, self._pending = None, []
            return self._all, new
        (row,) = rows
        if self._alone is None or self._alone.rows != (row,):
            self._alone, self._run_alone = self._row(row), 0
        new = new[self._run_alone :]
        self._run_alone = len(self._pending)
        return self._alone, new

    def _row(self, row: int) -> _Runner:
        """One of the drafters, from where all were."""
        cache = self._all.cache
        # Nothing to go on from: layers get their batch size with their first states.
        alone = cache.row(row) if cache.length else InPlaceCache(DynamicCache(config=self._config))
        return _Runner((row,), self.drafters[row], self._all.head.row(row), alone)

    def forward(
        self,
        runner: _Runner,
        tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """(B, n, hidden): the next features after slots of tokens (B, n) and features."""
        if mask is None:
            mask = self.window.band(runner.cache.length, tokens.shape[1], self.device)
            mask = None if mask is None else additive(mask[None, None], self.dtype)
        embeds = self._embedding(tokens.to(self._embedding.weight.device))
        return runner.module(
            inputs_embeds=embeds.to(self.device, self.dtype),
            features=features,
            attention_mask=mask,
            position_ids=positions[None],
            past_key_values=runner.cache.cache,
        ).last_hidden_state


@dataclass(frozen=True)
class _Runner:
    """What runs the trees of some of a session's drafters."""

    rows: tuple[int, ...]
    module: torch.nn.Module
    head: DraftHead
    cache: InPlaceCache


class _Growth:
    """Growing the trees of one cycle, a tree for each row of the runner (`growth.Drafting`).

    Args:
        session: whose cycle it is.
        runner: who drafts.
        past: slots with true features, once what is new has been read.
        request: what is wanted.
    """

    def __init__(
        self, session: EagleSession, runner: _Runner, past: int, request: DraftRequest
    ) -> None:
        self._session, self._runner, self._past = session, runner, past
        self._request = request

    def read(self, new: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Run slots with true features; returns those predicted at the root, (B, 1, hidden)."""
        device, rows = self._session.device, len(self._runner.rows)
        # To the device nobody waits; from pageable memory the copy is made before the call returns.
        tokens = torch.cat([tokens for tokens, _ in new]).to(
            device, non_blocking=device.type == "cuda"
        )
        features = torch.cat([features.to(device) for _, features in new])
        positions = torch.arange(self._past - len(tokens), self._past, device=device)
        features = features.to(self._session.dtype).expand(rows, -1, -1)
        hidden = self._session.forward(
            self._runner,
            tokens.expand(rows, -1),
            self._runner.module.fuse(features),
            positions,
            None,
        )
        return hidden[:, -1:]

    def expand(self, hidden: torch.Tensor, k: int) -> Expansion:
        request = self._request
        return expand(
            self._runner.head, hidden, k, request.sample_temperature, request.with_entropy
        )

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, visible: torch.Tensor, depth: int
    ) -> torch.Tensor:
        mask = additive(visible[:, None], self._session.dtype, self._past)
        if outside := self._session.window.outside(self._past):
            mask[..., :outside] = torch.finfo(mask.dtype).min
        positions = torch.full_like(tokens[0], self._past - 1 + depth)
        return self._session.forward(self._runner, tokens, hidden, positions, mask)
