"""The commands `convert` and `export`, from one format to the next and back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from taps_hf import Eagle3Drafter, EagleDrafter
from taps_hf.cli import main

from .formats import foreign
from .formats.foreign import EAGLE3_CONFIG, EAGLE_CONFIG


@pytest.fixture
def target(tmp_path) -> str:
    folder = tmp_path / "target"
    foreign.target().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("how", ["safetensors", "pickle"])
def test_convert_and_export(tmp_path, target, capsys, how):
    """In float16 with a bias, as on the Hub; weights pass through unchanged."""
    tensors = {name: x.half() for name, x in foreign.eagle(bias=True).items()}
    source = foreign.write(
        tmp_path / "head", tensors, {**EAGLE_CONFIG, "bias": False}, how, torch.float16
    )
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(source), "--target", target, "--out", str(ours)]) == 0
    said = capsys.readouterr().out
    assert "Note: config.json says `bias` False, but fc.bias exists" in said
    assert f"Wrote {ours}: eagle2, " in said
    assert "the tensors were followed" in (ours / "README.md").read_text()
    drafter = EagleDrafter.from_pretrained(ours, dtype="auto")
    assert drafter.dtype == torch.float16
    given = ["export", str(ours), "--to", "sglang", "--target", target, "--out", str(back)]
    assert main(given) == 0
    assert "read back, it scores the same" in capsys.readouterr().out
    found = load_file(back / "model.safetensors")
    assert set(found) == tensors.keys() - {"embed_tokens.weight"}
    assert all(torch.equal(x, tensors[name]) for name, x in found.items())


def test_eagle3_from_one_engine_to_another(tmp_path, target, capsys):
    ids = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}}
    source = foreign.write(tmp_path / "head", foreign.eagle3(), {**EAGLE3_CONFIG, **ids})
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(source), "--target", target, "--out", str(ours)]) == 0
    assert "reading hidden_states [2, 4, 7]" in capsys.readouterr().out
    assert Eagle3Drafter.from_pretrained(ours).config.target_name_or_path == target
    # Its target is known: nobody has to name it.
    assert main(["export", str(ours), "--to", "speculators", "--out", str(back)]) == 0
    again = tmp_path / "again"
    assert main(["convert", str(back), "--target", target, "--out", str(again)]) == 0
    found = Eagle3Drafter.from_pretrained(again)
    assert found.digest() == Eagle3Drafter.from_pretrained(ours).digest()
    overruled = tmp_path / "overruled"
    given = ["convert", str(source), "--target", target, "--out", str(overruled)]
    assert main([*given, "--layer-ids", "1", "3", "6", "--norm-output", "true"]) == 0
    found = Eagle3Drafter.from_pretrained(overruled).config
    assert (found.layer_ids, found.norm_output) == ([1, 3, 6], True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["convert", "HEAD", "--target", "TARGET", "--out", "HEAD"], "which `out` would replace"),
        (
            ["convert", "TARGET", "--target", "TARGET", "--out", "NEW"],
            "no drafter in a known format",
        ),
        (["convert", "OURS", "--target", "TARGET", "--out", "NEW"], "is in our format already"),
        (["export", "HEAD", "--to", "vllm", "--out", "NEW"], "is not in our format"),
        (["export", "OURS", "--to", "vllm", "--out", "OURS"], "which `out` would replace"),
        (["export", "OURS", "--to", "vllm", "--out", "NEW"], "its projection has a bias"),
        (["export", "OURS", "--to", "speculators", "--out", "NEW"], "has no place for a drafter"),
        (["export", "NAMELESS", "--to", "vllm", "--out", "NEW"], "names no target, expected"),
    ],
)
def test_what_is_refused_writes_nothing(tmp_path, target, capsys, given, message):
    foreign.write(tmp_path / "head", foreign.eagle(), EAGLE_CONFIG)
    config = EagleDrafter.from_target(foreign.target(), fc_bias=True)
    config.save_pretrained(tmp_path / "nameless")
    config.config.target_name_or_path = target
    config.save_pretrained(tmp_path / "ours")
    paths = {name.upper(): str(tmp_path / name) for name in ("head", "ours", "new", "nameless")}
    paths["TARGET"] = target
    assert main([paths.get(word, word) for word in given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_export_composed(tmp_path, target, capsys):
    model = foreign.target()
    for seed, name in enumerate(("math", "chat")):
        torch.manual_seed(seed)
        EagleDrafter.from_target(model, 6, fc_bias=True).save_pretrained(tmp_path / name)
    given = ["export", "--to", "vllm", "--target", target, "--out", str(tmp_path / "out")]
    pairs = [f"{name}={tmp_path / name}" for name in ("math", "chat")]
    assert main([*given, "--compose", *pairs, "--draft-vocab", "4"]) == 0
    assert "for vLLM: math, chat, routed by token" in capsys.readouterr().out
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["drafters.1.draft_token_ids"].tolist() == [0, 1, 2, 3]
    more = ["--routing", "request", "--stop-below", "0.25"]
    assert main([*given, "--compose", *pairs, *more]) == 0  # replaces its own
    said = json.loads((tmp_path / "out" / "config.json").read_text())["taps_hf"]["drafting"]
    assert said == {"routing": "request", "stop_below": 0.25, "lookup": False}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--to", "sglang", "--compose", "a=OURS"], "no other engine composes"),
        (["--to", "vllm"], "expected one of the two: DRAFTER, or --compose"),
        (["OURS", "--to", "vllm", "--compose", "a=OURS"], "expected one of the two"),
        (["OURS", "--to", "vllm", "--routing", "token"], "`routing` is 'token', which is for `--c"),
        (["--to", "vllm", "--compose", "a=OURS", "a=HEAD"], "expected NAME=PATH with distinct"),
        (["OURS", "--to", "vllm", "--no-lookup"], "`lookup` is False, which is for `--compose`"),
        (["--to", "vllm", "--compose", "a=OURS", "--lookup"], "not with 'token'"),
        (["OURS", "--to", "vllm", "--stop-below", "0"], "`stop_below` is 0.0, which is for `--c"),
        (
            ["--to", "vllm", "--compose", "a=OURS", "--stop-below", "1"],
            "expected from 0 to below 1",
        ),
        (["--to", "vllm", "--compose", "a=HEAD"], "is not in our format"),
        (["--to", "vllm", "--compose", "a=OURS", "b=OURS"], "have the same weights"),
        (["--to", "vllm", "--compose", "a=OURS", "b=NEW3"], "expected one kind"),
        (
            ["--to", "vllm", "--compose", "b=NEW3", "--draft-vocab", "2"],
            "has a head of its own",
        ),
        (["--to", "vllm", "--compose", "a=OURS", "--draft-vocab", "0"], "expected at least 1"),
    ],
)
def test_what_composing_refuses_writes_nothing(tmp_path, target, capsys, given, message):
    model = foreign.target()
    foreign.write(tmp_path / "head", foreign.eagle(), EAGLE_CONFIG)
    EagleDrafter.from_target(model).save_pretrained(tmp_path / "ours")
    Eagle3Drafter.from_target(model, 4).save_pretrained(tmp_path / "new3")
    for name in ("head", "ours", "new3"):
        given = [word.replace(name.upper(), str(tmp_path / name)) for word in given]
    out = str(tmp_path / "out")
    assert main(["export", *given, "--target", target, "--out", out]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
