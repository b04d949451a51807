"""The target in a generation whose passes over trees are compiled."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..target import TargetSession
from ..trees.tree import DraftTree
from .graphs import TargetGraphs, graphs_for, packed
from .memory import Memory, rounded_capacity
from .settings import Compilation, rounded_width, rounded_widths


def target_session(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    layers: Collection[int],
    compilation: Compilation | None,
) -> TargetSession:
    """A [`TargetSession`], with `compilation` one whose passes over trees are compiled.

    Raises:
        ValueError: as [`TargetSession`], or, before anything has run, if the target cannot be
            compiled.
    """
    given = (model, input_ids, generation_config, model_kwargs, layers)
    if compilation is None:
        return TargetSession(*given)
    graphs = graphs_for(model, layers, compilation.config)
    graphs.prepare(compilation.width, compilation.capacity)
    return CompiledTargetSession(graphs, compilation.capacity, *given)


def make_graphs(
    model: PreTrainedModel, layers: Collection[int], compilation: Compilation, rows: int
) -> None:
    """Make all graphs that passes over up to so many rows need, those that are not there yet.

    Raises:
        ValueError: if the target cannot be compiled.
    """
    graphs = graphs_for(model, layers, compilation.config)
    for width in rounded_widths(rows):
        graphs.prepare(width, compilation.capacity)


class CompiledTargetSession(TargetSession):
    """Runs the prompt as any session does, and trees in compiled passes over fixed memory.

    After the prompt its states move into a [`Memory`]; at the end what was added to them there is
    appended to the cache, which then is what any session leaves.

    Args:
        graphs: the target's.
        capacity: of its memory.
        *given: as [`TargetSession`].
    """

    def __init__(self, graphs: TargetGraphs, capacity: int, *given: Any) -> None:
        super().__init__(*given)
        self._graphs, self._capacity = graphs, capacity
        self._memory: Memory | None = None
        self._past = 0  # tokens in it

    def verify(self, tree: DraftTree) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """As [`TargetSession.verify`]; on a GPU the next pass may overwrite what it returns."""
        if self._memory is None:
            self._move_in()
        width = rounded_width(len(tree))
        if self._past + width > self._capacity:  # a tree that is larger than was expected
            self._move_on(rounded_capacity(self._past + width))
        inputs = packed(tree, width, self._past, self.root_position)
        logits, states = self._graphs.run(self._memory, inputs)
        count = len(tree)
        return logits[:count], {layer: x[:count] for layer, x in states.items()}

    def keep(self, path: list[int]) -> None:
        self._memory.keep(self._past, path)
        self._past += len(path)
        self.root_position += len(path)

    def release(self) -> None:
        if self._memory is not None:
            cache = self._cache.cache
            for index, keys, values in self._memory.stored(self._cache.length, self._past):
                # Layers append a copy; it is on them to forget what slides out of their windows.
                if keys.shape[2]:
                    cache.update(keys, values, index)
            self._graphs.give_back(self._memory)
            self._memory = None
        super().release()

    def _move_in(self) -> None:
        """Continue in fixed memory."""
        self._past = self._cache.length
        self._capacity = max(self._capacity, rounded_capacity(self._past + 1))
        self._memory = self._graphs.take(self._capacity)
        for index, layer in enumerate(self._cache.cache.layers):
            if layer.stores:
                self._memory.store(index, layer.keys, layer.values, self._past)
        if self._prompt_mask is not None:
            self._memory.never[: self._prompt_mask.shape[1]] = ~self._prompt_mask[0]

    def _move_on(self, capacity: int) -> None:
        """Continue in a larger memory."""
        larger = self._graphs.take(capacity)
        larger.take_over(self._memory, self._past)
        self._graphs.give_back(self._memory)
        self._memory, self._capacity = larger, capacity
