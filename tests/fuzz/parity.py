"""Conversations in float32, with and without drafters: whatever can be seen is the same."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from taps_hf.cache import CACHE

from ..tiny import VOCAB, tiny_target
from .calls import (
    TAKES_ONLY_NEW,
    Call,
    draw_call,
    draw_drafting,
    draw_family,
    draw_tokens,
    draw_tree,
)

# Processors make nan of -inf, of plain generate's scores as of ours.
_NEAR = {"atol": 1e-4, "rtol": 1e-4, "equal_nan": True}


def case(seed: int) -> None:
    """One to three turns, the cache cropped, exchanged or left out in between."""
    choose = random.Random(seed)
    if choose.random() < 0.05:
        _rejection(choose)
        return
    family, attention = draw_family(choose)
    target = tiny_target(family, attention=attention)
    print(f"{family}, {attention}")
    length = choose.choice([1, 2, 5, 9, 15, 30, 30, 240])
    history, mask = draw_tokens(choose, length), torch.ones(1, length, dtype=torch.long)
    if choose.random() < 0.2:  # left padding; and holes
        mask[0, : choose.randrange(length)] = 0
    elif length > 1 and choose.random() < 0.1:
        mask[0, choose.randrange(length)] = 0
    caches: list[DynamicCache | None] = [None, None]
    for _ in range(choose.choice([1, 1, 2, 3])):
        call = draw_call(choose, family)
        inputs = history
        if caches[0] is not None and TAKES_ONLY_NEW and choose.random() < 0.3:
            inputs = history[:, caches[0].get_seq_length() :]
        print(f"{inputs.tolist()}, mask {mask.tolist()}, caches of {_lengths(caches)}\n{call}")
        answer = _turn(target, call, inputs, mask, caches)
        if answer is None:
            return
        history = torch.cat([history, answer], dim=1)
        history, kept = _between_turns(choose, history, caches)
        mask = mask[:, :kept]
        more = torch.ones(1, history.shape[1] - mask.shape[1], dtype=torch.long)
        mask = torch.cat([mask, more], dim=1)


def _turn(
    target: PreTrainedModel,
    call: Call,
    inputs: torch.Tensor,
    mask: torch.Tensor,
    caches: list[DynamicCache | None],
) -> torch.Tensor | None:
    """Generate twice and compare; `caches` are those left behind.

    Returns:
        (1, n) int64: the answer; None if plain `generate` raises.
    """
    found: list[Any] = []
    for drafted in (False, True):
        arguments = call.arguments(drafted)
        cache = caches[drafted]
        if cache is None and not call.common["return_dict_in_generate"]:
            cache = DynamicCache(config=target.config)  # or else it would not be seen
        if cache is not None:
            arguments[CACHE] = cache
        if call.seed is not None:
            torch.manual_seed(call.seed)
        try:
            output = target.generate(inputs, attention_mask=mask, **arguments)
        except Exception as error:
            # Some arguments are too much for plain generate: say, those that forbid every token.
            if found and found[0] is not None:
                raise
            print(f"  {type(error).__name__}: {error}")
            found.append(None)
            continue
        caches[drafted] = output.past_key_values if cache is None else cache
        sequence = output if isinstance(output, torch.Tensor) else output.sequences
        if not drafted:
            call.foretell(sequence[0, inputs.shape[1] :].tolist())
        found.append(
            (output, sequence, call.seen(), torch.rand(3) if call.seed is not None else None)
        )
    if found[0] is None:
        assert found[1] is None, "plain generate raises, and with drafters it does not"
        return None
    (plain, expected, plain_seen, plain_next), (ours, tokens, our_seen, our_next) = found
    assert torch.equal(tokens, expected), f"{tokens.tolist()}, expected {expected.tolist()}"
    assert our_seen == plain_seen
    if plain_next is not None:
        assert torch.equal(our_next, plain_next), "other random numbers were drawn"
    _compare_caches(*caches, mask[0].bool())
    if call.common["return_dict_in_generate"]:
        _compare_details(ours, plain, expected.shape[1] - inputs.shape[1])
    return expected[:, inputs.shape[1] :]


def _compare_details(ours: Any, plain: Any, emitted: int) -> None:
    for name in ("scores", "logits"):
        mine, theirs = getattr(ours, name), getattr(plain, name)
        assert (mine is None) == (theirs is None)
        if theirs:
            assert len(mine) == len(theirs) == emitted
            torch.testing.assert_close(torch.cat(mine), torch.cat(theirs), **_NEAR)
    if hasattr(ours, "draft_trace"):
        cycles = ours.draft_trace.cycles
        tokens = [token.token for cycle in cycles for token in cycle.emitted]
        assert tokens == ours.sequences[0, -emitted:].tolist()


def _compare_caches(plain: DynamicCache, ours: DynamicCache, mask: torch.Tensor) -> None:
    """Where tokens are masked there may be anything, as nobody looks there."""
    length = plain.get_seq_length()
    mask = torch.cat([mask, mask.new_ones(max(length - len(mask), 0))])[:length]
    assert ours.get_seq_length() == plain.get_seq_length()
    assert len(ours.layers) == len(plain.layers)
    for mine, theirs in zip(ours.layers, plain.layers):
        assert type(mine) is type(theirs)
        assert mine.keys.shape == theirs.keys.shape
        seen = mask[length - theirs.keys.shape[2] :]
        for name in ("keys", "values"):
            found, expected = (getattr(layer, name)[:, :, seen] for layer in (mine, theirs))
            torch.testing.assert_close(found, expected, **_NEAR)


def _between_turns(
    choose: random.Random, history: torch.Tensor, caches: list[DynamicCache | None]
) -> tuple[torch.Tensor, int]:
    """Change `caches`.

    Returns:
        the next turn's text, which is longer than what they cover, and how much of it is old.
    """
    what = choose.choice(["keep", "keep", "exchange", "crop", "exchange and crop", "forget"])
    print(f"  {what}")
    if what == "forget":
        caches[:] = [None, None]
    if "exchange" in what:
        caches.reverse()
    slides = caches[0] is not None and any(layer.is_sliding for layer in caches[0].layers)
    if "crop" in what and not slides:  # what slid out of a window cannot come back
        removed = choose.randint(1, caches[0].get_seq_length())
        for cache in caches:
            cache.crop(-removed)
        history = history[:, : caches[0].get_seq_length()]
    covered = 0 if caches[0] is None else caches[0].get_seq_length()
    fewest = 1 if covered == history.shape[1] else 0
    new = draw_tokens(choose, choose.randint(fewest, 6))
    return torch.cat([history, new], dim=1), history.shape[1]


def _rejection(choose: random.Random) -> None:
    """Exact in distribution only: here, tokens that are allowed, and greedy search as it is."""
    family, attention = draw_family(choose)
    target = tiny_target(family, attention=attention)
    call = draw_call(choose, family)
    common = {**call.common, "return_dict_in_generate": True, "output_scores": True}
    ours = draw_drafting(choose, family, sampled=True)
    ours |= {"strategy": choose.choice(["single", "merged"]), "verification": "rejection"}
    call = Call(common, {**ours, "tree": draw_tree(choose, dynamic=False)}, call.seed)
    inputs = draw_tokens(choose, choose.randint(1, 20))
    print(f"{family}, {attention}, {inputs.tolist()}\n{call}")
    torch.manual_seed(call.seed or 0)
    try:
        plain = target.generate(inputs, **call.arguments(drafted=False)).sequences
    except Exception as error:
        print(f"  {type(error).__name__}: {error}")
        return
    output = target.generate(inputs, **call.arguments(drafted=True))
    answer = output.sequences[0, inputs.shape[1] :]
    assert 1 <= len(answer) <= common["max_new_tokens"]
    assert bool(((answer >= 0) & (answer < VOCAB)).all())
    chosen = torch.cat(output.scores).gather(1, answer[:, None])
    assert bool((chosen > -torch.inf).all()), "a token that the processors forbid"
    if call.seed is None:
        assert torch.equal(output.sequences, plain)


def _lengths(caches: list[DynamicCache | None]) -> list[int | None]:
    return [None if cache is None else cache.get_seq_length() for cache in caches]
