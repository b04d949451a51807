"""A drafter's dynamic trees at many positions of a record, grown together.

A tree at a position depends on nothing but the text before it, so all of a record's trees can be
grown in one batch: the same trees as [`DynamicTree.grow`] gives one after the other, several times
faster, since a level's rows share one pass over the drafter and the head.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from ..drafting import DrafterSession
from ..growth import Level, assemble, grow_dynamic
from ..modeling_eagle import EagleDrafter
from ..shapes import DynamicTree
from ..tree import DraftTree
from .records import Record


class Forest:
    """The trees of one drafter along a record.

    Args:
        drafter: the drafter.
        target: for its embedding and head.
        shape: of the trees.
        record: of the target.
        chunk: how many trees are grown together, when one of them is first asked for.
    """

    def __init__(
        self,
        drafter: EagleDrafter,
        target: PreTrainedModel,
        shape: DynamicTree,
        record: Record,
        chunk: int = 64,
    ) -> None:
        self.drafter, self.shape, self.record, self.chunk = drafter, shape, record, chunk
        self._embedding = target.get_input_embeddings()
        self._session = DrafterSession([drafter], target, with_entropy=True)
        self._levels: dict[int, list[Level]] = {}
        self._row: dict[int, int] = {}
        cache = DynamicCache(config=drafter.trunk.config)
        # Slot t reads token t + 1 and feature t; a tree with root r drafts from slot r - 1 on.
        self._slots = drafter(
            inputs_embeds=self.embed(record.tokens[None, 1:]),
            features=record.features[None].to(drafter.device, drafter.dtype),
            past_key_values=cache,
        ).last_hidden_state[0]
        self._context = (cache.layers[0].keys, cache.layers[0].values)

    def at(self, root: int, max_depth: int) -> DraftTree:
        """The tree whose root is the token at index `root` (1 or more), on the CPU."""
        if root not in self._levels:
            end = min(root + self.chunk, len(self._slots) + 1)
            roots = torch.arange(root, end, device=self.drafter.device)
            hidden = self._slots[roots - 1][:, None]
            bundle = _Bundle(self, self._session, roots, self._context)
            levels = grow_dynamic(bundle, hidden, self.shape.top_k, self.shape.depth)
            for row, position in enumerate(range(root, end)):
                self._levels[position], self._row[position] = levels, row
        token = self.record.tokens[root : root + 1].to(self.drafter.device)
        tree = assemble(self._levels[root][:max_depth], self._row[root], token)
        return tree.best(self.shape.num_nodes).to(torch.device("cpu"))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The target's embeddings, where and as the drafter reads them."""
        embeds = self._embedding(tokens.to(self._embedding.weight.device))
        return embeds.to(self.drafter.device, self.drafter.dtype)


class _Bundle:
    """Drafting at B positions of a record at once.

    Args:
        forest: whose drafter it is.
        session: for its head.
        roots: (B,) int64, ascending: indices of the trees' roots.
        context: keys and values of the record's slots.
    """

    def __init__(
        self,
        forest: Forest,
        session: DrafterSession,
        roots: torch.Tensor,
        context: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self.forest, self.drafter, self.roots = forest, forest.drafter, roots
        self.expand = session.expand
        length = int(roots[-1])
        self._cache = DynamicCache(config=self.drafter.trunk.config)
        self._cache.update(*(x[:, :, :length].expand(len(roots), -1, -1, -1) for x in context), 0)
        self._past = (torch.arange(length, device=roots.device) < roots[:, None])[:, None]

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, visible: torch.Tensor, depth: int
    ) -> torch.Tensor:
        """As [`DrafterSession.step`]."""
        width = tokens.shape[1]
        mask = torch.cat([self._past.expand(-1, width, -1), visible], dim=2)[:, None]
        if self.drafter.trunk.config._attn_implementation == "eager":
            lowest = torch.finfo(self.drafter.dtype).min
            zeros = torch.zeros_like(mask, dtype=self.drafter.dtype)
            mask = zeros.masked_fill(~mask, lowest)
        return self.drafter(
            inputs_embeds=self.forest.embed(tokens),
            features=hidden,
            attention_mask=mask,
            position_ids=(self.roots[:, None] + depth - 1).expand(-1, width),
            past_key_values=self._cache,
        ).last_hidden_state
