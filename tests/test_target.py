"""The target's side: what a pass over a tree computes is what plain passes compute."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import taps_hf
from taps_hf.cache import CACHE
from taps_hf.target import LAST, TargetSession, check_layers
from tests.tiny import FAMILIES, prompt, tiny_target


def session(family: str, inputs: torch.Tensor, layers=(LAST,), **kwargs) -> TargetSession:
    target = tiny_target(family)
    return TargetSession(
        target,
        inputs,
        GenerationConfig(),
        {CACHE: DynamicCache(config=target.config), **kwargs},
        layers,
    )


def branching_tree(root: int) -> taps_hf.DraftTree:
    """Two branches and a fork: 0 - (1 - (3, 4 - 5), 2)."""
    parents = torch.tensor([-1, 0, 0, 1, 1, 4])
    tokens = torch.tensor([root, 2, 7, 5, 3, 11])
    ones = torch.ones(1, 6)
    return taps_hf.DraftTree(tokens, parents, torch.tensor([0, 1, 1, 2, 2, 3]), ones, ones)


def path_to(tree: taps_hf.DraftTree, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.insert(0, node)
        node = int(tree.parents[node])
    return path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 2, 9, 30])  # shorter and longer than the windows
def test_a_pass_over_a_tree_is_a_pass_over_each_path(family: str, length: int):
    target, inputs = tiny_target(family), prompt(length)
    with torch.no_grad():
        ours = session(family, inputs)
        tokens, prompt_states = ours.prefill()
        tree = branching_tree(int(inputs[0, -1]))
        logits, states = ours.verify(tree)
        assert torch.equal(tokens, inputs[0])
        for node in range(len(tree)):
            path = torch.cat([inputs[0], tree.tokens[path_to(tree, node)[1:]]])[None]
            plain = target(input_ids=path)
            hidden = target.base_model(input_ids=path).last_hidden_state[0]
            torch.testing.assert_close(logits[node], plain.logits[0, -1], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(states[LAST][node], hidden[-1], atol=1e-4, rtol=1e-4)
            if length > 1:
                torch.testing.assert_close(
                    prompt_states[LAST], hidden[: length - 1], atol=1e-4, rtol=1e-4
                )


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_what_the_head_reads(family: str):
    with torch.no_grad():
        ours = session(family, prompt())
        ours.prefill()
        logits, states = ours.verify(branching_tree(int(prompt()[0, -1])))
        assert torch.equal(tiny_target(family).get_output_embeddings()(states[LAST]), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_path_is_as_if_it_had_been_the_prompt(family: str):
    inputs = prompt(14)
    with torch.no_grad():
        ours = session(family, inputs)
        ours.prefill()
        tree = branching_tree(int(inputs[0, -1]))
        ours.verify(tree)
        ours.keep([0, 1, 4])
        longer = torch.cat([inputs[0], tree.tokens[[1, 4]], torch.tensor([6])])[None]
        after = branching_tree(6)
        found, _ = ours.verify(after)
        fresh = session(family, longer)
        fresh.prefill()
        expected, _ = fresh.verify(after)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_nothing_is_left_on_the_target():
    target = tiny_target()
    modules = dict(target._modules)
    before = sorted(vars(target))
    hooks = [len(module._forward_hooks) for module in target.modules()]
    with torch.no_grad():
        ours = session("llama", prompt(), (0, LAST))
        ours.prefill()
        ours.verify(branching_tree(0))
    assert sorted(vars(target)) == before
    assert [len(module._forward_hooks) for module in target.modules()] == hooks
    assert all(target._modules[name] is module for name, module in modules.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_inner_layers_are_those_that_transformers_gives(family: str):
    target, inputs = tiny_target(family), prompt(12)
    layers = (0, 1, LAST)
    with torch.no_grad():
        ours = session(family, inputs, layers)
        _, states = ours.prefill()
        tree = branching_tree(int(inputs[0, -1]))
        _, of_tree = ours.verify(tree)
        path = torch.cat([inputs[0], tree.tokens[path_to(tree, 5)[1:]]])[None]
        plain = target(path, output_hidden_states=True).hidden_states
    assert states.keys() == of_tree.keys() == set(layers)
    last_layer = target.config.num_hidden_layers - 1
    for layer in layers:
        if layer == last_layer:  # transformers gives it after the norm only
            continue
        expected = plain[-1 if layer == LAST else layer + 1][0]
        found = torch.cat([states[layer], of_tree[layer][path_to(tree, 5)]])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_layers_that_are_not_there():
    target = tiny_target()
    check_layers(target, (0, 1, LAST))
    with pytest.raises(ValueError, match=r"layers \[2, 7\], expected 0 to 1"):
        check_layers(target, (0, 2, 7))
