"""Keys and values in memory that stays where it is: what compiled passes read and write.

A graph is made for tensors of fixed shapes, and on a GPU replayed on the very same memory. So the
states of all layers lie in tensors of one capacity; what of them is in use is a number that every
pass is told. Rows behind it hold whatever was there before, and masks hide them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

_SMALLEST = 256  # tokens


def rounded_capacity(tokens: int) -> int:
    """A power of two, so that texts of similar lengths share their graphs."""
    return max(_SMALLEST, 1 << (tokens - 1).bit_length())


@dataclass(frozen=True)
class Layout:
    """What a layer stores of a token: shapes are (batch, heads, size).

    Args:
        keys, values: their shapes.
        dtype, device: of both.
    """

    keys: tuple[int, int, int]
    values: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, layer: CacheLayerMixin) -> Layout | None:
        """That of a layer of a dynamic cache after a pass; None if it has stored nothing."""
        keys, values = layer.keys, layer.values
        if keys is None or not keys.numel():
            return None
        shapes = ((*x.shape[:2], x.shape[3]) for x in (keys, values))
        return cls(*shapes, keys.dtype, keys.device)


class FixedLayer(CacheLayerMixin):
    """A cache layer, for one pass, that writes new states at given places of fixed tensors.

    Args:
        keys, values: (batch, heads, capacity, size); written in place.
        places: (n,) int64: where the pass's n tokens go.
    """

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._places = keys, values, places
        self.is_initialized = True

    def lazy_initialization(self, *_: torch.Tensor) -> None:
        """Nothing to do: the memory is there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self._places, key_states)
        self.values.index_copy_(2, self._places, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """How many tokens there are is in the masks and positions that a pass is given."""
        return 0

    def get_mask_sizes(self, *_: object) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length  # its name before transformers 5.10


class Memory:
    """States of all layers for texts of up to `capacity` tokens.

    Args:
        layouts: of the layers; None for those that store nothing.
        capacity: tokens.
    """

    def __init__(self, layouts: Sequence[Layout | None], capacity: int) -> None:
        self.layouts, self.capacity = tuple(layouts), capacity
        # Of one shape all lie in one piece, so that a path is kept in all of them by one copy.
        places: dict[tuple, list[tuple[int, int]]] = {}
        for index, layout in enumerate(layouts):
            if layout is not None:
                for which, shape in enumerate((layout.keys, layout.values)):
                    kind = (shape, layout.dtype, layout.device)
                    places.setdefault(kind, []).append((which, index))
        self._pools: list[torch.Tensor] = []  # (tensors, batch, heads, capacity, size) each
        found: dict[tuple[int, int], torch.Tensor] = {}
        with torch.inference_mode(False):  # or nobody could write there outside of that mode
            for ((batch, heads, size), dtype, device), members in places.items():
                shape = (len(members), batch, heads, capacity, size)
                # Zeros: what a mask hides is multiplied by 0, and must be a number for that.
                pool = torch.zeros(shape, dtype=dtype, device=device)
                self._pools.append(pool)
                found |= dict(zip(members, pool))
            device = next(layout.device for layout in layouts if layout is not None)
            self.never = torch.zeros(capacity, dtype=torch.bool, device=device)
        count = range(len(layouts))
        self.keys = [found.get((0, index)) for index in count]
        self.values = [found.get((1, index)) for index in count]
        for tensor in (*self.keys, *self.values, self.never):
            if tensor is not None:
                # Another memory of this shape runs in the same graph (guard=False).
                torch._dynamo.mark_static_address(tensor, guard=False)

    def clear(self) -> None:
        """Forget everything: an earlier text may have left infinities, which no mask hides."""
        for tensor in (*self._pools, self.never):
            tensor.zero_()

    def store(self, index: int, keys: torch.Tensor, values: torch.Tensor, end: int) -> None:
        """Put a layer's states, (batch, heads, n, size), where the n tokens up to `end` are."""
        start = end - keys.shape[2]
        self.keys[index][:, :, start:end] = keys
        self.values[index][:, :, start:end] = values

    def stored(self, start: int, end: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Index, keys and values, (batch, heads, end - start, size), of all layers that store."""
        for index, (keys, values) in enumerate(zip(self.keys, self.values)):
            if keys is not None:
                yield index, keys[:, :, start:end], values[:, :, start:end]

    def keep(self, past: int, rows: Sequence[int]) -> None:
        """Move `rows`, ascending, of everything behind the first `past` tokens to its front."""
        if list(rows) == list(range(len(rows))):
            return
        for pool in self._pools:
            index = torch.tensor(rows, device="cpu") + past
            index = index.to(pool.device, non_blocking=pool.device.type == "cuda")
            pool[:, :, :, past : past + len(rows)] = pool[:, :, :, index]

    def take_over(self, other: Memory, length: int) -> None:
        """Copy the first `length` tokens of a smaller memory of the same layers."""
        for mine, its in zip(self._pools, other._pools):
            mine[:, :, :, :length] = its[:, :, :, :length]
        self.never[: len(other.never)] = other.never

    @property
    def tensors(self) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None], torch.Tensor]:
        """What a graph is given of it: keys, values, and what is never seen."""
        return self.keys, self.values, self.never


def cache_of(
    keys: Sequence[torch.Tensor | None],
    values: Sequence[torch.Tensor | None],
    places: torch.Tensor,
) -> Cache:
    """The cache that a pass is given, inside of a graph."""
    layers = [
        DynamicLayer() if one is None else FixedLayer(one, other, places)
        for one, other in zip(keys, values)
    ]
    return Cache(layers=layers)
