"""Folders of anyone's: whatever is wrong with them is said at loading, in one of three ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from taps_hf import EagleDrafter

from ..tiny import VOCAB, tiny_drafters


@pytest.fixture
def folder(tmp_path) -> Path:
    """A drafter's, with a draft vocabulary."""
    tiny_drafters(1, draft_vocab=6)[0].save_pretrained(tmp_path)
    return tmp_path


def change_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    layer = fields.pop("layer", {})
    config.update(fields)
    if isinstance(config.get("layer_config"), dict):
        config["layer_config"].update(layer)
    file.write_text(json.dumps(config))


def change_weights(folder: Path, **tensors) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def split(folder: Path, name: str) -> None:
    """Put the weights into a file that an index names."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    target = folder / name
    if target.suffix == ".bin":
        torch.save(weights, target)
    else:
        save_file(weights, target, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("load", [EagleDrafter.from_pretrained, AutoModel.from_pretrained])
def test_an_index_cannot_name_a_pickle(folder, load, monkeypatch):
    split(folder, "weights.bin")
    read = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: read.append(args))
    with pytest.raises(ValueError, match=r"'weights.bin', expected a \*.safetensors file"):
        load(folder)
    assert not read


@pytest.mark.parametrize("where", ["../outside.safetensors", "absolute", "in/side.safetensors"])
def test_an_index_cannot_leave_its_folder(tmp_path, where):
    folder = tmp_path / "drafter"
    tiny_drafters(1)[0].save_pretrained(folder)
    (folder / "in").mkdir()
    name = str(tmp_path / "outside.safetensors") if where == "absolute" else where
    split(folder, name)
    with pytest.raises(ValueError, match=r"expected a .*file of the same folder"):
        EagleDrafter.from_pretrained(folder)


def test_an_adapter_cannot_name_other_weights(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(ValueError, match=r"adapter_config\.json is there"):
        EagleDrafter.from_pretrained(folder)


def test_an_index_of_safetensors_is_read(folder):
    split(folder, "part.safetensors")
    loaded = EagleDrafter.from_pretrained(folder)
    expected = tiny_drafters(1, draft_vocab=6)[0].state_dict()
    assert all(torch.equal(loaded.state_dict()[name], x) for name, x in expected.items())


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([0, 1, 2, 3, 4, VOCAB]),
        torch.tensor([0, 1, 2, 3, 4, -1]),
        torch.tensor([0, 1, 2, 3, 4, 4]),
        torch.tensor([0, 1, 2, 3, 4, float("nan")]),
        torch.arange(6, dtype=torch.int32),
        torch.arange(6)[None],
    ],
    ids=str,
)
def test_draft_token_ids_of_nonsense_are_refused(folder, ids):
    change_weights(folder, draft_token_ids=ids)
    with pytest.raises(ValueError, match="draft_token_ids"):
        EagleDrafter.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer": {"sliding_window": 4}}, "`sliding_window` 4, expected None"),
        ({"layer": {"dtype": "float16"}}, "`dtype` 'float16', expected None"),
        ({"layer": {"num_hidden_layers": 10**9}}, "`num_hidden_layers` 1000000000, expected 1"),
        ({"layer": {"vocab_size": 10**9}}, "`vocab_size` 1000000000, expected 1"),
        ({"layer": {"hidden_size": 64}}, "`hidden_size` 64, expected 32"),
        ({"layer": {"intermediate_size": 10**9}}, r"expected \w+ \[1000000000, 32\]"),
        ({"layer": {"hidden_act": "nonsense"}}, "KeyError: .*nonsense"),
        ({"layer": {"num_attention_heads": 0}}, "does not|cannot be made|is not a configuration"),
        ({"layer_config": [1]}, r"`layer_config` is \[1\], expected dict"),
        ({"hidden_size": 10**9}, "`hidden_size` is 1000000000, expected 0 to"),
        ({"hidden_size": "32"}, "`hidden_size` is '32', expected int"),
        ({"hidden_size": True}, "`hidden_size` is True, expected int"),
        ({"vocab_size": 16.0}, "`vocab_size` is 16.0, expected int"),
        ({"draft_vocab_size": -1}, "`draft_vocab_size` is -1"),
        ({"draft_vocab_size": 5}, r"draft_token_ids is I64 \[6\], expected I64 \[5\]"),
        ({"draft_vocab_size": None}, "draft_token_ids is unknown"),
        ({"fc_bias": "yes"}, "`fc_bias` is 'yes', expected bool"),
        ({"dtype": "nonsense"}, "`dtype` is 'nonsense'"),
        ({"dtype": "int8"}, "`dtype` is 'int8'"),
        ({"quantization_config": {"quant_method": "x"}}, "`quantization_config` is"),
        ({"transformers_weights": "../x.safetensors"}, "`transformers_weights` is"),
        ({"training_data": 3}, "`training_data` is 3, expected list"),
    ],
    ids=str,
)
def test_configurations_of_nonsense_are_refused(folder, fields, message):
    change_config(folder, **fields)
    with pytest.raises(ValueError, match=message):
        EagleDrafter.from_pretrained(folder)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "\ufeff{}", '{"model_type": "llama"}'])
def test_files_that_are_no_configuration_are_named(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        EagleDrafter.from_pretrained(folder)


def test_missing_files_are_named(folder):
    (folder / "config.json").rename(folder / "kept")
    with pytest.raises(OSError, match=r"config\.json"):
        EagleDrafter.from_pretrained(folder)
    (folder / "kept").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        EagleDrafter.from_pretrained(folder)
