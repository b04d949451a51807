"""On a GPU: parity, sessions that go on, drafters elsewhere, training. Skipped without one."""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch

import taps_hf
from taps_hf import EagleDrafter
from taps_hf.cache import CACHE
from taps_hf.training.objectives import FrozenTarget, get_objective
from tests.test_parity import STRATEGIES, TREES
from tests.tiny import FAMILIES, prompt, tiny_drafters, tiny_target

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
TREE = TREES[0]


@functools.cache
def moved(family: str = "llama") -> tuple[torch.nn.Module, tuple[EagleDrafter, ...]]:
    """A tiny target and its drafters on the GPU. Cached: do not change them."""
    drafters = tuple(copy.deepcopy(drafter).cuda() for drafter in tiny_drafters(2, family))
    return copy.deepcopy(tiny_target(family)).cuda(), drafters


def answers(target, inputs, seed: int | None, **ours):
    """What plain and speculative `generate` say."""
    found = []
    for extra in ({}, ours):
        torch.manual_seed(0 if seed is None else seed)
        found.append(
            target.generate(inputs, max_new_tokens=24, do_sample=seed is not None, top_k=0, **extra)
        )
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_strategies(family: str, strategy, seed: int | None):
    target, drafters = moved(family)
    inputs = prompt().cuda()
    plain, ours = answers(
        target, inputs, seed, assistant_models=list(drafters), strategy=strategy, tree=TREE
    )
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_trees(tree):
    target, drafters = moved()
    plain, ours = answers(
        target, prompt().cuda(), None, assistant_models=list(drafters), strategy="merged", tree=tree
    )
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_runs(dtype: torch.dtype):
    """Nearly tied tokens fall either way, so only that it runs, and accepts something."""
    target = copy.deepcopy(tiny_target()).cuda().to(dtype)
    drafters = [copy.deepcopy(drafter).cuda().to(dtype) for drafter in tiny_drafters(2)]
    out = target.generate(
        prompt().cuda(),
        max_new_tokens=24,
        do_sample=True,
        assistant_models=drafters,
        strategy="merged",
        tree=TREE,
        return_dict_in_generate=True,
    )
    assert out.sequences.shape == (1, 33)
    assert out.draft_trace.accepted_length > 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("strategy", ["merged", "auto"])
def test_compiled_cycles(family: str, strategy: str):
    """With CUDA graphs: the next pass overwrites what one returned."""
    target, drafters = moved(family)
    ours = {"assistant_models": list(drafters), "strategy": strategy, "tree": TREE}
    for seed in (None, 0, 1):
        plain, found = answers(target, prompt().cuda(), seed, **ours, compile=True)
        assert torch.equal(plain, found)


def test_compiled_cycles_in_another_thread():
    """As streaming has them: torch keeps CUDA graphs by thread."""
    target, drafters = moved()
    expected = target.generate(prompt().cuda(), max_new_tokens=24, do_sample=False)
    found = []

    def answer() -> None:
        for _ in range(2):
            out = target.generate(
                prompt().cuda(),
                max_new_tokens=24,
                do_sample=False,
                assistant_models=list(drafters),
                strategy="merged",
                tree=TREE,
                compile=True,
            )
            found.append(out)

    answer()
    thread = threading.Thread(target=answer)
    thread.start()
    thread.join()
    assert len(found) == 4
    assert all(torch.equal(out, expected) for out in found)


def test_drafters_on_the_cpu_serve_a_target_on_the_gpu():
    target, _ = moved()
    drafters = list(tiny_drafters(2))
    plain, ours = answers(
        target, prompt().cuda(), None, assistant_models=drafters, strategy="merged", tree=TREE
    )
    assert torch.equal(plain, ours)


def test_a_conversation_goes_on():
    target, drafters = moved()
    ours = {"assistant_models": list(drafters), "strategy": "merged", "tree": TREE}
    first = target.generate(
        prompt().cuda(), max_new_tokens=12, do_sample=False, return_dict_in_generate=True, **ours
    )
    inputs = torch.cat([first.sequences, prompt(5, seed=1).cuda()], dim=1)
    plain = target.generate(inputs, max_new_tokens=12, do_sample=False)
    ours[CACHE] = first.past_key_values
    again = target.generate(inputs, max_new_tokens=12, do_sample=False, **ours)
    assert torch.equal(plain, again)


@pytest.mark.parametrize("name", ["eagle", "hass"])
def test_losses_are_those_of_the_cpu(name: str):
    losses = []
    for device in ("cpu", "cuda"):
        target = copy.deepcopy(tiny_target()).to(device)
        drafter = copy.deepcopy(tiny_drafters(1)[0]).to(device).train()
        kind = get_objective(name)
        objective = kind(drafter, FrozenTarget(target, drafter), kind.options_with(noise=0.0))
        ids = torch.cat([prompt(12, seed=i) for i in range(3)]).to(device)
        labels = ids.clone()
        labels[:, :4] = -100
        loss = objective(ids, labels)["loss"]
        loss.backward()
        gradient = drafter.fc.weight.grad
        losses.append((loss.item(), gradient.norm().item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_rejection_sampling_runs():
    target, drafters = moved()
    out = target.generate(
        prompt().cuda(),
        max_new_tokens=24,
        do_sample=True,
        top_k=0,
        assistant_models=[drafters[0]],
        tree=taps_hf.FixedTree.from_branching([4, 3, 1]),
        verification="rejection",
        return_dict_in_generate=True,
    )
    assert out.draft_trace.accepted_length > 0
