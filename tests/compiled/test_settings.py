from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig, GenerationConfig

from taps_hf.compiled.settings import (
    compilation_for,
    resolve,
    rounded_width,
    rounded_widths,
)
from tests.tiny import prompt, refused, tiny_target


def test_widths():
    assert [rounded_width(n) for n in (1, 2, 8, 9, 16, 17, 49, 64, 65)] == [
        *(1, 8, 8, 16, 16, 32, 64, 64, 128)
    ]
    assert rounded_widths(1) == (1,)
    assert rounded_widths(8) == (1, 8)
    assert rounded_widths(49) == (1, 8, 16, 32, 64)
    for rows in range(1, 200):
        assert rounded_width(rows) in rounded_widths(rows)


def test_texts_of_similar_lengths_share_graphs():
    config, target = CompileConfig(), tiny_target()
    keys = {compilation_for(config, target, length, 24, 1).key for length in (40, 100, 200)}
    assert len(keys) == 1
    longer = compilation_for(config, target, 230, 24, 2)
    assert longer.width == 32
    assert longer.capacity == 512
    # No text is longer than the target's positions.
    assert compilation_for(config, target, 10**6, 24, 1).capacity == 512


def test_what_true_means():
    mine, its = CompileConfig(backend="eager"), CompileConfig(backend="aot_eager")
    assert resolve(mine, GenerationConfig(compile_config=its)) is mine
    assert resolve(True, GenerationConfig(compile_config=its)).backend == "aot_eager"
    assert resolve(True, GenerationConfig()).fullgraph


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("yes", "`compile` is 'yes', expected True, False, or a transformers.CompileConfig"),
        (CompileConfig(dynamic=True), "dynamic=True, expected None or False"),
        (CompileConfig(options={"freezing": True}), "expected mode=None beside options"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(given, match: str):
    refused(match, compile=given)


def test_a_configuration_of_generate_is_checked_too():
    refused("dynamic=True", compile=True, compile_config=CompileConfig(dynamic=True))


def test_targets_that_cannot_be_compiled_are_refused(monkeypatch):
    target = tiny_target("qwen2")

    class Quantizer:
        is_compileable = False

    monkeypatch.setattr(target, "hf_quantizer", Quantizer(), raising=False)
    refused("quantised in a way that cannot be compiled", target, compile=True)
    monkeypatch.undo()
    monkeypatch.setattr(target.lm_head, "_hf_hook", object(), raising=False)
    refused("accelerate moves the target's", target, compile=True)


def test_a_backend_that_is_not_there():
    config = CompileConfig(backend="nobody's", mode=None)
    with pytest.raises(ValueError, match=r"could not be compiled with .*nobody's"):
        tiny_target().generate(prompt(), assistant_models=[], compile=config, max_new_tokens=3)


def test_a_hook_that_no_two_passes_find_alike():
    """Not before the prompt is run, but still as an error that says what is wrong."""
    target, seen = tiny_target(), []
    handle = target.model.norm.register_forward_pre_hook(lambda *_: seen.append(None))
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    try:
        with pytest.raises(ValueError, match="could not be compiled with"):
            target.generate(prompt(), assistant_models=[], compile=config, max_new_tokens=40)
    finally:
        handle.remove()


def test_a_model_with_a_break_in_its_graph():
    """Said before the prompt is run."""
    target = tiny_target("qwen3")
    norm = target.model.norm
    handle = norm.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    try:
        config = CompileConfig(backend="eager", mode=None, fullgraph=True)
        with pytest.raises(ValueError, match="could not be compiled with"):
            target.generate(
                torch.tensor([[1, 2, 3]]), assistant_models=[], compile=config, max_new_tokens=3
            )
    finally:
        handle.remove()
