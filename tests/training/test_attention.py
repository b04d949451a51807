from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from taps_hf.training.attention import attending_along_chains, chain_attention
from taps_hf.training.steps import _visible, harmonised_steps

from ..tiny import tiny_target
from .objectives.test_eagle3 import drafter_for

HEADS, KEY_HEADS, SIZE = 6, 2, 8


def drawn(slots: int, step: int) -> list[torch.Tensor]:
    """Queries of a step, keys and values of all steps so far; values are of another size."""
    generator = torch.Generator().manual_seed(slots * step)
    shapes = [(HEADS, slots, SIZE), (KEY_HEADS, step * slots, SIZE), (KEY_HEADS, step * slots, 5)]
    return [torch.randn(2, *s, generator=generator).requires_grad_() for s in shapes]


def masked(query, key, value, step: int, scale: float | None) -> torch.Tensor:
    positions = torch.arange(query.shape[2])
    mask = _visible(positions - positions[:, None], step)
    every = [x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (key, value)]
    return F.scaled_dot_product_attention(query, *every, attn_mask=mask, scale=scale)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("slots", [1, 3, 11])
@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_it_is_masked_attention_and_so_are_its_gradients(step, slots, scale):
    """Also in texts with fewer slots than steps."""
    tensors = drawn(slots, step)
    expected = masked(*tensors, step, scale)
    found, weights = chain_attention(None, *tensors, scaling=scale)
    assert weights is None
    torch.testing.assert_close(found.transpose(1, 2), expected)
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(found, tensors, towards.transpose(1, 2))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, tensors, towards))


def test_attention_weights_are_dropped_and_the_same_ones_for_the_gradient():
    query, key, value = drawn(40, 3)
    value = torch.ones_like(value, requires_grad=True)
    torch.manual_seed(0)
    found = chain_attention(None, query, key, value, dropout=0.25)[0]
    assert found.mean().item() == pytest.approx(1.0, abs=0.1)
    assert found.std() > 0.1
    # It is linear in the values.
    found = found * torch.rand(found.shape, generator=torch.Generator().manual_seed(1))
    gradient = torch.autograd.grad(found.sum(), value)[0]
    torch.testing.assert_close((gradient * value).sum(), found.sum())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_steps_are_what_masks_make_of_them(family):
    """Of a whole drafter; `eager` is computed with masks."""
    target = tiny_target(family)
    drafter = drafter_for(target)
    assert drafter.trunk.config._attn_implementation == "sdpa"
    drafter.double()
    embeds, features = torch.randn(2, 2, 9, drafter.config.hidden_size, dtype=torch.float64)

    def of(implementation: str):
        drafter.trunk.config._attn_implementation = implementation
        drafter.zero_grad(set_to_none=True)
        steps = list(harmonised_steps(drafter, embeds, features, 5, cut=False))
        assert drafter.trunk.config._attn_implementation == implementation
        sum(x.square().mean() for x in steps).backward()
        return steps, {n: p.grad for n, p in drafter.named_parameters() if p.grad is not None}

    (fast, fast_gradients), (slow, slow_gradients) = of("sdpa"), of("eager")
    assert fast_gradients.keys() == slow_gradients.keys()
    pairs = [*zip(fast, slow), *((fast_gradients[n], slow_gradients[n]) for n in slow_gradients)]
    for found, expected in pairs:
        assert (found - expected).norm() < 1e-3 * expected.norm()


def test_an_error_leaves_the_trunk_as_it_was():
    trunk = drafter_for(tiny_target("llama")).trunk
    with pytest.raises(KeyError), attending_along_chains(trunk):
        raise KeyError
    assert trunk.config._attn_implementation == "sdpa"
