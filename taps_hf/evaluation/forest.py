"""A drafter's dynamic trees at many positions of a record, grown together.

A tree at a position depends on nothing but the text before it, so all of a record's trees can be
grown in one batch: the same trees as [`DynamicTree.grow`] gives one after the other, several times
faster, since a level's rows share one pass over the drafter and the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from ..drafting import DrafterSession
from ..modeling_eagle import EagleDrafter
from ..shapes import DynamicTree
from ..tree import DraftTree
from .records import Record


@dataclass
class _Level:
    """Candidates of one level in B trees: k children of each of F nodes."""

    tokens: torch.Tensor  # (B, F, k) int64
    parents: torch.Tensor  # (B, F) int64: node indices
    log_confidence: torch.Tensor  # (B, F, k) float32
    log_path: torch.Tensor  # (B, F, k) float32
    entropy: torch.Tensor  # (B, F) float32


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
        self._session = DrafterSession(drafter, target, 0, 1, with_entropy=True)
        self._trees: dict[int, list[_Level]] = {}
        self._row: dict[int, int] = {}
        cache = DynamicCache(config=drafter.trunk.config)
        # Slot t reads token t + 1 and feature t; a tree with root r drafts from slot r - 1 on.
        self._slots = drafter(
            inputs_embeds=self._embed(record.tokens[None, 1:]),
            features=record.features[None].to(drafter.device, drafter.dtype),
            past_key_values=cache,
        ).last_hidden_state[0]
        self._context = (cache.layers[0].keys, cache.layers[0].values)

    def at(self, root: int, max_depth: int) -> DraftTree:
        """The tree whose root is the token at index `root` (1 or more), on the CPU."""
        if root not in self._trees:
            end = min(root + self.chunk, len(self._slots) + 1)
            levels = self._grow(torch.arange(root, end, device=self.drafter.device))
            for row, position in enumerate(range(root, end)):
                self._trees[position], self._row[position] = levels, row
        return self._tree(root, max_depth)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        embeds = self._embedding(tokens.to(self._embedding.weight.device))
        return embeds.to(self.drafter.device, self.drafter.dtype)

    def _grow(self, roots: torch.Tensor) -> list[_Level]:
        """All levels of the trees with these roots, (B,) int64."""
        device, count = roots.device, len(roots)
        level = self._expand(self._slots[roots - 1][:, None], None, roots.new_zeros(count, 1))
        levels = [level]
        k = level.tokens.shape[2]
        hidden = self._slots[roots - 1][:, None].expand(-1, k, -1)
        best = torch.arange(k, device=device).expand(count, -1)
        above = torch.zeros(count, k, 0, dtype=torch.bool, device=device)
        length = int(roots[-1])
        keys, values = (x[:, :, :length].expand(count, -1, -1, -1) for x in self._context)
        cache = DynamicCache(config=self.drafter.trunk.config)
        cache.update(keys, values, 0)
        past = (torch.arange(length, device=device) < roots[:, None])[:, None]
        first = 1  # node index of the last level's first candidate
        for depth in range(2, self.shape.depth + 1):
            width = best.shape[1]
            eye = torch.eye(width, dtype=torch.bool, device=device).expand(count, -1, -1)
            visible = torch.cat([above, eye], dim=2)
            mask = torch.cat([past.expand(-1, width, -1), visible], dim=2)[:, None]
            if self.drafter.trunk.config._attn_implementation == "eager":
                lowest = torch.finfo(self.drafter.dtype).min
                zeros = torch.zeros_like(mask, dtype=self.drafter.dtype)
                mask = zeros.masked_fill(~mask, lowest)
            hidden = self.drafter(
                inputs_embeds=self._embed(level.tokens.flatten(1).gather(1, best)),
                features=hidden,
                attention_mask=mask,
                position_ids=(roots[:, None] + depth - 2).expand(-1, width),
                past_key_values=cache,
            ).last_hidden_state
            nodes = best + first
            first += level.tokens[0].numel()
            log_path = level.log_path.flatten(1).gather(1, best)
            level = self._expand(hidden, log_path, nodes)
            levels.append(level)
            flat = level.log_path.flatten(1)
            best = flat.topk(min(self.shape.top_k, flat.shape[1]), dim=1).indices
            row = best // k
            hidden = hidden.gather(1, row[:, :, None].expand(-1, -1, hidden.shape[2]))
            above = visible.gather(1, row[:, :, None].expand(-1, -1, visible.shape[2]))
        return levels

    def _expand(
        self, hidden: torch.Tensor, log_path: torch.Tensor | None, nodes: torch.Tensor
    ) -> _Level:
        """Children of the nodes (B, F) with predicted features (B, F, hidden)."""
        count, width = nodes.shape
        found = self._session.expand(hidden.flatten(0, 1), self.shape.top_k)
        tokens, confidence = (
            x.view(count, width, -1) for x in (found.tokens, found.log_confidence)
        )
        path = confidence if log_path is None else log_path[:, :, None] + confidence
        return _Level(tokens, nodes, confidence, path, found.entropy.view(count, width))

    def _tree(self, root: int, max_depth: int) -> DraftTree:
        row = self._row[root]
        levels = self._trees[root][:max_depth]
        tokens = [level.tokens[row].flatten() for level in levels]
        width = levels[0].tokens.shape[2]
        parents = [level.parents[row].repeat_interleave(width) for level in levels]
        depths = [torch.full_like(t, d) for d, t in enumerate(tokens, start=1)]
        columns = {
            name: torch.cat([getattr(level, name)[row].flatten() for level in levels])
            for name in ("log_confidence", "log_path")
        }
        entropy = torch.cat([x.entropy[row].repeat_interleave(width) for x in levels])
        token = self.record.tokens[root : root + 1].to(entropy.device)
        one, nan = entropy.new_ones(1), entropy.new_full((1,), torch.nan)
        tree = DraftTree(
            tokens=torch.cat([token, *tokens]),
            parents=torch.cat([torch.full_like(token, -1), *parents]),
            depths=torch.cat([torch.zeros_like(token), *depths]),
            confidence=torch.cat([one, columns["log_confidence"].exp()])[None],
            path_confidence=torch.cat([one, columns["log_path"].exp()])[None],
            entropy=torch.cat([nan, entropy])[None],
        )
        return tree.best(self.shape.num_nodes).to(torch.device("cpu"))
