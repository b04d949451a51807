"""A cache that comes back after an exception, wherever it was raised, is as good as before."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import taps_hf
from taps_hf.cache import CACHE
from tests.fuses import CALL_OUTS, MODULES, Fuse, StoppedError
from tests.tiny import prompt, tiny_drafters, tiny_target

COMMON = {"max_new_tokens": 20, "do_sample": False}
TREE = taps_hf.DynamicTree(depth=4, top_k=6, num_nodes=30)
LENGTH = 30  # of the prompt: longer than the windows
PLACES = {**MODULES, **CALL_OUTS}
ONCE = ["begin"]  # in a generation


# The n-th call in a first or a second turn, the prompt run in chunks of so many.
INTERRUPTED = [
    (1, "first", None),
    (2, "first", None),
    (4, "first", None),
    (3, "first", 7),
    (1, "second", None),
]


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("place", PLACES)
def test_plain_generate_goes_on_from_the_cache(family: str, place: str):
    bare = tiny_target(family)
    ids = prompt(LENGTH)
    expected = bare.generate(ids, **COMMON)
    first = bare.generate(
        ids[:, :20], max_new_tokens=1, do_sample=False, return_dict_in_generate=True
    ).past_key_values
    for n, turn, chunk in INTERRUPTED:
        if n > 1 and place in ONCE:
            continue
        target, drafters = copy.deepcopy(bare), copy.deepcopy(tiny_drafters(1, family))
        cache = DynamicCache(config=bare.config) if turn == "first" else copy.deepcopy(first)
        kinds = [type(layer) for layer in cache.layers]
        ours = {"assistant_models": drafters, "strategy": "merged", "tree": TREE}
        ours |= PLACES[place](target, drafters, Fuse(n))
        if chunk:
            ours["prefill_chunk_size"] = chunk
        with pytest.raises(StoppedError):
            target.generate(ids, **{CACHE: cache}, **COMMON, **ours)
        assert [type(layer) for layer in cache.layers] == kinds
        length = cache.get_seq_length()
        assert (0 if turn == "first" else 20) <= length < len(expected[0])
        so_far = expected[:, : max(length + 1, LENGTH)]
        for layer in cache.layers:
            stored = layer.keys.shape[-2] if layer.is_initialized else 0
            window = getattr(layer, "sliding_window", length + 1)
            assert stored == min(length, window - 1)
        found = bare.generate(
            so_far, max_length=expected.shape[1], do_sample=False, **{CACHE: cache}
        )
        assert torch.equal(found, expected), (n, turn, chunk)
