"""Bad input ends with a ValueError that names it, before any pass of the target."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    MptConfig,
    MptForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    StaticCache,
)

import taps_hf
from taps_hf import validation
from taps_hf.cache import CACHE
from tests import tiny
from tests.tiny import VOCAB, prompt, refused, tiny_drafters, tiny_target

CHAIN = taps_hf.ChainTree(2)


def test_assistant_models():
    refused("`assistant_models` is empty", assistant_models=[], lookup=False)
    refused("is the target itself", assistant_models=[tiny_target()])
    refused("LlamaModel has no LM head", assistant_models=[tiny_target().base_model])
    refused("`assistant_models` is .*int", assistant_models=3)
    refused("`assistant_models` has an empty name", assistant_models=["", *tiny_drafters(1)])
    with pytest.raises(ValueError, match=r"`assistant_models` is .*str"):
        taps_hf.SpeculativeDecoding("some/name")  # knows no target to load it for
    refused("`assistant_models` is None, but strategy", assistant_models=None, strategy="merged")


def test_strategies():
    refused("`strategy` is 'magic', expected one of .*merged", strategy="magic")
    refused("`strategy` is 3", strategy=3)
    refused(r"Single\(index=5\) was given 2 drafters", strategy=taps_hf.Single(5))


def test_trees_and_verification():
    refused("`tree` is 24, expected a tree shape", tree=24)
    refused("`verification` is 'hope', expected one of rejection, walk", verification="hope")
    refused("shaped by their confidence", verification="rejection")
    for strategy in ("confidence", "entropy", taps_hf.Merged(num_nodes=5)):
        refused("choosing among them", strategy=strategy, tree=CHAIN, verification="rejection")

    refused(r"`verification` is \['walk'\]", verification=["walk"])
    narrow = tiny_drafters(1, draft_vocab=3)
    refused(
        "asks for 4 children .* scores only 3",
        tree=taps_hf.FixedTree.from_branching([4]),
        assistant_models=narrow,
    )
    for wrong in ([0, 1], None):
        with pytest.raises(ValueError, match="expected paths of ranks"):
            taps_hf.FixedTree(wrong)
    with pytest.raises(ValueError, match="`branching` is 3"):
        taps_hf.FixedTree.from_branching(3)
    with pytest.raises(ValueError, match="`num_nodes` is 'concatenate'"):
        taps_hf.Merged("concatenate")


@pytest.mark.parametrize(
    ("rope", "fits", "refused_"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, (9, 40), (30, 5)),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 24,
                "factor": 10.0,
            },
            (9, 15),
            (9, 25),
        ),
    ],
    ids=["dynamic", "longrope"],
)
def test_rotary_frequencies_that_follow_the_length(rope, fits, refused_):
    config = copy.deepcopy(tiny_target().config)
    config.max_position_embeddings = 30
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    # Dynamic frequencies are kept on the model: a new one for each call.
    targets = []
    for _ in range(2):
        torch.manual_seed(0)
        targets.append(AutoModelForCausalLM.from_config(config).eval())
    length, new = fits
    plain = targets[0].generate(prompt(length), max_new_tokens=new, do_sample=False)
    ours = targets[1].generate(
        prompt(length), max_new_tokens=new, do_sample=False, assistant_models=tiny_drafters(2)
    )
    assert torch.equal(plain, ours)
    length, new = refused_
    with pytest.raises(ValueError, match="positions are scaled"):
        targets[1].generate(prompt(length), max_new_tokens=new, assistant_models=tiny_drafters(2))


def test_a_drafter_in_training_mode_with_dropout():
    drafter = copy.deepcopy(tiny_drafters(1)[0]).train()
    drafter.trunk.config.attention_dropout = 0.1
    refused(r"training mode with dropout; call its eval\(\)", assistant_models=[drafter])


def test_arguments_that_exclude_each_other():
    refused("`token_healing` is True", token_healing=True)
    refused("`assistant_model` was given together", assistant_model=tiny_target())
    refused("`custom_generate` was given together", custom_generate=lambda *_: None)
    refused("`synced_gpus` is True", synced_gpus=True)
    refused('`cache_implementation` is "paged"', cache_implementation="paged")


def test_generation_modes():
    refused("'beam_search'", num_beams=2)
    refused("`num_return_sequences` is 2", num_return_sequences=2, do_sample=True)
    refused("'assisted_generation'", prompt_lookup_num_tokens=3)
    refused("The batch has 2 sequences", inputs=prompt().repeat(2, 1))
    refused("`use_cache` is False", use_cache=False)
    refused("`output_attentions` is True", output_attentions=True, return_dict_in_generate=True)
    refused("`output_hidden_states`", output_hidden_states=True, return_dict_in_generate=True)


def test_caches():
    refused("StaticCache", cache_implementation="static")
    refused("StaticCache", **{CACHE: StaticCache(config=tiny_target().config, max_cache_len=64)})
    refused("offloaded", cache_implementation="offloaded")


def test_a_cache_that_covers_the_whole_prompt():
    first = tiny_target().generate(prompt(), max_new_tokens=4, return_dict_in_generate=True)
    cache = first.past_key_values
    refused(
        "nothing is left to run",
        inputs=first.sequences[:, : cache.get_seq_length()],
        **{CACHE: cache},
    )


def test_embeddings_as_a_prompt():
    target = tiny_target()
    embeds = target.get_input_embeddings()(prompt())
    with pytest.raises(ValueError, match="`inputs_embeds`, expected `input_ids`"):
        target.generate(inputs_embeds=embeds, max_new_tokens=3, assistant_models=tiny_drafters(2))


def test_targets_that_take_no_tree():
    flash = copy.deepcopy(tiny_target())
    flash.config._attn_implementation = "flash_attention_2"
    refused("flash_attention_2.*takes no tree mask", target=flash)
    chunked = copy.deepcopy(tiny_target("qwen3"))
    chunked.config.layer_types = ["linear_attention", "full_attention"]
    refused("linear_attention", target=chunked, assistant_models=tiny_drafters(2, "qwen3"))
    both_ways = copy.deepcopy(tiny_target("gemma3_text"))
    both_ways.config.use_bidirectional_attention = True
    refused("both ways", target=both_ways, assistant_models=tiny_drafters(2, "gemma3_text"))


@pytest.mark.parametrize("family", ["llama", "granite", "olmo2", "glm4"])
def test_a_window_that_only_the_config_knows(family: str):
    config = AutoConfig.for_model(family, **{**tiny.COMMON, "sliding_window": 16})
    torch.manual_seed(2)  # with 1, glm4 has two tokens at one place that differ by rounding only
    target = AutoModelForCausalLM.from_config(config).eval()
    drafters = [taps_hf.EagleDrafter.from_target(target).eval()]
    common = {"do_sample": False, "eos_token_id": None}
    ours = {"assistant_models": drafters, "strategy": "merged"}
    ours["tree"] = taps_hf.DynamicTree(depth=4, top_k=6, num_nodes=30)
    for length, new, cache in ((9, 7, None), (9, 30, DynamicCache), (30, 20, DynamicCache)):
        plain, found = (
            target.generate(
                prompt(length),
                max_new_tokens=new,
                **common,
                **extra,
                **({} if cache is None else {CACHE: cache()}),
            )
            for extra in ({}, ours)
        )
        assert torch.equal(plain, found)
    refused("has no sliding windows, but its cache forgets all but 16", target, prompt(30), **ours)


def test_inputs_prepared_by_the_object():
    target = copy.deepcopy(tiny_target())
    own = target.prepare_inputs_for_generation
    target.prepare_inputs_for_generation = lambda *args, **kwargs: own(*args, **kwargs)
    refused("`prepare_inputs_for_generation` of its own .*lambda.* bypass", target=target)
    target.prepare_inputs_for_generation = own  # as peft leaves it
    target.generate(prompt(), max_new_tokens=3, assistant_models=tiny_drafters(1))


def test_targets_of_another_kind():
    config = AutoConfig.for_model(
        "t5",
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    encoder_decoder = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match="encoder-decoder"):
        encoder_decoder.generate(prompt(), assistant_models=tiny_drafters(1))
    mpt = MptForCausalLM(MptConfig(vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=1))
    refused("names no `position_ids`", target=mpt, assistant_models=tiny_drafters(1))
    gpt = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4))
    refused(f"names no `{CACHE}`", target=gpt, assistant_models=[])


@pytest.mark.parametrize("family", ["bert", "big_bird", "megatron-bert"])
def test_encoders_that_were_not_told_to_be_decoders(family: str):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "vocab_size": VOCAB, "pad_token_id": 0}
    encoder = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    refused("attends both ways", target=encoder, assistant_models=[])
    config = AutoConfig.for_model(family, **sizes, is_decoder=True)
    taps_hf.SpeculativeDecoding([]).check(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("family", ["bart", "gpt_neox"])
def test_what_only_looks_like_an_encoder(family: str):
    """A decoder that could attend to an encoder's states; one whose configuration says nothing."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "d_model": 32}
    sizes |= {"num_attention_heads": 4, "vocab_size": VOCAB, "decoder_layers": 1}
    sizes |= {"decoder_attention_heads": 4, "decoder_ffn_dim": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    assert not validation._is_encoder(model)


def test_an_offloaded_embedding():
    target = copy.deepcopy(tiny_target())
    accelerate.cpu_offload(target)
    refused("embedding .* is offloaded", target=target, assistant_models=[])


def test_names_are_made_unique():
    drafters = tiny_drafters(3)
    for drafter, name in zip(drafters, ("x (2)", "x", "x")):
        drafter.name_or_path = name
    assert list(validation.named_drafters(drafters).values()) == list(drafters)


def test_a_drafter_for_another_target():
    config = copy.deepcopy(tiny_target().config)
    config.hidden_size, config.num_attention_heads = 48, 6
    wide = taps_hf.EagleDrafter(taps_hf.EagleDrafterConfig.from_target(config))
    refused("'wide' has `hidden_size` 48.*target's is 32", assistant_models={"wide": wide})
    config = copy.deepcopy(tiny_target().config)
    config.vocab_size = 99
    other = taps_hf.EagleDrafter(
        taps_hf.EagleDrafterConfig.from_target(config, target_name_or_path="some/target")
    )
    refused("`vocab_size` 99.*some/target", assistant_models=[other])


def test_another_tokenizer(tokenizer):
    drafter = copy.deepcopy(tiny_drafters(1)[0])
    drafter.config.tokenizer_fingerprint = "0123456789abcdef"
    refused("fingerprint 0123456789abcdef", assistant_models=[drafter], tokenizer=tokenizer)
    drafter.config.tokenizer_fingerprint = taps_hf.tokenizer_fingerprint(tokenizer)
    out = tiny_target().generate(
        prompt(), max_new_tokens=3, assistant_models=[drafter], tokenizer=tokenizer
    )
    assert out.shape[1] == 12


def test_a_model_input_that_trees_cannot_carry():
    target = tiny_target()
    decoding = taps_hf.SpeculativeDecoding(tiny_drafters(1))
    with pytest.raises(ValueError, match="pixel_values"):
        target.generate(
            prompt(),
            max_new_tokens=3,
            custom_generate=lambda model, ids, **kw: decoding(
                model, ids, pixel_values=torch.zeros(1), **kw
            ),
        )


def test_layers_without_rotary_positions_are_no_obstacle():
    target = copy.deepcopy(tiny_target())
    target.config.rope_parameters = {"full_attention": None}
    plain = target.generate(prompt(), max_new_tokens=5, do_sample=False)
    ours = target.generate(
        prompt(), max_new_tokens=5, do_sample=False, assistant_models=tiny_drafters(1)
    )
    assert ours.equal(plain)
