"""Measuring, once on each machine, what a pass of the target and a level of drafting cost there."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import TypeVar

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from .cache import CACHE
from .compiled.session import make_graphs, target_session
from .compiled.settings import Compilation, rounded_widths
from .drafters.base import Drafter, DraftRequest
from .drafters.ensemble import Ensemble, layers_read
from .strategies.costs import Costs, DraftCost, LearntCosts, ascending
from .target import TargetSession
from .trees.shapes import TreeShape
from .trees.tree import DraftTree

# Rows of a pass, the most telling first: matrix units work in tiles of 16 rows, so there are steps.
WIDTHS = (1, 16, 17, 32, 33, 8, 64, 48, 49, 4, 65, 96, 2, 12, 24, 128)
_PAST = 64  # tokens before the root while measuring, unless the target takes fewer
_SECONDS = 1.6  # in all; one pass of each kind is made even if that takes longer
_MOST_COMPILED = 64  # rows: wider graphs, which take long to make, only if a tree needs them
_ROUNDS = 3  # that widths are chosen for
_MOST_KEPT = 64  # costs of a target: of ever other drafters

_Key = TypeVar("_Key")

_measured: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple, LearntCosts]]
_measured = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def measure_costs(
    target: PreTrainedModel,
    drafters: Sequence[Drafter],
    tree: TreeShape,
    refresh: bool = False,
) -> Costs:
    """Time passes and drafts, in under two seconds on models whose passes are short.

    What was found is kept for as long as the target lives, by shapes, dtypes, devices and number of
    threads. Only speed depends on it, never what is generated.

    Args:
        target: the model to be accelerated.
        drafters: in the order in which `generate` gets them.
        tree: the largest tree that will be grown.
        refresh: measure anew, and forget what generations have taught.
    """
    return learnt_costs(target, drafters, tree, refresh).measured


def learnt_costs(
    target: PreTrainedModel,
    drafters: Sequence[Drafter],
    tree: TreeShape,
    refresh: bool = False,
    compilation: Compilation | None = None,
) -> LearntCosts:
    """What [`measure_costs`] measures, once, and what generations with `auto` learn thereafter.

    With `compilation` those of compiled passes, whose graphs are all made first.
    """
    if compilation is not None:  # outside of the lock: it may take minutes
        rows = min(_most_rows(drafters, tree), _MOST_COMPILED)
        make_graphs(target, layers_read(drafters), compilation, rows)
    key = (
        tuple((type(drafter), drafter.run_key()) for drafter in drafters),
        _tree_key(tree),
        target.dtype,
        target.device,
        torch.get_num_threads(),
        None if compilation is None else compilation.key,
    )
    with _lock:
        kept = _measured.setdefault(target, {})
        if refresh or key not in kept:
            kept[key] = LearntCosts(_measure(target, drafters, tree, compilation))
            while len(kept) > _MOST_KEPT:
                del kept[next(iter(kept))]
        return kept[key]


@torch.no_grad()
def _measure(
    target: PreTrainedModel,
    drafters: Sequence[Drafter],
    tree: TreeShape,
    compilation: Compilation | None = None,
) -> Costs:
    device = target.get_input_embeddings().weight.device
    vocabulary = target.get_input_embeddings().weight.shape[0]
    config = target.config.get_text_config(decoder=True)
    # Well within the target's positions: beyond them some keep other rotary frequencies for good.
    past = min(_PAST, (getattr(config, "max_position_embeddings", None) or 2 * _PAST) // 2)
    # Any tokens do: what a pass costs does not depend on them.
    ids = (torch.arange(past + 1, device=device) % vocabulary)[None]
    cache = DynamicCache(config=config)
    ensemble = Ensemble(drafters, target)
    session = target_session(
        target, ids, GenerationConfig(), {CACHE: cache}, layers_read(drafters), compilation
    )
    tokens, states = session.prefill()

    most = _most_rows(drafters, tree)
    if compilation is None:
        widths = widths_to_measure(most, _pass_seconds(session, ids[0, -1:]))
    else:  # each of them is a graph
        widths = rounded_widths(min(most, _MOST_COMPILED))
    passes = {("target", width): _target_run(session, ids[0, -1:], width) for width in widths}
    drafts: dict[tuple, Callable[[], None]] = {}
    for number, group in enumerate(ensemble.groups):
        for asked in {1, len(group)}:
            for depth in (1, 3):
                drafting = Ensemble([drafters[i] for i in group], target)
                drafting.observe(tokens, states)
                drafts["draft", number, asked, depth] = _draft_run(
                    drafting, range(asked), DraftRequest(tokens[-1:], tree, depth), states
                )
    # By turns, as in a generation: a pass leaves little of the drafters' weights in a CPU's caches.
    turns = zip_longest(passes.items(), drafts.items())
    best = _time(dict(run for turn in turns for run in turn if run is not None), device)
    session.release()

    def draft_cost(number: int, asked: int) -> DraftCost:
        first, third = (best["draft", number, asked, depth] for depth in (1, 3))
        return DraftCost(first, max(third - first, 0.0) / 2)

    return Costs(
        ascending([(key[1], seconds) for key, seconds in best.items() if key[0] == "target"]),
        tuple(ensemble.groups),
        tuple(draft_cost(number, 1) for number in range(len(ensemble.groups))),
        tuple(draft_cost(number, len(group)) for number, group in enumerate(ensemble.groups)),
        () if compilation is None else rounded_widths(most),
    )


def _most_rows(drafters: Sequence[Drafter], tree: TreeShape) -> int:
    return tree.num_nodes * len(drafters) + 1


def _pass_seconds(session: TargetSession, token: torch.Tensor) -> float:
    """Of the target over one row."""
    run = _target_run(session, token, 1)
    run()  # the first takes longer
    (seconds,) = _time({"one": run}, session.device, seconds=0.0).values()
    return seconds


def widths_to_measure(most: int, seconds: float) -> list[int]:
    """Numbers of rows up to `most`, ascending: fewer where a pass over one takes many `seconds`."""
    affordable = max(int(_SECONDS / (1.5 * _ROUNDS * seconds)), 3)  # wider passes take longer
    wanted = dict.fromkeys((1, most, *(width for width in WIDTHS if width < most)))
    return sorted(list(wanted)[:affordable])


def _target_run(session: TargetSession, token: torch.Tensor, width: int) -> Callable[[], None]:
    tree = DraftTree.star(token.cpu(), width - 1)

    def run() -> None:
        session.verify(tree)
        session.keep([])

    return run


def _draft_run(
    drafting: Ensemble,
    asked: Sequence[int],
    request: DraftRequest,
    states: Mapping[int, torch.Tensor],
) -> Callable[[], None]:
    # What a cycle brings: a few tokens, and what was computed for them.
    tokens = request.root.expand(3)
    few = {layer: x[-3:] for layer, x in states.items()}

    def run() -> None:
        drafting.observe(tokens, few)
        drafting.propose(asked, request)

    return run


def _tree_key(tree: TreeShape) -> object:
    """What costs depend on: the shape, or of one that cannot be hashed what can be asked of it."""
    try:
        hash(tree)
    except TypeError:
        return (type(tree), tree.num_nodes, tree.min_vocab_size)
    return tree


def now(device: torch.device) -> float:
    """Seconds on a clock, after what the device still had to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _time(
    runs: Mapping[_Key, Callable[[], None]], device: torch.device, seconds: float = _SECONDS
) -> dict[_Key, float]:
    """The shortest time of each, in as many rounds as fit: others on the machine only add to it."""
    best: dict[_Key, float] = {}
    began, rounds = now(device), 0
    while not rounds or (now(device) - began) * (1 + 1 / rounds) < seconds:
        for key, run in runs.items():
            start = now(device)
            run()
            best[key] = min(best.get(key, float("inf")), now(device) - start)
        rounds += 1
    return best
