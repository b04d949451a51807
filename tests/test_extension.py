"""Importing the package changes nothing for other calls, and can be undone (contract 6)."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from transformers import GenerationMixin

import taps_hf
from tests.tiny import prompt, tiny_drafters, tiny_target


def test_other_calls_reach_the_original_untouched(monkeypatch):
    taps_hf.disable()
    seen = []
    monkeypatch.setattr(
        GenerationMixin, "generate", lambda self, *args, **kwargs: seen.append((args, kwargs))
    )
    taps_hf.enable()
    inputs = prompt()
    tiny_target().generate(inputs, max_new_tokens=3, strategy="of someone else")
    ((args, kwargs),) = seen
    assert args[0] is inputs
    assert kwargs == {"max_new_tokens": 3, "strategy": "of someone else"}
    taps_hf.disable()


def test_disable_and_enable():
    extended = GenerationMixin.generate
    assert taps_hf.is_enabled()
    taps_hf.enable()  # twice is once
    assert GenerationMixin.generate is extended
    taps_hf.disable()
    original = GenerationMixin.generate
    assert not taps_hf.is_enabled()
    assert original.__module__ == "transformers.generation.utils"
    assert not hasattr(original, "_taps_hf_original")
    with pytest.raises(ValueError, match="assistant_models"):
        tiny_target().generate(prompt(), max_new_tokens=2, assistant_models=tiny_drafters(1))
    taps_hf.disable()  # twice is once
    assert GenerationMixin.generate is original
    taps_hf.enable()
    assert inspect.signature(GenerationMixin.generate) == inspect.signature(original)


def test_none_means_plain_generate():
    plain = tiny_target().generate(prompt(), max_new_tokens=5, do_sample=False)
    ours = tiny_target().generate(
        prompt(), max_new_tokens=5, do_sample=False, assistant_models=None
    )
    assert torch.equal(plain, ours)


def test_import_registers_and_extends_in_a_fresh_process():
    code = (
        "import taps_hf\n"
        "from transformers import AutoConfig, GenerationMixin\n"
        "assert AutoConfig.for_model('taps_eagle').model_type == 'taps_eagle'\n"
        "assert taps_hf.is_enabled()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
