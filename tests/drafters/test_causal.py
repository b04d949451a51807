from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import taps_hf
from taps_hf import CausalDrafter, ChainTree, DraftRequest, DynamicTree, FixedTree, Merged

from ..tiny import VOCAB, prompt, refused, tiny_drafters, tiny_target

FAMILIES = ("llama", "qwen2", "gpt2")


@functools.cache
def assistant(family: str = "llama", vocab_size: int = VOCAB, seed: int = 5) -> PreTrainedModel:
    """A random model of one layer. Cached: do not change it."""
    sizes = {"num_attention_heads": 2, "initializer_range": 0.4, "vocab_size": vocab_size}
    sizes |= {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
    if family == "gpt2":
        sizes |= {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256}
    else:
        sizes |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 256}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()


def session(model: PreTrainedModel, text: torch.Tensor):
    started = CausalDrafter.start([CausalDrafter.of(model)], tiny_target())
    started.observe(text, {})
    return started


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [DynamicTree(4, 3, 12), FixedTree.from_branching([3, 2, 1])])
def test_a_tree_holds_what_the_model_says_along_each_path(family, shape):
    """Against the model run anew over the text and each path."""
    model, text = assistant(family), prompt(11)[0]
    started = session(model, text[:8])
    for part in (text[8:9], text[9:]):  # with a cache, as cycles go on
        started.propose([0], DraftRequest(started._pending[-1][-1:], shape, 9))
        started.observe(part, {})
    tree = started.propose([0], DraftRequest(text[-1:], shape, 9))[0]
    assert len(tree) > 7
    ancestors = tree.ancestors()
    for node in range(len(tree)):
        path = tree.tokens[ancestors[node]][1:]
        logits = model(torch.cat([text, path])[None]).logits[0, -1]
        children = (tree.parents == node).nonzero().flatten()
        expected = logits.float().softmax(0)[tree.tokens[children]]
        torch.testing.assert_close(tree.confidence[0, children], expected, atol=1e-4, rtol=1e-3)
        if node == 0:
            likeliest = logits.topk(len(children)).indices
            assert set(tree.tokens[children].tolist()) <= set(likeliest.tolist())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["single", "auto"])
def test_the_text_is_plain_generates(family, strategy):
    target = tiny_target()
    for sample in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8}):
        found = []
        for drafters in ({}, {"assistant_models": assistant(family), "strategy": strategy}):
            torch.manual_seed(1)
            found.append(target.generate(prompt(9), max_new_tokens=50, **sample, **drafters))
        assert torch.equal(*found)


def test_the_targets_own_weights_are_nearly_always_right():
    twin = copy.deepcopy(tiny_target())
    out = tiny_target().generate(
        prompt(9),
        max_new_tokens=61,
        do_sample=False,
        assistant_models=twin,
        tree=ChainTree(5),
        return_dict_in_generate=True,
    )
    assert out.draft_trace.tau > 5.5


def test_it_is_composed_with_other_kinds():
    drafters = {"eagle": tiny_drafters(1)[0], "model": assistant(), "other": assistant(seed=6)}
    out = tiny_target().generate(
        prompt(9),
        max_new_tokens=50,
        do_sample=False,
        assistant_models=drafters,
        strategy=Merged(num_nodes=12),
        lookup=True,
        return_dict_in_generate=True,
    )
    assert out.draft_trace.drafters == ("eagle", "model", "other", "lookup")
    assert {0, 1, 2} <= {i for token in out.draft_trace.emitted for i in token.drafters}
    assert torch.equal(out.sequences, tiny_target().generate(prompt(9), max_new_tokens=50))


def test_sampled_proposals_come_with_their_distributions():
    out = tiny_target().generate(
        prompt(9),
        max_new_tokens=20,
        do_sample=True,
        assistant_models=assistant(vocab_size=VOCAB - 1),
        tree=FixedTree([(0,), (1,), (0, 0)]),
        verification="rejection",
        return_dict_in_generate=True,
    )
    assert out.sequences.shape[1] == 29
    assert any(cycle.path for cycle in out.draft_trace.cycles)


@pytest.mark.parametrize("size", [VOCAB - 1, VOCAB + 1])
def test_vocabularies_may_differ_in_padding(size):
    settings = {"max_new_tokens": 40, "do_sample": False}
    found = tiny_target().generate(prompt(9), assistant_models=assistant("qwen2", size), **settings)
    assert torch.equal(found, tiny_target().generate(prompt(9), **settings))


def test_taking_back_is_not_having_heard():
    model, text = assistant(), prompt(20)[0]
    shape = DynamicTree(3, 3, 8)
    taken = session(model, text[:12])
    taken.propose([0], DraftRequest(text[11:12], shape, 9))
    taken.observe(text[3:9], {})
    assert taken.forget(8)  # two of those that were read, too
    taken.observe(text[10:], {})
    found = taken.propose([0], DraftRequest(text[-1:], shape, 9))[0]
    expected = session(model, text).propose([0], DraftRequest(text[-1:], shape, 9))[0]
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.confidence, expected.confidence)
    assert not session(model, text).forget(20)


def test_positions_end():
    """Without a position for its next token it proposes nothing."""
    model = copy.deepcopy(assistant())
    model.config.max_position_embeddings = 20
    settings = {"max_new_tokens": 40, "do_sample": False}
    found = tiny_target().generate(
        prompt(9), assistant_models=model, return_dict_in_generate=True, **settings
    )
    assert torch.equal(found.sequences, tiny_target().generate(prompt(9), **settings))
    assert not any(cycle.drafters for cycle in found.draft_trace.cycles[-5:])


def test_one_model_is_one_drafter():
    model = assistant()
    assert CausalDrafter.of(model) is CausalDrafter.of(model)
    other = copy.deepcopy(model)
    assert CausalDrafter.of(other) is not CausalDrafter.of(model)
    assert CausalDrafter.of(other).model is other
    assert CausalDrafter.of(other).digest() == CausalDrafter.of(model).digest()
    assert CausalDrafter.of(assistant(seed=6)).digest() != CausalDrafter.of(model).digest()
    assert not CausalDrafter.start([CausalDrafter.of(other)], model).observe(prompt()[0], {})


def test_models_that_cannot_draft_are_refused():
    refused("has no LM head", assistant_models=tiny_target().base_model)
    refused("do not attend to everything", assistant_models=tiny_target("mistral"))
    refused("do not attend to everything", assistant_models=tiny_target("gemma3_text"))
    refused("knows 40 tokens and the target 16", assistant_models=assistant(vocab_size=40))
    refused("is the target itself", assistant_models={"small": tiny_target()})
    with pytest.raises(ValueError, match="LlamaModel"):
        taps_hf.SpeculativeDecoding([tiny_target().base_model])


def test_a_model_in_training_mode_is_refused():
    """Dropout would draw random numbers of which plain generate draws other ones."""
    model = copy.deepcopy(assistant("gpt2"))
    refused("is in training mode; call its eval", assistant_models=[model.train()])
    model.eval()
    tiny_target().generate(prompt(), max_new_tokens=4, assistant_models=[model])
    refused("is in training mode; call its eval", assistant_models=[model.train()])
