from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from taps_hf import EagleDrafter
from taps_hf.training import steps
from taps_hf.training.attention import (
    attending_along_chains,
    can_attend_along_chains,
    chain_attention,
)
from taps_hf.training.steps import _visible, harmonised_steps

from ..tiny import COMMON, FAMILIES, tiny_drafters

HEADS, KEY_HEADS, SIZE = 6, 2, 8


def drawn(slots: int, step: int, first: int = 0) -> list[torch.Tensor]:
    """Queries of a step, keys and values of all steps so far; values are of another size."""
    generator = torch.Generator().manual_seed(slots * step)
    keys = first + step * slots
    shapes = [(HEADS, slots, SIZE), (KEY_HEADS, keys, SIZE), (KEY_HEADS, keys, 5)]
    return [torch.randn(2, *s, generator=generator).requires_grad_() for s in shapes]


def attention(*tensors, first: int = 0, **kwargs) -> torch.Tensor:
    trunk = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
    with attending_along_chains(trunk, first):
        found, weights = chain_attention(None, *tensors, **kwargs)
    assert weights is None
    return found


def masked(query, key, value, step: int, first: int, scale: float | None) -> torch.Tensor:
    positions = torch.arange(first + query.shape[2])
    mask = _visible(positions - positions[:, None], step, first)
    every = [x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (key, value)]
    return F.scaled_dot_product_attention(query, *every, attn_mask=mask, scale=scale)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize(("slots", "first"), [(1, 0), (3, 0), (11, 0), (1, 7), (4, 9), (9, 4)])
@pytest.mark.parametrize("step", [2, 3, 7])
def test_it_is_masked_attention_and_so_are_its_gradients(step, slots, first, scale):
    """Also in texts with fewer slots than steps."""
    tensors = drawn(slots, step, first)
    expected = masked(*tensors, step, first, scale)
    found = attention(*tensors, first=first, scaling=scale)
    torch.testing.assert_close(found.transpose(1, 2), expected)
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(found, tensors, towards.transpose(1, 2))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, tensors, towards))


def test_attention_weights_are_dropped_and_the_same_ones_for_the_gradient():
    query, key, value = drawn(40, 3)
    value = torch.ones_like(value, requires_grad=True)
    torch.manual_seed(0)
    found = attention(query, key, value, dropout=0.25)
    assert found.mean().item() == pytest.approx(1.0, abs=0.1)
    assert found.std() > 0.1
    # It is linear in the values.
    found = found * torch.rand(found.shape, generator=torch.Generator().manual_seed(1))
    gradient = torch.autograd.grad(found.sum(), value)[0]
    torch.testing.assert_close((gradient * value).sum(), found.sum())


def small_drafter(family: str) -> EagleDrafter:
    """With a layer of its target's family, in float64."""
    small = {**COMMON, **FAMILIES.get(family, {}), "initializer_range": 0.1}
    config = AutoConfig.for_model(family, **small)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = AutoModelForCausalLM.from_config(config)
        return EagleDrafter.from_target(target).double()


# Early 5.x versions of the last two choose their attention when they are made.
@pytest.mark.parametrize("family", [*FAMILIES, "nemotron", "diffllama"])
@pytest.mark.parametrize(
    ("masks", "implementation", "first"),
    [(False, "sdpa", 0), (False, "sdpa", 4), (True, "sdpa", 4), (True, "eager", 4)],
)
def test_chains_are_those_that_masks_make_at_every_slot(
    family, masks, implementation, first, monkeypatch
):
    """Of a whole drafter, and its gradients."""
    drafter = small_drafter(family)
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, 11, drafter.config.hidden_size)
    embeds, features = torch.randn(shape, generator=generator, dtype=torch.float64)

    def of(start: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What chains from `first` on compute, and gradients."""
        every = harmonised_steps(drafter, embeds, features, 5, cut=False, first=start)
        chains = [hidden[:, first + j :] for j, hidden in enumerate(every)]
        trained = [p for n, p in drafter.named_parameters() if n.startswith("trunk")]
        return chains, torch.autograd.grad(sum(x.square().mean() for x in chains), trained)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "can_attend_along_chains", lambda *_: False)
        expected, expected_gradients = of(0)
    if masks:
        monkeypatch.setattr(steps, "can_attend_along_chains", lambda *_: False)
        drafter.trunk.config._attn_implementation = implementation
    found, gradients = of(first)
    assert drafter.trunk.config._attn_implementation == implementation
    for one, other in [*zip(found, expected), *zip(gradients, expected_gradients)]:
        assert one.shape == other.shape
        assert (one - other).norm() < 1e-4 * other.norm()  # norms compute in float32


def test_it_is_for_attention_of_one_kind_on_cpus():
    trunk = tiny_drafters()[0].trunk
    assert can_attend_along_chains(trunk, torch.device("cpu"))
    assert not can_attend_along_chains(trunk, torch.device("meta"))
    other = copy.copy(trunk)
    other.config = SimpleNamespace(_attn_implementation="eager")
    assert not can_attend_along_chains(other, torch.device("cpu"))


def test_an_error_leaves_the_trunk_as_it_was():
    trunk = tiny_drafters()[0].trunk
    with pytest.raises(KeyError), attending_along_chains(trunk):
        raise KeyError
    assert trunk.config._attn_implementation == "sdpa"


def test_another_attention_is_never_passed_over():
    trunk = tiny_drafters()[0].trunk
    unlike = pytest.raises(RuntimeError, match="LlamaModel does not attend as")
    with unlike, attending_along_chains(trunk):
        pass
    assert trunk.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="given a mask"):
        chain_attention(None, *drawn(3, 2), torch.ones(3, 6, dtype=torch.bool))
