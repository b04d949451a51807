from __future__ import annotations

import pytest
import torch

from taps_hf import EagleDrafter, PromptLookup
from taps_hf.demo.models import LOOKUP, ModelSpec, default_target, load_models

from ..tiny import VOCAB, tiny_target


def test_models_are_loaded_once_and_shared(tiny_spec):
    models = load_models(tiny_spec)
    assert load_models(ModelSpec(**vars(tiny_spec))) is models
    assert list(models.drafters) == ["math", "chat"]
    assert not models.target.training
    assert not any(p.requires_grad for p in models.target.parameters())
    assert models.max_positions == 256
    assert models.encode("t5 t6")["input_ids"].tolist() == [[5, 6, 3, 4]]


@pytest.mark.parametrize(("ends", "expected"), [(None, set()), (3, {3}), ([3, 5], {3, 5})])
def test_the_tokens_that_end_an_answer(tiny_spec, monkeypatch, ends, expected):
    models = load_models(tiny_spec)
    monkeypatch.setattr(models.target.generation_config, "eos_token_id", ends)
    assert models.ends == expected


@pytest.mark.parametrize(
    ("target", "drafters", "message"),
    [
        (" ", ["a=b"], "No target was named"),
        ("t", [], "expected NAME=PATH"),
        ("t", ["a"], "expected NAME=PATH"),
        ("t", ["a="], "expected NAME=PATH"),
        ("t", ["a=x", "a=y"], "expected NAME=PATH with distinct names"),
    ],
)
def test_specifications_of_another_form(target, drafters, message):
    with pytest.raises(ValueError, match=message):
        ModelSpec.parse(target, drafters)


def test_models_that_cannot_be_loaded_are_named(tiny_spec, tmp_path):
    math = dict(tiny_spec.drafters)["math"]
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"The target could not be loaded from .*nowhere"):
        load_models(ModelSpec.parse(nowhere, [f"math={math}"]))
    with pytest.raises(ValueError, match=r"Drafter 'math' could not be loaded from .*nowhere"):
        load_models(ModelSpec.parse(tiny_spec.target, [f"math={nowhere}"]))
    # A drafter of another target: refused by what refuses it in `generate`.
    config = tiny_target().config.to_dict() | {"vocab_size": VOCAB + 1}
    other = EagleDrafter.from_target(type(tiny_target())(type(tiny_target().config)(**config)))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="`vocab_size` 17, but the target's is 16"):
        load_models(ModelSpec.parse(tiny_spec.target, [f"other={tmp_path / 'other'}"]))
    (tmp_path / "other" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"Drafter 'other' .* cannot be loaded"):
        load_models(ModelSpec.parse(tiny_spec.target, [f"other={tmp_path / 'other'}"]))


def test_without_its_package_the_embedded_target_comes_from_the_hub(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert default_target() == "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert default_target() == "embedded"


def test_dtype_is_the_targets(tiny_spec):
    spec = ModelSpec(tiny_spec.target, tiny_spec.drafters, "bfloat16")
    assert load_models(spec).target.dtype == torch.bfloat16


def test_a_lookup_is_a_drafter_without_a_folder(tiny_spec):
    drafters = [f"{name}={path}" for name, path in tiny_spec.drafters]
    models = load_models(ModelSpec.parse(tiny_spec.target, [*drafters, f"prompt={LOOKUP}"]))
    assert list(models.drafters) == ["math", "chat", "prompt"]
    assert isinstance(models.drafters["prompt"], PromptLookup)
