"""Something raises at a random moment: the cache is good, and the models are as they were."""

from __future__ import annotations

import random

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import DynamicCache

from taps_hf.cache import CACHE

from ..fuses import CALL_OUTS, Fuse, StoppedError
from ..tiny import tiny_target
from .calls import draw_drafting, draw_family, draw_tokens

_NEW = 24


def case(seed: int) -> None:
    """Any call of a module, of the target's or the drafters', or of what a caller hands in."""
    choose = random.Random(seed)
    family, attention = draw_family(choose)
    target = tiny_target(family, attention=attention)
    ids = draw_tokens(choose, choose.choice([2, 9, 30]))
    limits = {"max_length": ids.shape[1] + _NEW, "do_sample": False}
    expected = target.generate(ids, **limits)

    ours = draw_drafting(choose, family)
    fuse = Fuse(choose.randint(1, 30))
    place = choose.choice(["module", "module", "module", *CALL_OUTS])
    if place == "module":
        fuse = Fuse(choose.randint(1, 600))
    else:
        ours |= CALL_OUTS[place](target, (), fuse)
    if choose.random() < 0.2:
        ours["prefill_chunk_size"] = choose.randint(1, 12)
    cache = DynamicCache(config=target.config)
    covered = 0
    if choose.random() < 0.5:  # by an earlier turn
        covered = choose.randint(1, ids.shape[1] - 1)
        target.generate(ids[:, :covered], max_new_tokens=1, do_sample=False, **{CACHE: cache})
    kinds = [type(layer) for layer in cache.layers]
    print(f"{family}, {attention}, {ids.tolist()}, {covered} cached, call {fuse.left} of {place}")
    print({name: value for name, value in ours.items() if name != "assistant_models"})

    hook = register_module_forward_pre_hook(fuse) if place == "module" else None
    try:
        found = target.generate(ids, **limits, **{CACHE: cache}, **ours)
    except StoppedError:
        found = None
    finally:
        if hook is not None:
            hook.remove()
    if found is not None:  # it did not come so far
        assert fuse.left > 0
        assert torch.equal(found, expected)
    assert not covered or [type(layer) for layer in cache.layers] == kinds

    # Plain generate goes on from the cache, and the models generate as before.
    length = cache.get_seq_length()
    assert covered <= length < expected.shape[1]
    if found is None:
        so_far = expected[:, : max(length + 1, ids.shape[1])]
        if so_far.shape[1] < expected.shape[1]:
            so_far = target.generate(so_far, **limits, **{CACHE: cache})
        assert torch.equal(so_far, expected)
    again = {**draw_drafting(choose, family), "assistant_models": ours["assistant_models"]}
    again["strategy"] = "merged"
    assert torch.equal(target.generate(ids, **limits, **again), expected)
