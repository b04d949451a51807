"""Compiled passes over trees: what uncompiled ones compute, and what they leave in the cache."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, GenerationConfig

import taps_hf
from taps_hf.cache import CACHE
from taps_hf.compiled.graphs import graphs_for, packed
from taps_hf.compiled.session import target_session
from taps_hf.compiled.settings import Compilation, compilation_for
from taps_hf.drafters.causal import CausalDrafter
from taps_hf.target import LAST
from tests.test_target import branching_tree
from tests.tiny import prompt, tiny_target

EAGER = CompileConfig(backend="eager", mode=None, fullgraph=True)


def session(
    target, inputs, layers=(LAST,), config: CompileConfig | None = EAGER, cache=None, **kwargs
):
    compilation = None if config is None else compilation_for(config, target, 60, 7, 1)
    cache = DynamicCache(config=target.config) if cache is None else cache
    arguments = {CACHE: cache, **kwargs}
    return target_session(target, inputs, GenerationConfig(), arguments, layers, compilation)


def passes(target, inputs, layers=(LAST,), config=EAGER, cache=None, **kwargs):
    """Logits and states of some passes, of which paths are kept; and what is in the cache then."""
    cache = DynamicCache(config=target.config) if cache is None else cache
    found = []
    with (
        torch.no_grad(),
        session(target, inputs, layers, config, cache, **kwargs) as ours,
    ):
        ours.prefill()
        for path in ([0, 2], [0, 1, 4, 5], [0], [0, 1, 3]):
            logits, states = ours.verify(branching_tree(3))
            found += [logits, *states.values()]
            ours.keep(path)
        logits, _ = ours.verify(taps_hf.DraftTree.root(torch.tensor([5]), 1))
        found.append(logits)
        ours.keep([0])
    return found, cache


def assert_alike(ours, theirs):
    for found, expected in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for found, expected in zip(ours[1].layers, theirs[1].layers, strict=True):
        assert type(found) is type(expected)
        torch.testing.assert_close(found.keys, expected.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.values, expected.values, atol=1e-4, rtol=1e-4)
        assert getattr(found, "cumulative_length", None) == getattr(
            expected, "cumulative_length", None
        )


@pytest.mark.parametrize(
    ("family", "layers"),
    [("llama", (LAST,)), ("llama", (0, LAST)), ("mistral", (LAST,)), ("gemma3_text", (1,))],
)
def test_passes_are_those_that_are_not_compiled(family: str, layers):
    target = tiny_target(family)
    for length in (1, 2, 9, 30):  # windows are 10 and 12
        inputs = prompt(length)
        assert_alike(passes(target, inputs, layers), passes(target, inputs, layers, config=None))


def test_eager_attention():
    target = tiny_target("mistral", attention="eager")
    assert_alike(passes(target, prompt(9)), passes(target, prompt(9), config=None))


def test_left_padding():
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[:, :4] = 0
    found = [
        passes(tiny_target(), prompt(9), config=config, attention_mask=mask)
        for config in (EAGER, None)
    ]
    assert_alike(*found)
    # The next text in the same memory has none.
    assert_alike(passes(tiny_target(), prompt(9)), passes(tiny_target(), prompt(9), config=None))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_cache_of_an_earlier_turn(family: str):
    target = tiny_target(family)
    found = []
    for config in (EAGER, None):
        _, cache = passes(target, prompt(9), config=config)
        text = prompt(9 + 11 + 6, seed=2)
        found.append(passes(target, text, config=config, cache=cache))
    assert_alike(*found)


def test_a_pass_that_fails_leaves_a_cache_to_go_on_with():
    target, cache = tiny_target(), DynamicCache(config=tiny_target().config)
    with torch.no_grad(), session(target, prompt(9), cache=cache) as ours:
        ours.prefill()
        ours.verify(branching_tree(3))
        ours.keep([0, 1])
        ours.verify(branching_tree(3))  # and nothing of it is kept
    assert cache.get_seq_length() == 8 + 2


def test_a_tree_that_is_larger_than_was_expected():
    """Memory grows with what is in it."""
    target = tiny_target()
    found = []
    for compilation in (Compilation(EAGER, 256, 8), None):
        cache = DynamicCache(config=target.config)
        with torch.no_grad():
            arguments = (prompt(240), GenerationConfig(), {CACHE: cache}, (LAST,))
            with target_session(target, *arguments, compilation) as ours:
                ours.prefill()
                logits = [ours.verify(taps_hf.DraftTree.star(torch.tensor([3]), 5))[0]]
                ours.keep([0, 4])
                logits.append(ours.verify(taps_hf.DraftTree.star(torch.tensor([7]), 15))[0])
                ours.keep([0, 1])
        found.append((logits, cache))
    assert_alike(*found)


def test_nothing_is_compiled_twice():
    """Neither for a longer text, nor for another memory, nor after other passes."""
    target = copy.deepcopy(tiny_target())
    passes(target, prompt(9))
    before = counters["stats"]["unique_graphs"]
    assert before
    with torch._dynamo.config.patch(error_on_recompile=True):
        passes(target, prompt(40))
        with torch.no_grad(), session(target, prompt(9)) as one, session(target, prompt(5)) as two:
            for ours in (one, two):
                ours.prefill()
                ours.verify(branching_tree(3))
            assert one._memory is not two._memory
    assert counters["stats"]["unique_graphs"] == before


def test_threads_have_memories_of_their_own():
    target = tiny_target()
    texts = [prompt(9, seed) for seed in range(4)]
    expected = [passes(target, text, config=None) for text in texts]
    found: dict[int, object] = {}
    barrier = threading.Barrier(len(texts))

    def answer(number: int) -> None:
        barrier.wait()
        found[number] = [passes(target, texts[number]) for _ in range(3)][-1]

    threads = [threading.Thread(target=answer, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, theirs in enumerate(expected):
        assert_alike(found[number], theirs)


def test_graphs_are_kept_until_the_target_changes():
    target = copy.deepcopy(tiny_target())
    first = graphs_for(target, (LAST,), EAGER)
    assert graphs_for(target, (LAST,), EAGER) is first
    assert graphs_for(target, (0, LAST), EAGER) is not first
    with torch.no_grad():
        target.lm_head.weight.mul_(2.0)  # read where it lies
    assert graphs_for(target, (LAST,), EAGER) is first
    assert_alike(passes(target, prompt(9)), passes(target, prompt(9), config=None))
    target.lm_head = copy.deepcopy(tiny_target().lm_head)
    assert graphs_for(target, (LAST,), EAGER) is not first
    assert_alike(passes(target, prompt(9)), passes(target, prompt(9), config=None))
    handle = target.model.register_forward_hook(lambda *_: None)
    changed = graphs_for(target, (LAST,), EAGER)
    handle.remove()
    assert graphs_for(target, (LAST,), EAGER) is not changed


def test_graphs_live_no_longer_than_their_target():
    target = copy.deepcopy(tiny_target())
    CausalDrafter.of(target)  # what it is as a drafter is kept on it
    passes(target, prompt(9))
    known = weakref.ref(target)
    del target
    gc.collect()
    assert known() is None


def test_what_a_pass_is_told():
    tree = branching_tree(3)
    inputs = packed(tree, 8, 21, 17)
    tokens, depths, ancestors, numbers = inputs.split([8, 8, 64, 2])
    assert tokens.tolist() == [3, 2, 7, 5, 3, 11, 0, 0]
    assert depths.tolist() == [0, 1, 1, 2, 2, 3, 0, 0]
    expected = torch.eye(8, dtype=torch.long)
    expected[:6, :6] = tree.ancestors()
    assert torch.equal(ancestors.view(8, 8), expected)
    assert numbers.tolist() == [21, 17]


def test_inference_mode():
    target = copy.deepcopy(tiny_target())
    expected = passes(target, prompt(9), config=None)
    with torch.inference_mode():
        inside = passes(target, prompt(9))
    assert_alike(inside, expected)
    assert_alike(passes(target, prompt(9)), expected)
