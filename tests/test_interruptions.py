"""A cache that comes back after an exception, wherever it was raised, is as good as before."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import taps_hf
from taps_hf.cache import CACHE
from tests.tiny import prompt, tiny_drafters, tiny_target

COMMON = {"max_new_tokens": 20, "do_sample": False}
TREE = taps_hf.DynamicTree(depth=4, top_k=6, num_nodes=30)
LENGTH = 30  # of the prompt: longer than the windows


class StoppedError(Exception):
    """Nothing that anybody catches."""


class Fuse:
    """Blows when it is asked the n-th time."""

    def __init__(self, n: int):
        self.left = n

    def __call__(self, *args, **kwargs) -> None:
        self.left -= 1
        if self.left == 0:
            raise StoppedError


class Processor(LogitsProcessor):
    def __init__(self, fuse: Fuse):
        self.fuse = fuse

    def __call__(self, input_ids, scores):
        self.fuse()
        return scores


class Criterion(StoppingCriteria):
    def __init__(self, fuse: Fuse):
        self.fuse = fuse

    def __call__(self, input_ids, scores, **kwargs):
        self.fuse()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Streamer(BaseStreamer):
    def __init__(self, fuse: Fuse):
        self.fuse = fuse

    def put(self, value):
        self.fuse()

    def end(self):
        pass


class Custom(taps_hf.Merged):
    def __init__(self, where: str, fuse: Fuse):
        super().__init__()
        self.__dict__.update(where=where, fuse=fuse)

    def _ask(self, where: str) -> None:
        if where == self.where:
            self.fuse()

    def ask(self, everyone):
        self._ask("ask")
        return super().ask(everyone)

    def compose(self, trees):
        self._ask("compose")
        return super().compose(trees)

    def observe(self, outcome):
        self._ask("observe")


def in_layer(layer: int, part: str):
    """Before or after a layer's attention: some layers' caches have the pass and some do not."""

    def arm(target: PreTrainedModel, drafters, fuse: Fuse) -> dict:
        attention = target.base_model.layers[layer].self_attn
        if part == "before":
            attention.register_forward_pre_hook(fuse)
        else:
            attention.register_forward_hook(fuse)
        return {}

    return arm


def in_drafter(target, drafters, fuse) -> dict:
    drafters[0].trunk.register_forward_pre_hook(fuse)
    return {}


def in_head(target, drafters, fuse) -> dict:
    target.get_output_embeddings().register_forward_hook(fuse)
    return {}


PLACES = {
    "first layer, before": in_layer(0, "before"),
    "first layer, after": in_layer(0, "after"),
    "last layer, before": in_layer(-1, "before"),
    "last layer, after": in_layer(-1, "after"),
    "head": in_head,
    "drafter": in_drafter,
    "processor": lambda t, d, fuse: {"logits_processor": LogitsProcessorList([Processor(fuse)])},
    "criterion": lambda t, d, fuse: {"stopping_criteria": StoppingCriteriaList([Criterion(fuse)])},
    "streamer": lambda t, d, fuse: {"streamer": Streamer(fuse)},
    "ask": lambda t, d, fuse: {"strategy": Custom("ask", fuse)},
    "compose": lambda t, d, fuse: {"strategy": Custom("compose", fuse)},
    "observe": lambda t, d, fuse: {"strategy": Custom("observe", fuse)},
    "on_cycle": lambda t, d, fuse: {"on_cycle": fuse},
}


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
