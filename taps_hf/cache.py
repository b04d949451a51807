"""Key-value caches that grow in place and keep only the accepted path of a draft tree.

transformers' dynamic layers concatenate: every pass copies the whole past. While a generation
runs, [`InPlaceCache`] puts layers in their place that append to an over-allocated buffer (copies
amortised over doublings) and whose tree entries can be reduced to one path. Afterwards the cache
object holds transformers' own layers again, with the states plain `generate` would have left.
"""

from __future__ import annotations

import copy
import inspect

import torch
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_PREPARED = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _PREPARED else "past_key_values"
"""What `generate` and the models call their cache: transformers 5.24 renamed it."""
_INITIAL_SLACK = 256  # tokens; a first doubling later than this is rare in chat answers


class _Buffer:
    """A tensor of shape (batch, heads, capacity, head_dim) of which `[start:end]` is in use."""

    def __init__(self) -> None:
        self.data: torch.Tensor | None = None
        self.start = 0
        self.end = 0
        self.pool: _Pool | None = None

    @property
    def view(self) -> torch.Tensor:
        return self.data[:, :, self.start : self.end]

    def append(self, states: torch.Tensor) -> None:
        """Append states of shape (batch, heads, n, head_dim)."""
        n = states.shape[2]
        if self.data is None:  # as they are: they are copied when there is a pool
            self.data, self.end = states, n
            return
        if self.end + n > self.data.shape[2]:
            (self.pool or _Pool([], [self])).grow(n)  # alone where no path was ever kept
        self.data[:, :, self.end : self.end + n] = states
        self.end += n

    def select(self, rows: torch.Tensor) -> None:
        """Keep `rows` of the batch, in memory of its own."""
        self.data, self.pool = self.data[rows], None


class _Pool:
    """Buffers of one shape that are used alike, in one piece of memory.

    Of a tree's entries a path is kept in all of them by one copy: on a GPU one for each layer's
    keys and values would be as many kernels as a tenth of the target's pass.

    Args:
        layers: whose buffers they are.
        buffers: of equal shapes but for capacities.
    """

    def __init__(self, layers: list[_GrowingMixin], buffers: list[_Buffer]) -> None:
        self.layers, self.buffers = layers, buffers
        self.data: torch.Tensor | None = None  # (buffers, batch, heads, capacity, head_dim)

    def grow(self, extra: int) -> None:
        """Move what is in use to the front of memory with room for as much again."""
        # In the middle of a pass some layers have appended already, or let go of something.
        start = min(buffer.start for buffer in self.buffers)
        length = max(buffer.end for buffer in self.buffers) - start
        batch, heads, _, size = self.buffers[0].data.shape
        capacity = 2 * (length + extra) + _INITIAL_SLACK
        shape = (len(self.buffers), batch, heads, capacity, size)
        data = self.buffers[0].data.new_empty(shape)
        for buffer, place in zip(self.buffers, data):
            place[:, :, buffer.start - start : buffer.end - start] = buffer.view
        self.use(data)
        for buffer in self.buffers:
            buffer.start, buffer.end = buffer.start - start, buffer.end - start
        for layer in self.layers:
            layer._refresh()

    def use(self, data: torch.Tensor) -> None:
        """Let the buffers live in this memory."""
        self.data = data
        for buffer, place in zip(self.buffers, data):
            buffer.data, buffer.pool = place, self if self.layers else None

    def gather(self, past: int, rows: torch.Tensor) -> None:
        """Move `rows` of everything after the first `past` entries to its front."""
        base = self.buffers[0].start + past
        rows = rows.to(self.data.device, non_blocking=self.data.device.type == "cuda")
        self.data[:, :, :, base : base + len(rows)] = self.data[:, :, :, base + rows]


class _GrowingMixin:
    """What growing layers add to transformers' dynamic layers."""

    def _load(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.lazy_initialization(keys, values)
        self._append(keys, values)

    def _append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if not hasattr(self, "_buffers"):
            self._buffers = (_Buffer(), _Buffer())
        for buffer, states in zip(self._buffers, (keys, values)):
            buffer.append(states)
        self._refresh()

    def _refresh(self) -> None:
        self.keys, self.values = (buffer.view for buffer in self._buffers)

    def cut(self, past: int, count: int) -> None:
        """Of everything after the first `past` stored entries, keep the first `count`."""
        # Layers that share another layer's states store none; a pass can fail before the first.
        if not self.stores:
            return
        for buffer in self._buffers:
            buffer.end = buffer.start + past + count
        self._refresh()

    @property
    def stores(self) -> bool:
        """Whether there are any states."""
        return hasattr(self, "_buffers") and self._buffers[1].data is not None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep those rows of the batch; int64 of shape (rows,)."""
        if self.is_initialized:
            for buffer in self._buffers:
                buffer.select(indices.to(self.keys.device))
            self._refresh()


class GrowingLayer(_GrowingMixin, DynamicLayer):
    """A full-attention cache layer that appends in place."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._append(key_states, value_states)
        return self.keys, self.values


class GrowingSlidingWindowLayer(_GrowingMixin, DynamicSlidingWindowLayer):
    """A sliding-window cache layer that appends in place and forgets when a path is committed.

    As in transformers, `update` returns the at most `sliding_window - 1` stored entries followed by
    all new ones, and `cumulative_length` counts every token seen.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.forget()
        self._append(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        return self.keys, self.values

    def cut(self, past: int, count: int) -> None:
        dropped = self.keys.shape[-2] - past - count if self.is_initialized else 0
        super().cut(past, count)
        self.cumulative_length -= dropped
        self.forget()

    def forget(self) -> None:
        """Drop what slid out of the window."""
        if not hasattr(self, "_buffers"):
            return
        for buffer in self._buffers:
            buffer.start = max(buffer.start, buffer.end - (self.sliding_window - 1))
        self._refresh()


def _growing(layer: DynamicLayer) -> GrowingLayer | GrowingSlidingWindowLayer:
    """A growing layer with the states of `layer`."""
    if type(layer) is DynamicSlidingWindowLayer:
        grown = GrowingSlidingWindowLayer(layer.sliding_window)
        grown.cumulative_length = layer.cumulative_length
    else:
        grown = GrowingLayer()
    if layer.is_initialized and layer.keys is not None and layer.keys.numel():
        grown._load(layer.keys, layer.values)
    return grown


def check_cache(cache: Cache | None) -> None:
    """Refuse caches of which a tree's path cannot be kept.

    Raises:
        ValueError: unless `cache` is a `DynamicCache` of full-attention and sliding-window layers.
    """
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"`{CACHE}` is a {type(cache).__name__}; speculative decoding expected a "
            "DynamicCache (leave `cache_implementation` unset and `use_cache` on)."
        )
    if getattr(cache, "offloading", False):
        raise ValueError(
            '`cache_implementation` is "offloaded"; speculative decoding expected a cache whose '
            "layers stay on their devices."
        )
    odd = {type(x).__name__ for x in cache.layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    if odd:
        raise ValueError(
            f"`{CACHE}` has layers of type {', '.join(sorted(odd))}; speculative decoding "
            "expected full-attention or sliding-window layers only."
        )


def crop_to_shared(cache: DynamicCache, covered: torch.Tensor, text: torch.Tensor) -> None:
    """Drop what a cache holds beyond what a new text begins with: it can then go on from there.

    A chat template seldom turns an answer back into the very tokens that were emitted. At least the
    text's last token is left to be run. Layers with sliding windows have forgotten what they would
    have to go back to once the text is longer than those: transformers then refuses to crop.

    Args:
        cache: as it was returned, of sequences `covered`.
        covered: (1, n) int64: whose states it holds, as far as it goes.
        text: (1, m) int64: what the next turn begins with.

    Raises:
        RuntimeError: of transformers, where a layer with a sliding window cannot be cropped.
    """
    length = min(covered.shape[1], text.shape[1])
    differs = (covered[0, :length] != text[0, :length].to(covered.device)).nonzero()
    shared = int(differs[0]) if len(differs) else length
    surplus = cache.get_seq_length() - min(shared, text.shape[1] - 1)
    if surplus > 0:
        cache.crop(-surplus)


class InPlaceCache:
    """Borrows a `DynamicCache` for one generation.

    Args:
        cache: the cache to work on; [`check_cache`] must have passed. Its layers are swapped for
            growing ones until [`release`] is called.
    """

    def __init__(self, cache: DynamicCache) -> None:
        self.cache = cache
        self._layers = cache.layers
        self._layer_class = getattr(cache, "layer_class_to_replicate", None)
        cache.layers = [_growing(layer) for layer in cache.layers]
        if self._layer_class is not None:  # DynamicCache() makes its layers as they are needed
            cache.layer_class_to_replicate = GrowingLayer
        self._pools: list[_Pool] = []

    @property
    def length(self) -> int:
        """Tokens seen, counting those that slid out of a window."""
        return self.cache.get_seq_length()

    def stored_lengths(self) -> list[int]:
        """Entries each layer carries into the next pass; give it to `keep` afterwards."""
        self._form_pools()
        lengths = []
        for layer in self.cache.layers:
            if isinstance(layer, GrowingSlidingWindowLayer):
                layer.forget()
            lengths.append(layer.keys.shape[-2] if layer.is_initialized else 0)
        return lengths

    def keep(self, past: list[int], rows: list[int]) -> None:
        """Keep, of the entries appended since `past` was read, those in `rows` (ascending).

        Args:
            past: what `stored_lengths` gave before the pass.
            rows: indices of the entries to keep, relative to the pass.
        """
        # Layers that were made during the pass had nothing stored before it.
        stored = dict(zip(map(id, self.cache.layers), past))
        if rows != list(range(len(rows))):
            self._form_pools()
            index = torch.tensor(rows, device="cpu")
            for pool in self._pools:
                pool.gather(stored.get(id(pool.layers[0]), 0), index)
        for layer in self.cache.layers:
            layer.cut(stored.get(id(layer), 0), len(rows))

    def _form_pools(self) -> None:
        """Put layers that have none into pools, with those that are used alike."""
        alike: dict[object, list[_GrowingMixin]] = {}
        for layer in self.cache.layers:
            if not layer.stores or layer._buffers[0].pool is not None:
                continue
            keys, values = (buffer.data for buffer in layer._buffers)
            window = getattr(layer, "sliding_window", None)
            kind = (keys.device, keys.dtype, keys.shape[:2], keys.shape[3], values.shape[3])
            used = (layer._buffers[0].start, layer._buffers[0].end)
            alike.setdefault((window, kind, used), []).append(layer)
        for layers in alike.values():
            pairs = [layer._buffers for layer in layers]
            together = [[buffer for pair in pairs for buffer in pair]]
            if pairs[0][0].data.shape[3] != pairs[0][1].data.shape[3]:  # keys from values
                together = [list(some) for some in zip(*pairs)]
            for buffers in together:
                pool = _Pool(layers, buffers)
                pool.grow(0)
                self._pools.append(pool)

    def crop(self, length: int) -> bool:
        """Keep the first `length` tokens, if no layer has let go of what it would need again."""
        for layer in self.cache.layers:
            windowed = isinstance(layer, GrowingSlidingWindowLayer) and layer.is_initialized
            if windowed and layer.keys.shape[-2] < layer.cumulative_length:
                return False
        for layer in self.cache.layers:
            layer.cut(length, 0)
        return True

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep those rows of the batch; int64 of shape (rows,)."""
        for layer in self.cache.layers:
            layer.batch_select_indices(rows)
        self._pools = []

    def row(self, row: int) -> InPlaceCache:
        """One row of the batch, in the same memory.

        What is appended to it stays unknown to this cache, which later writes over it.
        """
        self._form_pools()
        view = copy.copy(self)
        view.cache = copy.copy(self.cache)
        view.cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in view.cache.layers:
            if layer.stores:
                layer._buffers = tuple(copy.copy(buffer) for buffer in layer._buffers)
        places = {id(layer): place for place, layer in enumerate(self.cache.layers)}
        view._pools = []
        for pool in self._pools:
            layers = [view.cache.layers[places[id(layer)]] for layer in pool.layers]
            # Of each layer keys, values or both, in the order they have in the pool.
            wanted = {id(buffer) for buffer in pool.buffers}
            buffers = [
                copied
                for old, new in zip(pool.layers, layers)
                for buffer, copied in zip(old._buffers, new._buffers)
                if id(buffer) in wanted
            ]
            one = _Pool(layers, buffers)
            one.use(pool.data[:, row : row + 1])
            view._pools.append(one)
        for layer in view.cache.layers:
            if layer.stores:
                layer._refresh()
        return view

    def release(self) -> None:
        """Give the cache its own kind of layers back, holding exactly the kept states."""
        layers = []
        for i, grown in enumerate(self.cache.layers):
            layer = self._layers[i] if i < len(self._layers) else DynamicLayer()
            if isinstance(grown, GrowingSlidingWindowLayer):
                grown.forget()  # the prefill's states, if no pass came after it
            if grown.is_initialized and grown.keys.numel():
                if not layer.is_initialized:
                    layer.lazy_initialization(grown.keys, grown.values)
                # Copies, so that the buffers with their slack are not kept alive.
                layer.keys, layer.values = (
                    states.clone(memory_format=torch.contiguous_format)
                    for states in (grown.keys, grown.values)
                )
                if isinstance(grown, GrowingSlidingWindowLayer):
                    layer.cumulative_length = grown.cumulative_length
            layers.append(layer)
        self.cache.layers = layers
        if self._layer_class is not None:
            self.cache.layer_class_to_replicate = self._layer_class
