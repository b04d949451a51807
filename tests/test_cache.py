from __future__ import annotations

import inspect
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from taps_hf import cache as module
from taps_hf.cache import CACHE, GrowingLayer, GrowingSlidingWindowLayer, InPlaceCache, check_cache

from .tiny import prompt, tiny_target

quick = settings(deadline=None, max_examples=40)
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=12)
windows = st.integers(2, 8)


def states(count: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of two heads that say which token they belong to."""
    keys = torch.arange(start, start + count, dtype=torch.float32)[None, None, :, None]
    keys = keys.repeat(1, 2, 1, 3)
    return keys, -keys


def held(layer) -> list[int]:
    """The tokens whose states a layer holds."""
    if not layer.is_initialized:
        return []
    found = layer.keys[0, 0, :, 0].tolist()
    expected = torch.tensor(found)[None, None, :, None].expand(1, 2, -1, 3)
    assert torch.equal(layer.keys, expected)
    assert torch.equal(layer.values, -expected)
    return [int(x) for x in found]


def mask_sizes(layer, count: int) -> tuple[int, int]:
    """What a layer promises for a pass over so many tokens."""
    if "cache_position" in inspect.signature(layer.get_mask_sizes).parameters:
        return layer.get_mask_sizes(torch.arange(count))  # transformers 5.0
    return layer.get_mask_sizes(count)


def pair(window: int | None):
    """A growing layer and the transformers layer that it stands for."""
    if window is None:
        return GrowingLayer(), DynamicLayer()
    return GrowingSlidingWindowLayer(window), DynamicSlidingWindowLayer(window)


@quick
@given(lengths, st.none() | windows)
def test_growing_layers_update_as_transformers_do(counts, window):
    growing, theirs = pair(window)
    for query in (1, 5):
        assert mask_sizes(growing, query) == mask_sizes(theirs, query)
    start = 0
    for count in counts:
        new = states(count, start)
        start += count
        for found, expected in zip(growing.update(*new), theirs.update(*new)):
            assert torch.equal(found, expected)
        assert growing.get_seq_length() == theirs.get_seq_length() == start
        for query in (1, 5):
            assert mask_sizes(growing, query) == mask_sizes(theirs, query)


@st.composite
def cycles(draw):
    """Passes over trees: the number of nodes and the path that is kept."""
    found = []
    for _ in range(draw(st.integers(1, 8))):
        size = draw(st.integers(1, 9))
        rows = draw(st.lists(st.integers(0, size - 1), unique=True, max_size=size))
        found.append((size, sorted(rows)))
    return found


def dynamic_cache(*windows: int | None) -> DynamicCache:
    """A cache with such layers; without any, one that makes its layers as they are needed."""
    cache = DynamicCache()
    cache.layers = [pair(window)[1] for window in windows]
    if windows:
        cache.layer_class_to_replicate = None
    return cache


layer_windows = st.lists(st.none() | windows, max_size=3)


@quick
@given(layer_windows, st.integers(0, 12), cycles(), st.integers(1, 4))
def test_keeping_a_path_equals_gathering_by_hand(windows, before, passes, after):
    cache = dynamic_cache(*windows)
    windows = windows or [None, None]  # layers made on the way: two, all of full attention
    layers = range(len(windows))
    sequence = list(range(before))  # the reference: the tokens that were ever kept
    if before:
        for layer in layers:
            cache.update(*states(before), layer)
    borrowed = InPlaceCache(cache)
    serial = before
    for size, rows in passes:
        assert borrowed.length == len(sequence)
        stored = borrowed.stored_lengths()
        for layer, window in zip(layers, windows):
            keys, _ = cache.update(*states(size, serial), layer)
            visible = sequence if window is None else sequence[-(window - 1) :]
            assert keys[0, 0, :, 0].tolist() == [*visible, *range(serial, serial + size)]
        borrowed.keep(stored, rows)
        # What slid out of a window is gone for good, also if little of the pass was kept.
        sequence += [serial + row for row in rows]
        serial += size
    borrowed.release()
    kinds = [DynamicLayer if w is None else DynamicSlidingWindowLayer for w in windows]
    assert [type(layer) for layer in cache.layers] == kinds
    assert cache.get_seq_length() == len(sequence)
    for layer, window in zip(cache.layers, windows):
        assert held(layer) == (sequence if window is None else sequence[-(window - 1) :])
    # Transformers' own layers work on as if nothing had happened.
    for layer, window in zip(layers, windows):
        promised, _ = mask_sizes(cache.layers[layer], after)
        keys, _ = cache.update(*states(after, serial), layer)
        assert keys.shape[2] == promised
        visible = sequence if window is None else sequence[-(window - 1) :]
        assert keys[0, 0, :, 0].tolist() == [*visible, *range(serial, serial + after)]


def test_an_untouched_cache_is_given_back_as_it_was():
    for windows in ((), (None, 4)):
        cache = dynamic_cache(*windows)
        before = {**vars(cache)}
        layers = list(cache.layers)
        InPlaceCache(cache).release()
        assert cache.layers == layers
        assert {**vars(cache), "layers": None} == {**before, "layers": None}
        assert not any(layer.is_initialized for layer in cache.layers)


def test_layers_without_states_of_their_own_stay_empty():
    cache = dynamic_cache(None, None, 4)
    borrowed = InPlaceCache(cache)
    stored = borrowed.stored_lengths()
    cache.update(*states(5), 0)  # the others share these states, as in some families
    borrowed.keep(stored, [0, 2])
    borrowed.release()
    assert [held(layer) for layer in cache.layers] == [[0, 2], [], []]


@pytest.mark.parametrize("window", [None, 16])
def test_copies_are_amortised(monkeypatch, window):
    copied = []
    original = module._Pool.grow

    def counted(self, extra):
        copied.append(sum(buffer.end - buffer.start for buffer in self.buffers))
        original(self, extra)

    monkeypatch.setattr(module._Pool, "grow", counted)
    layer, _ = pair(window)
    tokens = 5000
    new = states(1)
    for _ in range(tokens):
        layer.update(*new)
    assert layer.get_seq_length() == tokens
    # Keys and values; doubling moves an entry at most twice on average.
    assert sum(copied) <= 2 * 2 * tokens
    if window is None:
        assert len(copied) <= 2 * (1 + math.log2(tokens))
    # Memory is proportional to what is held, however long the sequence.
    capacity = layer._buffers[0].data.shape[2]
    assert capacity <= 2 * (tokens if window is None else window) + module._INITIAL_SLACK


def test_appending_does_not_move_what_is_there():
    layer = GrowingLayer()
    layer.update(*states(2))
    layer.update(*states(3, 2))
    where = layer.keys.data_ptr()
    layer.update(*states(7, 5))
    assert layer.keys.data_ptr() == where
    assert held(layer) == list(range(12))


def test_a_path_is_kept_by_one_copy_for_all_layers_that_are_alike():
    cache = dynamic_cache(None, None, None, 8, 8)
    borrowed = InPlaceCache(cache)
    for _ in range(2):
        stored = borrowed.stored_lengths()
        for layer in range(5):
            cache.update(*states(6), layer)
    copies = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view:
                copies[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    with Counting():
        borrowed.keep(stored, [0, 2, 5])
    assert copies["index"] == copies["copy_"] == 2  # full attention and windows
    borrowed.release()
    assert [held(layer) for layer in cache.layers] == [[*range(6), 0, 2, 5]] * 3 + [
        [2, 3, 4, 5, 0, 2, 5]
    ] * 2


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_model_continues_from_a_released_cache(family):
    model = tiny_target(family)
    ids = prompt(30)
    with torch.no_grad():
        expected = model(ids).logits[:, 21:]
        cache = DynamicCache(config=model.config)
        borrowed = InPlaceCache(cache)
        model(ids[:, :13], **{CACHE: cache})
        stored = borrowed.stored_lengths()
        model(ids[:, 13:25], **{CACHE: cache})
        borrowed.keep(stored, list(range(8)))
        borrowed.release()
        found = model(ids[:, 21:], **{CACHE: cache}).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_dynamic_caches_are_taken():
    check_cache(DynamicCache())
    for family in ("llama", "mistral", "gemma3_text"):
        check_cache(DynamicCache(config=tiny_target(family).config))


def offloaded() -> DynamicCache:
    cache = DynamicCache()
    cache.offloading = True  # as DynamicCache(offloading=True), which wants an accelerator
    return cache


def with_odd_layer() -> DynamicCache:
    class CompressedLayer(DynamicLayer):
        pass

    cache = dynamic_cache(None, None)
    cache.layers[1] = CompressedLayer()
    return cache


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: None, "NoneType"),
        (lambda: ((torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)),), "tuple"),
        (lambda: StaticCache(AutoConfig.for_model("llama"), max_cache_len=8), "StaticCache"),
        (lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()), "EncoderDecoderCache"),
        (offloaded, "offloaded"),
        (with_odd_layer, "CompressedLayer"),
    ],
)
def test_other_caches_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        check_cache(make())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.no_grad()
def test_rows_that_leave_a_batch_change_nothing_for_the_others(family):
    target = tiny_target(family)
    ids = torch.cat([prompt(20, seed=seed) for seed in range(4)])
    kept = torch.tensor([1, 3])
    caches = [InPlaceCache(DynamicCache(config=target.config)) for _ in range(2)]
    target(ids[:, :15], **{CACHE: caches[0].cache})
    caches[0].select_rows(kept)
    target(ids[kept, :15], **{CACHE: caches[1].cache})
    found, expected = (target(ids[kept, 15:], **{CACHE: c.cache}).logits for c in caches)
    torch.testing.assert_close(found, expected)
    assert caches[0].length == 20


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 5),  # all of it
        ([1, 2, 3, 9, 5, 6], 3),
        ([1, 2, 3], 2),  # its last token is left to be run
        ([9, 2, 3], 0),
        ([1, 2, 3, 4, 5, 6], 5),
    ],
)
def test_a_cache_is_cropped_to_what_the_texts_share(text, kept):
    covered = torch.tensor([[1, 2, 3, 4, 5, 6]])  # of the last token emitted there are no states
    cache = DynamicCache(config=tiny_target().config)
    with torch.no_grad():
        tiny_target()(covered[:, :5], **{module.CACHE: cache})
    module.crop_to_shared(cache, covered, torch.tensor([text]))
    assert cache.get_seq_length() == kept
