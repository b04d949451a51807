"""Exceptions at the n-th call of what decoding calls: callers' objects, and modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import taps_hf


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

    def __repr__(self) -> str:
        return f"Custom({self.where!r})"

    def _ask(self, where: str) -> None:
        if where == self.where:
            self.fuse()

    def begin(self, context):
        self._ask("begin")
        return self

    def go_on(self, depth, log_path):
        self._ask("go_on")
        return True

    def ask(self, everyone):
        self._ask("ask")
        return super().ask(everyone)

    def compose(self, trees):
        self._ask("compose")
        return super().compose(trees)

    def observe(self, outcome):
        self._ask("observe")


class CustomTree(taps_hf.DynamicTree):
    """Raises when it grows."""

    def __init__(self, fuse: Fuse):
        super().__init__(depth=4, top_k=6, num_nodes=30)
        self.__dict__["fuse"] = fuse

    def grow(self, *args, **kwargs):
        self.fuse()
        return super().grow(*args, **kwargs)


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


Arm = Callable[[PreTrainedModel, Sequence[taps_hf.EagleDrafter], Fuse], dict[str, Any]]
"""Puts a fuse into models (copies: it stays there), or into the arguments that it returns."""

MODULES: dict[str, Arm] = {
    "first layer, before": in_layer(0, "before"),
    "first layer, after": in_layer(0, "after"),
    "last layer, before": in_layer(-1, "before"),
    "last layer, after": in_layer(-1, "after"),
    "head": in_head,
    "drafter": in_drafter,
}
CALL_OUTS: dict[str, Arm] = {
    "processor": lambda t, d, fuse: {"logits_processor": LogitsProcessorList([Processor(fuse)])},
    "criterion": lambda t, d, fuse: {"stopping_criteria": StoppingCriteriaList([Criterion(fuse)])},
    "streamer": lambda t, d, fuse: {"streamer": Streamer(fuse)},
    "begin": lambda t, d, fuse: {"strategy": Custom("begin", fuse)},
    "go_on": lambda t, d, fuse: {"strategy": Custom("go_on", fuse)},
    "ask": lambda t, d, fuse: {"strategy": Custom("ask", fuse)},
    "compose": lambda t, d, fuse: {"strategy": Custom("compose", fuse)},
    "observe": lambda t, d, fuse: {"strategy": Custom("observe", fuse)},
    "on_cycle": lambda t, d, fuse: {"on_cycle": fuse},
    "tree": lambda t, d, fuse: {"tree": CustomTree(fuse)},
}
