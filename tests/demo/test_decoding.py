from __future__ import annotations

import importlib.util
import inspect
import pickle
import sys
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from taps_hf import list_strategies
from taps_hf.demo import decoding
from taps_hf.demo.decoding import stream
from taps_hf.demo.models import load_models
from taps_hf.demo.settings import PLAIN, Variant

BOTH = ("math", "chat")


def tokens_of(request, variant) -> list[int]:
    return [token for update in stream(request, variant) for token in update.tokens]


def generating() -> bool:
    return any(thread.name == "taps-generate" for thread in threading.enumerate())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_variant_streams_what_plain_generate_returns(request_of, temperature):
    request = request_of(temperature=temperature, seed=3)
    models = load_models(request.models)
    sampling = {"do_sample": False}
    if temperature:
        torch.manual_seed(3)
        sampling = {"do_sample": True, "temperature": temperature}
    inputs = models.encode(request.prompt)
    expected = models.target.generate(**inputs, **sampling, max_new_tokens=24)
    expected = expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert tokens_of(request, PLAIN) == expected
    for strategy in list_strategies():
        assert tokens_of(request, Variant(strategy, BOTH, strategy)) == expected


def test_updates_carry_cycles_with_their_trees(request_of):
    updates = [u for u in stream(request_of(), Variant("merged", BOTH, "merged")) if u.tokens]
    for update in updates:
        assert update.tokens == tuple(token.token for token in update.cycle.emitted)
        assert len(update.cycle.tree) == update.cycle.num_nodes + 1
    seconds = [update.seconds for update in updates]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


@pytest.mark.parametrize("variant", [PLAIN, Variant("merged", BOTH, "merged")])
def test_closing_ends_the_generation(request_of, variant):
    with closing(stream(request_of(max_new_tokens=200), variant)) as updates:
        next(updates)
        assert generating()
    assert not generating()


def test_a_time_limit(request_of):
    began = time.monotonic()
    tokens = tokens_of(request_of(max_new_tokens=200, seconds=0.02), PLAIN)
    assert len(tokens) < 200
    assert time.monotonic() - began < 20


def test_sampled_answers_take_turns_and_greedy_ones_need_none(request_of):
    """Two that wait at once are each its seed's own, while a third gives up waiting."""
    variant = Variant("merged", BOTH, "merged")
    requests = [request_of(temperature=1.0, seed=seed, max_new_tokens=60) for seed in (1, 2)]
    alone = [tokens_of(request, variant) for request in requests]
    streams = [stream(request, variant) for request in requests]
    with decoding._SAMPLING:  # somebody else's turn
        for updates in streams:
            assert next(updates).tokens == ()  # a sign of life, nothing more
        with closing(stream(requests[0], variant)) as given_up:
            assert next(given_up).tokens == ()
        assert tokens_of(request_of(), variant)
    assert [[token for u in updates for token in u.tokens] for updates in streams] == alone


def test_what_goes_wrong_is_raised_where_it_can_be_shown(request_of, monkeypatch):
    request = request_of()
    target = load_models(request.models).target

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(target, "generate", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        tokens_of(request, PLAIN)
    assert not generating()


def test_on_zerogpu_a_gpu_is_lent_for_each_answer(request_of, monkeypatch):
    """What travels to the process that has the GPU, and back, can be pickled."""
    lent = {}

    def gpu(duration):
        return lambda function: lent.setdefault("function", function) and (lent, duration)

    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=gpu))
    specification = importlib.util.find_spec("taps_hf.demo.decoding")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    (_, duration), variant = module.stream, Variant("merged", BOTH, "merged")
    request = pickle.loads(pickle.dumps(request_of(seconds=33.0)))
    assert duration(request, pickle.loads(pickle.dumps(variant))) == 33.0
    assert inspect.isgeneratorfunction(lent["function"])
    updates = [pickle.loads(pickle.dumps(update)) for update in stream(request, variant)]
    assert [token for update in updates for token in update.tokens] == tokens_of(request, PLAIN)
