"""Loading drafters for a target."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from taps_hf import Eagle3Drafter, EagleDrafter, tokenizer_fingerprint
from taps_hf.loading import check_frozen_target, load_drafter, load_model

from .tiny import tiny_drafters, tiny_target
from .training.chat import CHATML, chat_tokenizer


@pytest.fixture
def folder(tmp_path):
    (drafter,) = tiny_drafters(1)
    drafter.save_pretrained(tmp_path / "math")
    return tmp_path / "math"


def test_a_drafter_is_ready_to_draft(folder):
    target = tiny_target()
    drafter = load_drafter(str(folder), target, chat_tokenizer(CHATML))
    assert not drafter.training
    assert (drafter.device, drafter.dtype) == (target.device, torch.float32)
    assert load_drafter(str(folder), target, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_drafter_is_what_its_folder_says(folder, tmp_path):
    target = tiny_target()
    Eagle3Drafter.from_target(target, layer_ids=[1]).save_pretrained(tmp_path / "eagle3")
    assert type(load_drafter(str(folder), target)) is EagleDrafter
    assert type(load_drafter(str(tmp_path / "eagle3"), target)) is Eagle3Drafter
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="holds weights of ours without"):
        load_drafter(str(folder), target)


def test_drafters_that_do_not_fit_are_named(folder, tmp_path):
    target, tokenizer = tiny_target(), chat_tokenizer(CHATML)

    def refused(message: str, **more) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            load_drafter(str(folder), target, tokenizer, **more)

    drafter = EagleDrafter.from_pretrained(folder)
    drafter.config.tokenizer_fingerprint = "0123456789abcdef"
    drafter.save_pretrained(folder)
    refused(f"Drafter {str(folder)!r} was trained with a tokenizer of fingerprint 0123")
    drafter.config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    drafter.save_pretrained(folder)
    assert load_drafter(str(folder), target, tokenizer, name="math").config.vocab_size == 16
    config = type(target.config)(**{**target.config.to_dict(), "vocab_size": 17})
    EagleDrafter.from_target(type(target)(config)).save_pretrained(folder)
    refused("Drafter 'math' has `vocab_size` 17, but the target's is 16", name="math")
    (folder / "model.safetensors").write_bytes(b"broken")
    refused(f"Drafter 'math' ({folder}) cannot be loaded", name="math")
    refused("`init_from` cannot be loaded", called="`init_from`")
    with pytest.raises(OSError, match="nowhere"):
        load_drafter(str(tmp_path / "nowhere"), target)


def test_digests_follow_the_weights():
    one, other = tiny_drafters()
    assert one.digest() == one.digest()
    assert one.digest() != other.digest()
    rounded = copy.deepcopy(one).bfloat16()
    assert rounded.digest() != one.digest()
    assert copy.deepcopy(rounded).float().digest() == rounded.digest()


@pytest.mark.parametrize("weights", [True, False])
def test_a_target_without_weights_is_the_same_otherwise(tmp_path, weights):
    target = copy.deepcopy(tiny_target())
    target.generation_config.eos_token_id = [2, 5]
    target.save_pretrained(tmp_path)
    found = load_model(str(tmp_path), torch.bfloat16, "cpu", weights)
    check_frozen_target(found)
    assert found.device.type == ("cpu" if weights else "meta")
    assert found.dtype == torch.bfloat16
    assert found.generation_config.eos_token_id == [2, 5]
    assert found.config.name_or_path == str(tmp_path)
