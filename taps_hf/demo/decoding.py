"""Answers as they are written: a generator of updates around a thread that generates."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..trace import CycleTrace
from .models import load_models
from .settings import Request, Variant

try:  # on a ZeroGPU Space a GPU is lent for the length of a decorated call
    from spaces import GPU
except ImportError:

    def GPU(duration: Any) -> Callable:  # noqa: N802 (the name that `spaces` gives it)
        """Elsewhere the decorator does nothing."""
        return lambda function: function


# torch has one random state for the whole process: sampled answers are written one at a time, or
# two visitors would draw from each other's seeds. Greedy ones draw nothing and need no turn.
_SAMPLING = threading.Lock()
_SIGN_OF_LIFE = 0.25  # seconds, after which whoever reads the updates may want to stop


@dataclass(frozen=True)
class Update:
    """What is new in an answer.

    Args:
        seconds: since the answer was begun.
        tokens: emitted since the last update; none in a sign of life while something takes long.
        cycle: the cycle that emitted them; None for plain `generate`.
    """

    seconds: float
    tokens: tuple[int, ...] = ()
    cycle: CycleTrace | None = None


def _seconds_of_gpu(request: Request, variant: Variant) -> float:
    return request.seconds


@GPU(duration=_seconds_of_gpu)
def stream(request: Request, variant: Variant) -> Iterator[Update]:
    """Answer a prompt, cycle by cycle (plain `generate`: token by token).

    Closing the iterator stops the generation at its next token, and returns when it has stopped.
    """
    models = load_models(request.models)
    inputs = models.encode(request.prompt)
    updates: queue.SimpleQueue[Update | Exception | None] = queue.SimpleQueue()
    stop = threading.Event()
    began = 0.0

    def put(tokens: tuple[int, ...], cycle: CycleTrace | None = None) -> None:
        updates.put(Update(time.perf_counter() - began, tokens, cycle))

    settings: dict[str, Any] = {
        "max_new_tokens": request.max_new_tokens,
        "max_time": request.seconds,
        "do_sample": request.temperature > 0,
        "stopping_criteria": StoppingCriteriaList([_Stop(stop)]),
    }
    if request.temperature > 0:
        settings["temperature"] = request.temperature
    if variant.drafters:
        settings |= {
            "assistant_models": {name: models.drafters[name] for name in variant.drafters},
            "strategy": variant.strategy,
            "tree": request.tree,
            "lookup": False,  # it is a drafter as others are: ticked or not
            "output_draft_trees": True,
            "on_cycle": lambda cycle: put(tuple(t.token for t in cycle.emitted), cycle),
        }
    else:
        settings["streamer"] = _TokenStreamer(lambda token: put((token,)))

    def generate() -> None:
        nonlocal began
        try:
            with _turn(request.seed, stop) if request.temperature > 0 else nullcontext():
                began = time.perf_counter()
                if not stop.is_set():
                    models.target.generate(**inputs, **settings)
        except Exception as error:  # raised again where it can be shown
            updates.put(error)
        else:
            updates.put(None)

    thread = threading.Thread(target=generate, name="taps-generate", daemon=True)
    thread.start()
    try:
        while True:
            try:
                update = updates.get(timeout=_SIGN_OF_LIFE)
            except queue.Empty:
                update = Update(time.perf_counter() - began if began else 0.0)
            if update is None:
                return
            if isinstance(update, Exception):
                raise update
            yield update
    finally:
        stop.set()
        thread.join()


@contextmanager
def _turn(seed: int, stop: threading.Event) -> Iterator[None]:
    """Wait for the turn to sample, or until nobody wants the answer any more."""
    while not (mine := _SAMPLING.acquire(timeout=0.1)) and not stop.is_set():
        pass
    try:
        if mine:
            torch.manual_seed(seed)
        yield
    finally:
        if mine:
            _SAMPLING.release()


class _Stop(StoppingCriteria):
    """Ends the generation when an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class _TokenStreamer(BaseStreamer):
    """Calls a function with each token of the answer."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token = on_token
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.on_token(int(value))
        self.prompt_seen = True

    def end(self) -> None:
        pass
