"""Eight threads share targets and drafters: each gets what it gets alone."""

from __future__ import annotations

import random
import threading
from typing import Any

import torch

from ..fuses import Fuse, StoppedError, Streamer
from ..tiny import FAMILIES, tiny_target
from .calls import Arguments, draw_call, draw_tokens

_THREADS = 8
_CALLS = 3  # of each thread


def case(seed: int) -> None:
    """Greedy calls: threads would share the generator that sampling draws from."""
    choose = random.Random(seed)
    families = choose.sample(sorted(FAMILIES), choose.randint(1, 2))
    work = [[_draw(choose, families) for _ in range(_CALLS)] for _ in range(_THREADS)]
    expected = [[_tokens(family, ids, plain) for family, ids, plain, _ in calls] for calls in work]
    found: list[list[Any]] = [[] for _ in work]
    together = threading.Barrier(_THREADS)

    def run(number: int) -> None:
        together.wait()
        for family, ids, _, ours in work[number]:
            try:
                found[number].append(_tokens(family, ids, ours))
            except StoppedError:  # one that breaks off does not disturb the others
                found[number].append(expected[number][len(found[number])])
            except Exception as error:
                found[number].append(repr(error))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def _draw(
    choose: random.Random, families: list[str]
) -> tuple[str, torch.Tensor, Arguments, Arguments]:
    """A family, a prompt, and the arguments without and with drafters."""
    family = choose.choice(families)
    call = draw_call(choose, family, greedy=True)
    ids = draw_tokens(choose, choose.randint(1, 30))
    print(f"{family}, {ids.tolist()}\n{call}")
    plain, ours = call.arguments(drafted=False), call.arguments(drafted=True)
    if choose.random() < 0.1 and "custom_generate" not in ours:
        ours["streamer"] = Streamer(Fuse(choose.randint(1, 20)))
    return family, ids, plain, ours


def _tokens(family: str, ids: torch.Tensor, arguments: Arguments) -> list[int]:
    output = tiny_target(family).generate(ids, **arguments)
    return (output if isinstance(output, torch.Tensor) else output.sequences)[0].tolist()
