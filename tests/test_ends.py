"""Reading a target's embedding and LM head without the rest of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from taps_hf import Eagle3Drafter
from taps_hf.cli import main
from taps_hf.ends import load_ends
from taps_hf.loading import EMBEDDED, load_model

from .formats import foreign
from .formats.foreign import EAGLE3_CONFIG
from .tiny import COMMON, FAMILIES

ENDS = {"model.embed_tokens.weight", "lm_head.weight"}


def saved(folder, family: str = "llama", shards: str = "5GB", **config) -> str:
    config = AutoConfig.for_model(family, **{**COMMON, **config})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
    for weight in model.get_output_embeddings().parameters():
        weight.data.uniform_(-1, 1)  # a bias is zero at first
    model.save_pretrained(folder, max_shard_size=shards)
    return str(folder)


def same_ends(found, expected) -> None:
    for end in ("get_input_embeddings", "get_output_embeddings"):
        state, wanted = getattr(found, end)().state_dict(), getattr(expected, end)().state_dict()
        assert state.keys() == wanted.keys()
        for name, weight in state.items():
            assert weight.dtype == wanted[name].dtype
            assert torch.equal(weight, wanted[name])


def in_memory(model) -> set[str]:
    return {name for name, x in model.named_parameters() if x.device.type != "meta"}


@pytest.mark.parametrize("shards", ["5GB", "4KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        ("llama", {}, ENDS),
        ("llama", {"tie_word_embeddings": True}, {"model.embed_tokens.weight"}),
        ("phi", {}, ENDS | {"lm_head.bias"}),
        ("gemma3_text", FAMILIES["gemma3_text"], {"model.embed_tokens.weight"}),
    ],
)
def test_the_ends_are_those_of_the_whole(tmp_path, shards, dtype, family, config, expected):
    name = saved(tmp_path, family, shards, **config)
    found, whole = load_ends(name, dtype), load_model(name, dtype, "cpu")
    same_ends(found, whole)
    assert in_memory(found) == expected
    assert type(found) is type(whole)
    assert found.config.to_dict() == whole.config.to_dict()
    assert found.config.name_or_path == name
    assert not found.training
    tied = len(expected) == 1
    weights = found.get_input_embeddings().weight, found.get_output_embeddings().weight
    assert (weights[0] is weights[1]) == tied


def test_no_other_tensor_is_read(tmp_path, monkeypatch):
    """Shards that hold none of them need not even be there."""
    name = saved(tmp_path, shards="4KB")
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {places[end] for end in ENDS}
    others = set(places.values()) - needed
    assert len(others) > 2
    for file in others:
        (tmp_path / file).unlink()
    read = []

    class Recording:
        def __init__(self, *args, **kwargs):
            self._open = safe_open(*args, **kwargs)

        def __enter__(self):
            self._opened = self._open.__enter__()
            return self

        def __exit__(self, *args):
            return self._open.__exit__(*args)

        def get_slice(self, name):  # for its shape: data are read by what is asked of it
            return self._opened.get_slice(name)

        def get_tensor(self, name):
            read.append(name)
            return self._opened.get_tensor(name)

    from taps_hf.ends import safe_open

    monkeypatch.setattr("taps_hf.ends.safe_open", Recording)
    load_ends(name, torch.float32)
    assert sorted(read) == sorted(ENDS)


def test_convert_and_export_read_no_more(tmp_path):
    target, ours, back = tmp_path / "target", tmp_path / "ours", tmp_path / "back"
    foreign.target().save_pretrained(target, max_shard_size="4KB")
    places = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(places.values()) - {places[end] for end in ENDS}:
        (target / file).unlink()
    ids = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}}
    source = foreign.write(tmp_path / "head", foreign.eagle3(), {**EAGLE3_CONFIG, **ids})
    given = ["--target", str(target), "--out"]
    assert main(["convert", str(source), *given, str(ours)]) == 0
    assert main(["export", str(ours), "--to", "speculators", *given, str(back)]) == 0
    found = load_file(back / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(found, foreign.target().get_input_embeddings().weight)
    drafter = Eagle3Drafter.from_pretrained(ours)
    assert drafter.config.layer_ids == [2, 4, 7]
    # A head for layers that the target has not is still refused.
    wrong = ["convert", str(source), *given, str(tmp_path / "wrong"), "--layer-ids", "1", "2", "99"]
    assert main(wrong) == 2


def rename(folder) -> None:
    file = folder / "model.safetensors"
    state = {name.replace("embed_tokens", "tok"): x for name, x in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})


def head_beside(folder) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, file, metadata={"format": "pt"})


def pickled(folder) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def adapted(folder) -> None:
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (rename, {}, "have no model.embed_tokens.weight"),
        (head_beside, {"tie_word_embeddings": True}, "there is one beside it"),
        (pickled, {}, "it has no safetensors"),
        (adapted, {}, "it has an adapter_config.json"),
    ],
)
def test_where_they_cannot_be_read_alone_all_is_loaded(
    tmp_path, monkeypatch, change, config, message
):
    name = saved(tmp_path, **config)
    change(tmp_path)
    asked = []
    monkeypatch.setattr("taps_hf.ends.load_model", lambda *given: asked.append(given))
    with pytest.warns(UserWarning, match=f"{message}.*, so all of the target is loaded"):
        load_ends(name, torch.bfloat16)
    assert asked == [(name, torch.bfloat16, "cpu")]


def test_what_is_loaded_whole_is_all_there(tmp_path):
    name = saved(tmp_path, tie_word_embeddings=True)
    head_beside(tmp_path)
    with pytest.warns(UserWarning, match="so all of the target is loaded"):
        found = load_ends(name, torch.float32)
    assert in_memory(found) == {name for name, _ in found.named_parameters()}


def test_the_embedded_target_is_loaded_whole_without_a_word(monkeypatch):
    monkeypatch.setattr("taps_hf.ends.load_model", lambda *given: given)
    assert load_ends(EMBEDDED, torch.float32) == (EMBEDDED, torch.float32, "cpu")


def test_what_is_broken_is_named(tmp_path):
    with pytest.raises(OSError, match="none"):
        load_ends(str(tmp_path / "none"), torch.float32)
    name = saved(tmp_path / "target")
    file = tmp_path / "target" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="target cannot be loaded: SafetensorError"):
        load_ends(name, torch.float32)
    shutil.rmtree(tmp_path / "target")
    name = saved(tmp_path / "target", shards="4KB")
    index = tmp_path / "target" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-0', '"../model-0'))
    with pytest.raises(ValueError, match="file of the same folder"):
        load_ends(name, torch.float32)
