"""Stacked trunks against the drafters that they are made of, whole and in parts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from taps_hf import EagleDrafter
from taps_hf.drafters.modeling_feature import FeatureDrafter
from taps_hf.serving.stacked import StackedTrunks
from taps_hf.serving.stacks import (
    WHOLE,
    HasPlaces,
    LayerShape,
    Loading,
    Part,
    StackedLinear,
    alone,
)

from ..tiny import tiny_target

LENGTH = 5


def drafters(family: str, **settings: object) -> list[EagleDrafter]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = [EagleDrafter.from_target(tiny_target(family), **settings) for _ in range(3)]
        for drafter in found:  # what a new drafter has of zeros and ones must not hide an error
            for parameter in drafter.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
    return found


def stacked(of: list[EagleDrafter], part: Part = WHOLE) -> StackedTrunks:
    layer, config = of[0].trunk.config, of[0].config
    shape = LayerShape(
        hidden=config.hidden_size,
        middle=layer.intermediate_size,
        heads=layer.num_attention_heads,
        kv_heads=layer.num_key_value_heads,
        head=8,
        eps=layer.rms_norm_eps,
        qkv_bias="trunk.layers.0.self_attn.q_proj.bias" in of[0].state_dict(),
    )
    biases = [drafter.config.fc_bias for drafter in of]
    trunks = StackedTrunks(shape, biases, config.input_norm, part)
    load(of, trunks)
    return trunks


def load(of: Sequence[FeatureDrafter], *modules: HasPlaces) -> None:
    loading = Loading(len(of), *modules)
    for k, drafter in enumerate(of):
        for name, tensor in drafter.state_dict().items():
            loading.take(k, name.removeprefix("trunk."), tensor)
    loading.check()


def attention(drafter: EagleDrafter):
    """Causal, over the tokens that are given, with the drafter's own rotary positions."""
    size = 8

    def turned(x: torch.Tensor) -> torch.Tensor:
        cos, sin = drafter.trunk.rotary_emb(x, torch.arange(LENGTH)[None])
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.view(*x.shape[:2], -1, size).transpose(1, 2) for x in (q, k, v))
        found = F.scaled_dot_product_attention(
            turned(q), turned(k), v, is_causal=True, enable_gqa=True
        )
        return found.transpose(1, 2).flatten(2)

    return attend


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(LENGTH, 32, generator=generator), torch.randn(
        LENGTH, 96, generator=generator
    )


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"fc_bias": True, "input_norm": True}),
        ("qwen2", {"fc_bias": True}),
    ],
)
@torch.no_grad()
def test_as_the_drafters_one_by_one(family, settings):
    of = drafters(family, **settings)
    embeds, features = inputs()
    together, fed = stacked(of)(embeds, features, attention(of[0]), lambda x: x)
    assert fed is together
    for k, drafter in enumerate(of):
        own = features[:, 32 * k : 32 * (k + 1)]
        alone = drafter(embeds[None], own[None]).last_hidden_state[0]
        torch.testing.assert_close(together[:, 32 * k : 32 * (k + 1)], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_by_one_and_alone():
    """Products one after the other are the same, and so is one drafter without the others."""
    of = drafters("qwen2", fc_bias=True, input_norm=True)
    embeds, features = inputs()
    trunks = stacked(of)
    expected, _ = trunks(embeds, features, attention(of[0]), lambda x: x)
    for apart in (False, True):
        if apart:
            for module in trunks.modules():
                if isinstance(module, StackedLinear):
                    module.separate(lambda weight: partial(F.linear, weight=weight.clone()))
            found, _ = trunks(embeds, features, attention(of[0]), lambda x: x)
            torch.testing.assert_close(found, expected)
        for k in range(len(of)):
            own = slice(32 * k, 32 * (k + 1))
            one, _ = alone(trunks, k)(embeds, features[:, own], attention(of[0]), lambda x: x)
            torch.testing.assert_close(one, expected[:, own])


@pytest.mark.parametrize("size", [2, 4])
@torch.no_grad()
def test_parts_sum_to_the_whole(size):
    """By processes in turn: each is given the sums of all that came before in the layer.

    Four processes share two heads of keys and values.
    """
    of = drafters("qwen2", fc_bias=True)
    embeds, features = inputs()
    whole, _ = stacked(of)(embeds, features, attention(of[0]), lambda x: x)
    parts = [stacked(of, Part(rank, size)) for rank in range(size)]
    sums: list[torch.Tensor] = []
    for stage in range(2):  # first what attention gives, then what the MLP does
        seen: list[torch.Tensor] = []
        for part in parts:
            calls = iter(range(2))

            def summed(x: torch.Tensor, calls=calls, seen=seen, stage=stage) -> torch.Tensor:
                call = next(calls)
                if call == stage:
                    seen.append(x)
                return sums[call] if call < len(sums) else x

            part(embeds, features, attention(of[0]), summed)
        sums.append(torch.stack(seen).sum(dim=0))
    done = iter(sums)
    together, _ = parts[-1](embeds, features, attention(of[0]), lambda _: next(done))
    torch.testing.assert_close(together, whole, rtol=1e-4, atol=1e-4)


def test_features_are_the_same_for_all():
    features = torch.randn(LENGTH, 32)
    combined = stacked(drafters("llama")).combine(features)
    assert torch.equal(combined, torch.cat([features] * 3, dim=1))


def test_what_is_missing_or_wrong_is_said():
    of = drafters("llama", fc_bias=True)
    trunks = stacked(of)
    loading = Loading(3, trunks)
    with pytest.raises(ValueError, match=r"drafters\.3\.fc\.weight is no tensor of these"):
        loading.take(3, "fc.weight", of[0].fc.weight)
    with pytest.raises(ValueError, match=r"drafters\.0\.lm_head\.weight is no tensor of these"):
        loading.take(0, "lm_head.weight", of[0].fc.weight)
    with pytest.raises(ValueError, match=r"fc\.weight has the shape \(32, 32\), expected \(32, 6"):
        loading.take(0, "fc.weight", of[0].fc.weight[:, :32])
    shape = trunks.layer.shape
    with pytest.raises(ValueError, match=r"lacks drafters\.0\.fc\.bias, drafters\.0\.fc\.weight"):
        Loading(1, StackedTrunks(shape, [True], False)).check()
    with pytest.raises(ValueError, match=r"lacks drafters\.0\.fc\.weight, drafters\.0\.layers"):
        Loading(1, StackedTrunks(shape, [False], False)).check()
    with pytest.raises(ValueError, match="`tensor_parallel_size` is 3, which does not divide"):
        StackedTrunks(shape, [True], False, Part(0, 3))
