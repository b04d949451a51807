"""A feature drafter's trees along several records, grown at one position of each at a time.

A tree at a position depends on nothing but the text before it, so the trees that are wanted in
several records can be grown in one batch: the same trees as sessions grow one after the other,
several times faster, since a level's rows share one pass over the drafter and the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from ..drafters.heads import expand, kept_head
from ..drafters.modeling_feature import FeatureDrafter
from ..masks import additive
from ..trees.growth import Expansion, assemble, on_host
from ..trees.shapes import TreeShape
from ..trees.tree import DraftTree
from .records import Record


@dataclass(frozen=True)
class Spot:
    """Where a tree is wanted.

    Args:
        record: index of the record.
        root: index of the root's token in it.
        max_depth: no node may lie deeper.
    """

    record: int
    root: int
    max_depth: int


class Forest:
    """The trees of one drafter along records.

    Args:
        drafter: the drafter.
        target: for its embedding, and its head if the drafter has none.
        shape: of the trees.
        records: of the target.
        states: of each record, by layer, those of all tokens but the last that the drafter reads.
    """

    def __init__(
        self,
        drafter: FeatureDrafter,
        target: PreTrainedModel,
        shape: TreeShape,
        records: Sequence[Record],
        states: Sequence[Mapping[int, torch.Tensor]],
    ) -> None:
        self.drafter, self.shape, self.records = drafter, shape, list(records)
        self._embedding = target.get_input_embeddings()
        self._head = kept_head([drafter], target)
        slots, keys, values = [], [], []
        for record, known in zip(records, states):
            features = torch.cat([known[layer] for layer in drafter.reads_layers], dim=-1)
            features = features[None].to(drafter.device, drafter.dtype)
            cache = DynamicCache(config=drafter.trunk.config)
            # Slot t reads token t + 1 and feature t; a tree with root r drafts from slot r - 1 on.
            mask = drafter.config.window.band(0, features.shape[1], drafter.device)
            output = drafter(
                inputs_embeds=self.embed(record.tokens[None, 1:]),
                features=drafter.fuse(features),
                attention_mask=None if mask is None else additive(mask[None, None], drafter.dtype),
                past_key_values=cache,
            )
            slots.append(output.last_hidden_state[0])
            keys.append(cache.layers[0].keys[0].transpose(0, 1))
            values.append(cache.layers[0].values[0].transpose(0, 1))
        self._slots = slots
        # (records, heads, slots, head_dim); no tree sees the padding, which is behind its root.
        self._context = tuple(pad_sequence(x, True).transpose(1, 2) for x in (keys, values))

    def grow(self, spots: Sequence[Spot]) -> list[DraftTree]:
        """A tree, on the CPU, at each of some positions; of a text's first token the root alone."""
        if any(spot.root < 1 for spot in spots):  # before it there is no feature
            trees = iter(self.grow([spot for spot in spots if spot.root >= 1]))
            return [self._bare(spot) if spot.root < 1 else next(trees) for spot in spots]
        if not spots:
            return []
        device = self.drafter.device
        rows = torch.tensor([spot.record for spot in spots], device=device)
        roots = torch.tensor([spot.root for spot in spots], device=device)
        hidden = torch.stack([self._slots[spot.record][spot.root - 1] for spot in spots])[:, None]
        length = int(roots.max())
        context = tuple(x[rows, :, :length] for x in self._context)
        bundle = _Bundle(self, roots, context)
        levels = on_host(self.shape.grow(bundle, hidden, max(spot.max_depth for spot in spots)))
        trees = []
        for row, spot in enumerate(spots):
            token = self.records[spot.record].tokens[spot.root : spot.root + 1]
            trees.append(self.shape.prune(assemble(levels[: spot.max_depth], row, token)))
        return trees

    def _bare(self, spot: Spot) -> DraftTree:
        return DraftTree.root(self.records[spot.record].tokens[spot.root : spot.root + 1], 1)

    def expand(self, hidden: torch.Tensor, k: int) -> Expansion:
        """K children of nodes with predicted features (B, F, hidden)."""
        return expand(self._head, hidden, k, with_entropy=True)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The target's embeddings, where and as the drafter reads them."""
        embeds = self._embedding(tokens.to(self._embedding.weight.device))
        return embeds.to(self.drafter.device, self.drafter.dtype)


class _Bundle:
    """Drafting at a position of B records at once (`growth.Drafting`).

    Args:
        forest: whose drafter it is.
        roots: (B,) int64: indices of the trees' roots in their records.
        context: keys and values of the records' slots, up to the last root.
    """

    def __init__(
        self,
        forest: Forest,
        roots: torch.Tensor,
        context: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self.forest, self.drafter, self.roots = forest, forest.drafter, roots
        self.expand = forest.expand
        self._cache = DynamicCache(config=self.drafter.trunk.config)
        self._cache.update(*context, 0)
        slots = torch.arange(context[0].shape[2], device=roots.device)
        past = slots < roots[:, None]
        window = self.drafter.config.window
        if window.size is not None:
            past &= slots >= roots[:, None] - window.size
        self._past = past[:, None]

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, visible: torch.Tensor, depth: int
    ) -> torch.Tensor:
        """As [`growth.Drafting.step`]."""
        width = tokens.shape[1]
        mask = torch.cat([self._past.expand(-1, width, -1), visible], dim=2)[:, None]
        mask = additive(mask, self.drafter.dtype)
        return self.drafter(
            inputs_embeds=self.forest.embed(tokens),
            features=hidden,
            attention_mask=mask,
            position_ids=(self.roots[:, None] + depth - 1).expand(-1, width),
            past_key_values=self._cache,
        ).last_hidden_state
