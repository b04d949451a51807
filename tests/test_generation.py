"""What plain `generate` takes for one sequence, speculative decoding takes as well."""

from __future__ import annotations

import copy
import gc
import inspect
import sys
import threading
import time

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    OPTConfig,
    OPTForCausalLM,
    StoppingCriteriaList,
    pipeline,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.streamers import BaseStreamer

import taps_hf
from taps_hf.cache import CACHE
from tests.phrases import Phrases
from tests.tiny import FAMILIES, VOCAB, prompt, tiny_drafters, tiny_target

WIDE = taps_hf.DynamicTree(depth=4, top_k=6, num_nodes=30)


def speculative(family: str = "llama", **kwargs) -> dict:
    """Not the default strategy: whether that one drafts depends on times."""
    drafters = tiny_drafters(2, family)
    return {"assistant_models": drafters, "strategy": "merged", "tree": WIDE, **kwargs}


class Recorder(BaseStreamer):
    def __init__(self):
        self.received, self.ended = [], 0

    def put(self, value):
        self.received.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


def test_streams_the_prompt_and_then_token_by_token():
    recorders = []
    for extra in ({}, speculative()):
        recorder = Recorder()
        tiny_target().generate(
            prompt(), max_new_tokens=20, do_sample=False, streamer=recorder, **extra
        )
        recorders.append((recorder.received, recorder.ended))
    assert recorders[0] == recorders[1]
    assert [len(x) for x in recorders[1][0]] == [9] + [1] * 20


def test_stop_strings(tokenizer):
    target = tiny_target()
    text = "".join(
        tokenizer.convert_ids_to_tokens(
            target.generate(prompt(), max_new_tokens=30, do_sample=False)[0, 9:].tolist()
        )
    )
    for at in (3, 8, 15):
        stop = text[at : at + 3]
        given = [
            {"stop_strings": [stop]},
            {
                "generation_config": GenerationConfig(
                    stop_strings=[stop], max_new_tokens=30, do_sample=False
                )
            },
        ]
        for how in given:
            common = {"tokenizer": tokenizer, **how}
            if "generation_config" not in how:
                common |= {"max_new_tokens": 30, "do_sample": False}
            plain = target.generate(prompt(), **common)
            ours = target.generate(prompt(), **common, **speculative())
            assert torch.equal(plain, ours)
            assert plain.shape[1] < 39
            if "generation_config" in how:  # the caller's object is left as it was
                assert how["generation_config"].stop_strings == [stop]


def test_stop_strings_of_the_model_itself(tokenizer, monkeypatch):
    target = tiny_target()
    free = target.generate(prompt(), max_new_tokens=30, do_sample=False)[0, 9:].tolist()
    stop = "".join(tokenizer.convert_ids_to_tokens(free[6:9]))
    monkeypatch.setattr(target.generation_config, "stop_strings", [stop])
    common = {"tokenizer": tokenizer, "max_new_tokens": 30, "do_sample": False}
    plain = target.generate(prompt(), **common)
    assert torch.equal(plain, target.generate(prompt(), **common, **speculative()))
    assert plain.shape[1] < 39
    with pytest.raises(ValueError, match="tokenizer"):
        target.generate(prompt(), max_new_tokens=30, **speculative())


def test_stop_strings_are_chosen_as_generate_chooses_them(tokenizer, monkeypatch):
    """An argument before configurations, also None; a criterion that is given before its own."""
    target = tiny_target()
    free = target.generate(prompt(), max_new_tokens=30, do_sample=False)[0, 9:].tolist()
    letters = tokenizer.convert_ids_to_tokens(free)
    early, late = "".join(letters[4:7]), "".join(letters[12:15])
    common = {"tokenizer": tokenizer, "max_new_tokens": 30, "do_sample": False}

    def lengths(**given) -> list[int]:
        found = []
        for more in ({}, speculative()):
            if "stopping_criteria" in given:
                criterion = StopStringCriteria(tokenizer, [late])
                given["stopping_criteria"] = StoppingCriteriaList([criterion])
            found.append(target.generate(prompt(), **common, **given, **more)[0, 9:].tolist())
        assert found[0] == found[1]
        return len(found[1])

    by_argument = lengths(stop_strings=[early])
    by_criterion = lengths(stop_strings=[early], stopping_criteria=None)
    assert by_argument < by_criterion < 30
    monkeypatch.setattr(target.generation_config, "stop_strings", [early])
    assert lengths() == by_argument
    assert lengths(stopping_criteria=None) == by_criterion
    assert lengths(stop_strings=[late]) == by_criterion
    assert lengths(stop_strings=None) == 30


def test_max_time():
    class SlowStreamer(Recorder):
        def put(self, value):
            time.sleep(0.02)

    started = time.perf_counter()
    out = tiny_target().generate(
        prompt(),
        max_new_tokens=200,
        do_sample=False,
        max_time=0.3,
        streamer=SlowStreamer(),
        **speculative(),
    )
    assert 9 < out.shape[1] < 209
    assert time.perf_counter() - started < 3


def test_generation_config_and_max_length():
    config = GenerationConfig(max_length=30, do_sample=False, repetition_penalty=1.2)
    plain = tiny_target().generate(prompt(), generation_config=config)
    ours = tiny_target().generate(prompt(), generation_config=config, **speculative())
    assert torch.equal(plain, ours)
    assert ours.shape[1] == 30


def test_nothing_is_drafted_beyond_a_limit():
    """No node lies deeper than could still be emitted, and none at a position that is not there."""
    target = tiny_target()
    for length, new in ((9, 12), (250, 6)):  # max_new_tokens; the target's 256 positions
        out = target.generate(
            prompt(length),
            max_new_tokens=new,
            do_sample=False,
            return_dict_in_generate=True,
            output_draft_trees=True,
            **speculative(),
        )
        emitted = 0
        for cycle in out.draft_trace.cycles:
            depth = int(cycle.tree.depths.max())
            assert depth <= new - emitted - 1
            assert length - 1 + emitted + depth < target.config.max_position_embeddings
            emitted += len(cycle.emitted)
        assert emitted == new


def test_beyond_the_maximum_positions_goes_on_like_plain_generate():
    plain = tiny_target().generate(prompt(250), max_new_tokens=12, do_sample=False)
    ours = tiny_target().generate(prompt(250), max_new_tokens=12, do_sample=False, **speculative())
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_returned_cache_is_plain_generates(family: str):
    target = tiny_target(family)
    outs = []
    for extra in ({}, speculative(family)):
        outs.append(
            target.generate(
                prompt(), max_new_tokens=22, do_sample=False, return_dict_in_generate=True, **extra
            )
        )
    plain, ours = (out.past_key_values for out in outs)
    assert ours.get_seq_length() == plain.get_seq_length() == 9 + 22 - 1
    assert {type(layer) for layer in ours.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
    for mine, theirs in zip(ours.layers, plain.layers):
        assert type(mine) is type(theirs)
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("only_new", [False, True], ids=["whole", "only the new tokens"])
@pytest.mark.parametrize("first_turn", ["plain", "speculative"])
def test_a_cache_from_an_earlier_turn(family: str, only_new: bool, first_turn: str):
    target = tiny_target(family)
    extra = speculative(family)
    first = target.generate(
        prompt(),
        max_new_tokens=12,
        do_sample=False,
        return_dict_in_generate=True,
        **(extra if first_turn == "speculative" else {}),
    )
    history = torch.cat([first.sequences, prompt(4, seed=5)], dim=1)
    results = []
    for more in ({}, extra):
        cache = copy.deepcopy(first.past_key_values)
        inputs, mask = history, torch.ones_like(history)
        if only_new:
            if "_mask_length" not in inspect.getsource(GenerationMixin.generate):
                pytest.skip("this generate wants the whole sequence along with a cache")
            inputs = history[:, cache.get_seq_length() :]
        out = target.generate(
            inputs,
            attention_mask=mask,
            max_new_tokens=15,
            do_sample=False,
            **{CACHE: cache},
            **more,
        )
        results.append(out)
        assert cache.get_seq_length() == history.shape[1] + 15 - 1  # extended in place
    assert torch.equal(*results)


def test_a_cache_made_without_a_config():
    plain = tiny_target().generate(prompt(), max_new_tokens=12, do_sample=False)
    cache = DynamicCache()
    ours = tiny_target().generate(
        prompt(), max_new_tokens=12, do_sample=False, **{CACHE: cache}, **speculative()
    )
    assert torch.equal(plain, ours)
    assert cache.get_seq_length() == 9 + 12 - 1
    assert {type(layer) for layer in cache.layers} == {DynamicLayer}


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill(family: str):
    extra = speculative(family)
    common = {"max_new_tokens": 15, "do_sample": False}
    plain = tiny_target(family).generate(prompt(31), **common)
    ours = tiny_target(family).generate(prompt(31), prefill_chunk_size=7, **common, **extra)
    assert torch.equal(plain, ours)


def test_text_generation_pipeline(tokenizer):
    pipe = pipeline("text-generation", model=copy.deepcopy(tiny_target()), tokenizer=tokenizer)
    common = {"max_new_tokens": 20, "do_sample": False}
    assert pipe("abcabd", **common) == pipe("abcabd", **common, **speculative())


def test_custom_generate_without_the_extension(tokenizer):
    taps_hf.disable()
    decoding = taps_hf.SpeculativeDecoding(tiny_drafters(2), "merged", WIDE)
    plain = tiny_target().generate(prompt(), max_new_tokens=20, do_sample=False)
    ours = tiny_target().generate(
        prompt(), max_new_tokens=20, do_sample=False, custom_generate=decoding
    )
    assert torch.equal(plain, ours)
    # Stop strings go in as a criterion there (docs/architecture.md).
    stop = "".join(tokenizer.convert_ids_to_tokens(plain[0, 14:16].tolist()))
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
    ours = tiny_target().generate(
        prompt(),
        max_new_tokens=20,
        do_sample=False,
        custom_generate=decoding,
        stopping_criteria=criteria,
    )
    assert ours.shape[1] < plain.shape[1]
    assert torch.equal(ours, plain[:, : ours.shape[1]])


def test_device_map(tmp_path):
    """A target spread over devices by accelerate, part of it offloaded to disk."""
    tiny_target().save_pretrained(tmp_path)
    device_map = dict.fromkeys(
        ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    device_map["model.layers.1"] = "disk"
    spread = type(tiny_target()).from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    spread.generation_config = tiny_target().generation_config
    plain = tiny_target().generate(prompt(), max_new_tokens=12, do_sample=False)
    ours = spread.generate(prompt(), max_new_tokens=12, do_sample=False, **speculative())
    assert torch.equal(plain, ours)


def test_what_was_learnt_in_inference_mode_is_used_outside_of_it():
    target = copy.deepcopy(tiny_target())  # with no experience yet
    common = {"max_new_tokens": 20, "do_sample": False}
    plain = target.generate(prompt(), **common)
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            ours = target.generate(prompt(), **common, **speculative(strategy="auto"))
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("strategy", ["auto", "merged", "confidence"])
def test_torchs_default_device_may_be_another(strategy):
    """Trees are small and stay on the host. (No CPU has two devices; "meta" computes nothing.)"""
    common = {"max_new_tokens": 20, "do_sample": False}
    plain = tiny_target().generate(prompt(), **common)
    inputs, settings = prompt(), speculative(strategy=strategy)
    with torch.device("meta"):
        ours = tiny_target().generate(inputs, **common, **settings)
    assert torch.equal(ours, plain)


def test_a_target_whose_decoder_is_inside_of_its_base_model():
    """OPT's head calls a part of `base_model`: states cannot be read there, and trees can."""
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    target = OPTForCausalLM(config).eval()
    common = {"max_new_tokens": 20, "do_sample": False}
    plain = target.generate(prompt(), **common)
    draft = {"assistant_models": [Phrases(plain[0].tolist())], "strategy": "single"}
    ours = target.generate(prompt(), **common, **draft, return_dict_in_generate=True)
    assert torch.equal(ours.sequences, plain)
    assert ours.draft_trace.accepted_length > 1
    with pytest.raises(ValueError, match="did not run the modules of its `self` whose states"):
        target.generate(prompt(), **common, assistant_models=tiny_drafters(1))


def test_threads_with_the_same_models():
    """Contract 4: nothing of a running generation lives on the target or on a drafter."""
    target, expected, found = tiny_target(), {}, {}
    for seed in range(4):
        expected[seed] = target.generate(prompt(seed=seed), max_new_tokens=60, do_sample=False)

    def run(seed: int) -> None:
        found[seed] = [
            target.generate(prompt(seed=seed), max_new_tokens=60, do_sample=False, **speculative())
            for _ in range(2)
        ]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # many more chances to get into each other's way
    try:
        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not any("forward" in vars(module) for module in target.modules())
    for seed in range(4):
        assert len(found[seed]) == 2
        assert all(torch.equal(expected[seed], out) for out in found[seed])


def test_models_are_left_as_they_were():
    target, drafters = tiny_target(), tiny_drafters(2)

    def state() -> list:
        modules = [m for model in (target, *drafters) for m in model.modules()]
        return [
            (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules
        ]

    target.generate(prompt(), max_new_tokens=5, **speculative())  # transformers' own lazy hooks
    before = state()
    target.generate(prompt(), max_new_tokens=20, **speculative())
    assert state() == before


def test_memory_does_not_grow_over_generations():
    def tensors() -> int:
        gc.collect()
        return sum(
            x.numel() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)
        )

    tiny_target().generate(prompt(), max_new_tokens=20, **speculative())
    before = tensors()
    for _ in range(5):
        tiny_target().generate(prompt(), max_new_tokens=20, **speculative())
    assert tensors() <= before


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_in_the_middle_gives_the_cache_back(family: str):
    class Breaks(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.received) > 5:
                raise RuntimeError("the listener left")

    target = tiny_target(family)
    caches = []
    for extra in ({}, speculative(family)):
        caches.append(DynamicCache(config=target.config))
        with pytest.raises(RuntimeError, match="listener"):
            target.generate(
                prompt(),
                max_new_tokens=20,
                do_sample=False,
                **{CACHE: caches[-1]},
                streamer=Breaks(),
                **extra,
            )
    plain, ours = caches
    # Of the pass that broke off nothing is left; what is there is what plain generate has.
    length = ours.get_seq_length()
    assert 8 <= length <= plain.get_seq_length()
    for mine, theirs in zip(ours.layers, plain.layers):
        assert type(mine) is type(theirs)
        shared = min(mine.keys.shape[2], theirs.keys.shape[2])
        first = plain.get_seq_length() - length
        theirs_keys = theirs.keys[:, :, : theirs.keys.shape[2] - first]
        if shared > first:
            torch.testing.assert_close(
                mine.keys[:, :, -(shared - first) :],
                theirs_keys[:, :, -(shared - first) :],
                atol=1e-4,
                rtol=1e-4,
            )


def test_positional_arguments():
    """As in plain generate: inputs, generation_config, logits_processor, stopping_criteria, ..."""
    recorder = Recorder()
    config = GenerationConfig(max_new_tokens=12, do_sample=False)
    criteria = StoppingCriteriaList([])
    args = (prompt(), config, None, criteria, None, None, None, recorder)
    plain = tiny_target().generate(prompt(), config)
    assert torch.equal(plain, tiny_target().generate(*args, **speculative()))
    assert (len(recorder.received), recorder.ended) == (13, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hidden", [[0, 1], [3], [2, 5, 6], [8], [7, 8]], ids=str)
def test_masks_with_holes_and_right_padding(family: str, hidden: list[int]):
    mask = torch.ones_like(prompt())
    mask[0, hidden] = 0
    common = {"attention_mask": mask, "max_new_tokens": 15, "do_sample": False}
    plain = tiny_target(family).generate(prompt(), **common)
    extra = speculative(family)
    assert torch.equal(plain, tiny_target(family).generate(prompt(), **common, **extra))
