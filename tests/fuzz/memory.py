"""Generations with partners that come and go: of those that went nothing is left."""

from __future__ import annotations

import functools
import gc
import random
import sys
from collections import Counter
from collections.abc import Sized
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch

import taps_hf

from ..tiny import tiny_drafters, tiny_target
from .calls import draw_call, draw_tokens

GENERATIONS = 1000
_LOOKS = 5


def case(seed: int, generations: int = GENERATIONS) -> None:
    """Counts what is alive at several moments; from the second on it must not become more."""
    choose = random.Random(seed)
    torch.manual_seed(seed)  # of weights and sampling
    steady = tiny_drafters(1)[0]
    looks: list[Counter[str]] = []
    for number in range(generations):
        call = draw_call(choose, "llama", greedy=True)
        partners = [_new_drafter(choose) for _ in range(choose.choice([0, 1, 1, 2]))]
        drafters = [steady, *partners]
        # Not `auto`: measuring takes seconds for each set of partners.
        strategy = choose.choice(["merged", "confidence", "entropy", "single"])
        call.ours |= {"assistant_models": drafters, "strategy": strategy}
        call.common["max_new_tokens"] = 6
        call.common.pop("stop_strings", None)  # transformers keeps what it makes of eight of them
        target = tiny_target() if choose.random() < 0.9 else _new_target(choose)
        ids = draw_tokens(choose, choose.randint(1, 30))
        target.generate(ids, **call.arguments(drafted=True))
        del call, partners, drafters, target, ids
        if (number + 1) % (generations // _LOOKS) == 0:
            _settle(steady)
            looks.append(_alive())
            print(f"after {number + 1}: {dict(looks[-1])}; {_resident_mb():.0f} MB resident")
    for name in looks[0]:
        later = [look[name] for look in looks[1:]]
        assert max(later) <= later[0], f"{name}: {[look[name] for look in looks]}"


def _new_drafter(choose: random.Random) -> taps_hf.EagleDrafter:
    """Of one of three shapes, so that some are stacked with others."""
    shape = choose.choice([{}, {}, {"fc_bias": True}, {"input_norm": True}])
    return taps_hf.EagleDrafter.from_target(tiny_target(), **shape).eval()


def _new_target(choose: random.Random) -> torch.nn.Module:
    model = type(tiny_target())(tiny_target().config).eval()
    model.generation_config = tiny_target().generation_config
    return model


def _settle(steady: taps_hf.EagleDrafter) -> None:
    """Leave the library with the same last generation every time."""
    drafters = [steady, tiny_drafters(2)[1]]
    for _ in range(2):
        tiny_target().generate(
            torch.tensor([[1, 2, 3]]),
            max_new_tokens=8,
            do_sample=False,
            assistant_models=drafters,
            strategy="merged",
        )
    gc.collect()


def _alive() -> Counter[str]:
    """Tensors and their numbers, modules, and entries of this library's own caches."""
    found: Counter[str] = Counter(tensors=0, numbers=0, modules=0, objects=0)
    for thing in gc.get_objects():
        kind = type(thing)  # not isinstance: that would wake lazy proxies
        if issubclass(kind, torch.Tensor):
            found["tensors"] += 1
            found["numbers"] += thing.numel()
        elif issubclass(kind, torch.nn.Module):
            found["modules"] += 1
        elif str(kind.__module__).startswith("taps_hf"):
            found["objects"] += 1
    found["cached"] = _cached()
    return found


def _cached() -> int:
    """Entries of all containers and memos that are global in the library's modules."""
    containers = (dict, list, set, WeakKeyDictionary, WeakValueDictionary, WeakSet)
    count = 0
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "taps_hf":
            continue
        for key, value in vars(module).items():
            if isinstance(value, functools._lru_cache_wrapper):
                count += value.cache_info().currsize
            elif isinstance(value, containers) and isinstance(value, Sized) and key[:2] != "__":
                count += len(value)
    return count


def _resident_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6
