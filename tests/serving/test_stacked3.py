"""Stacked EAGLE-3 drafters against those that they are made of, in each dialect."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from taps_hf import Eagle3Drafter
from taps_hf.formats.composed import compose
from taps_hf.formats.composition import Composition
from taps_hf.serving.heads import StackedHead
from taps_hf.serving.routing import best_tokens
from taps_hf.serving.stacked3 import StackedEagle3
from taps_hf.serving.stacks import WHOLE, LayerShape, Part, by_drafter

from ..tiny import DIALECTS, VOCAB, tiny_eagle3, tiny_target
from .test_stacked import LENGTH, attention, load

COUNT = 3


def stacked(of: Sequence[Eagle3Drafter], part: Part = WHOLE) -> tuple[StackedEagle3, StackedHead]:
    """As the plugin makes them of what the folder says."""
    config = compose({str(k): drafter for k, drafter in enumerate(of)}, tiny_target()).config
    composition = Composition.of(config["taps_hf"])
    shape = LayerShape(
        hidden=composition.hidden_size,
        middle=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head=config["head_dim"],
        eps=config["rms_norm_eps"],
        qkv_bias=composition.qkv_bias,
        qk_norm=composition.eagle3.qk_norm,
    )
    trunks = StackedEagle3(shape, composition.eagle3, part)
    sizes = composition.draft_vocab_sizes
    head = StackedHead(32, sizes or (VOCAB,) * len(of), sizes is not None, own=True)
    load(of, trunks, head)
    return trunks, head


def other_layers(*ids: list[int]) -> list[Eagle3Drafter]:
    """Drafters that read other layers than each other, in other orders, and score other tokens."""
    found = []
    with torch.random.fork_rng():
        for seed, layer_ids in enumerate(ids):
            torch.manual_seed(seed)
            tokens = torch.randperm(VOCAB)[: 10 + seed]
            drafter = Eagle3Drafter.from_target(
                tiny_target(), tokens, layer_ids=layer_ids, fc_norm=True
            )
            for norm in drafter.fc_norm:
                norm.weight.data.uniform_(0.5, 1.5)
            found.append(drafter.eval())
    return found


def inputs(layers: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(LENGTH, 32, generator=generator),
        torch.randn(LENGTH, 32 * layers, generator=generator),
    )


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("draft_vocab", [12, None])
@torch.no_grad()
def test_as_the_drafters_one_by_one(dialect, draft_vocab):
    of = tiny_eagle3(COUNT, dialect=dialect, draft_vocab=draft_vocab)
    assert_alike(of, [slice(None)] * COUNT, layers=2)


@torch.no_grad()
def test_drafters_of_other_layers():
    """Of three that are given, each drafter has its own two, in its own order."""
    ids = [2, 1], [1, 2], [2, 2]
    of = other_layers(*ids)
    columns = [torch.cat([torch.arange(32) + 32 * (i - 1) for i in each]) for each in ids]
    assert_alike(of, columns, layers=2)


def assert_alike(of: Sequence[Eagle3Drafter], columns: list, layers: int) -> None:
    """Two steps: from the target's features, and from what was fed back."""
    trunks, head = stacked(of)
    embeds, features = inputs(layers)
    combined = trunks.combine(features)
    scored, fed = trunks(embeds, combined, attention(of[0]), lambda x: x)
    again, _ = trunks(embeds, fed, attention(of[0]), lambda x: x)
    steps = [by_drafter(found, len(of)) for found in (scored, again)]
    tokens = best_tokens(head(steps[-1]), head.token_ids).tokens
    for k, drafter in enumerate(of):
        mine = slice(32 * k, 32 * (k + 1))
        states = drafter.fuse(features[:, columns[k]])
        torch.testing.assert_close(combined[:, mine], states, rtol=1e-4, atol=1e-4)
        for each in steps:
            states = drafter(embeds[None], states[None]).last_hidden_state[0]
            expected = drafter.scores(states)
            scores, rest = head(each)[k].split(
                [head.sizes[k], max(head.sizes) - head.sizes[k]], dim=-1
            )
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
            assert bool((rest == -torch.inf).all())
        best, ids = expected.argmax(dim=-1), drafter.draft_token_ids
        assert torch.equal(tokens[k], best if ids is None else ids[best])


@pytest.mark.parametrize("dialect", ["original", "qwen3"])
@torch.no_grad()
def test_a_half_has_half_of_the_heads(dialect):
    """What attention reads of a process' own heads is what the whole reads of these."""
    of = tiny_eagle3(COUNT, dialect=dialect)
    embeds, features = inputs(2)
    seen: list[list[torch.Tensor]] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append([q, k, v])
        return q

    for part in (WHOLE, Part(0, 2), Part(1, 2)):
        trunks, _ = stacked(of, part)
        trunks(embeds, trunks.combine(features), attend, lambda x: x)
    for whole, first, second in zip(*seen):
        torch.testing.assert_close(torch.cat([first, second], dim=-1), whole)
