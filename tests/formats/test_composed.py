"""Several drafters in one folder: what is written, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from taps_hf import Eagle3Drafter, EagleDrafter
from taps_hf.exchange import export_composed
from taps_hf.files import read_json
from taps_hf.formats.composed import check_composed, compose
from taps_hf.formats.composition import ARCHITECTURES, Composition, Dialect, Drafting

from ..tiny import tiny_drafters, tiny_target


def made(seed: int, **settings: object) -> EagleDrafter:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EagleDrafter.from_target(tiny_target(), **settings)


def test_what_lies_in_the_folder(tmp_path):
    drafters = {
        "math": made(1, draft_token_ids=torch.tensor([3, 1, 5]), fc_bias=True),
        "chat": made(2, draft_token_ids=torch.tensor([2, 7])),
    }
    assert export_composed(drafters, tmp_path / "out", tiny_target(), Drafting("request")) == []
    config = read_json(tmp_path / "out" / "config.json", "a configuration")
    assert config["architectures"] == [ARCHITECTURES["eagle"]]
    assert config["hidden_size"] == 2 * 32
    assert (config["head_dim"], config["num_attention_heads"]) == (8, 4)
    assert Composition.of(config["taps_hf"]) == Composition(
        names=("math", "chat"),
        hidden_size=32,
        draft_vocab_sizes=(3, 2),
        fc_biases=(True, False),
        input_norm=False,
        qkv_bias=False,
        drafting=Drafting("request", lookup=False),
        target=None,
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for k, drafter in enumerate(drafters.values()):
        state = drafter.state_dict()
        assert {name for name in tensors if name.startswith(f"drafters.{k}.")} == {
            f"drafters.{k}.{name.removeprefix('trunk.')}" for name in state
        }
        for name, x in state.items():
            assert torch.equal(tensors[f"drafters.{k}.{name.removeprefix('trunk.')}"], x)
    assert "math, chat" in (tmp_path / "out" / "README.md").read_text()
    broken = {**tensors, "drafters.1.fc.weight": tensors["drafters.0.fc.weight"].clone()}
    save_file(broken, tmp_path / "out" / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"reads back otherwise: \['drafters\.1\.fc\.weight'\]"):
        check_composed(tmp_path / "out", drafters)


def test_one_drafter_is_a_composition_too():
    (drafter,) = tiny_drafters(1)
    written = compose({"only": drafter}, tiny_target(), dtype=torch.bfloat16)
    assert written.config["hidden_size"] == 32
    assert written.config["dtype"] == "bfloat16"
    assert written.config["taps_hf"]["draft_vocab_sizes"] is None
    assert written.tensors["drafters.0.fc.weight"].dtype == torch.bfloat16
    assert "all tokens of the target are scored" in written.notes[0]


def test_a_window_is_not_kept_without_a_word():
    written = compose({"near": made(1, context_window=4)}, tiny_target())
    assert any("context windows of near have no place" in note for note in written.notes)


def made3(seed: int, **settings: object) -> Eagle3Drafter:
    settings = {"draft_token_ids": 12, "layer_ids": [1, 2], **settings}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Eagle3Drafter.from_target(tiny_target(), **settings)


def test_eagle3_in_a_folder(tmp_path):
    """Layers that any of them reads are what vLLM is asked for; whose they are is said beside."""
    drafters = {"math": made3(1, layer_ids=[2, 1]), "chat": made3(2, draft_token_ids=10)}
    assert export_composed(drafters, tmp_path / "out", tiny_target()) == []
    config = read_json(tmp_path / "out" / "config.json", "a configuration")
    assert config["architectures"] == [ARCHITECTURES["eagle3"]]
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2]
    found = Composition.of(config["taps_hf"])
    assert found.draft_vocab_sizes == (12, 10)
    assert (found.method, found.fc_biases) == ("eagle3", (False, False))
    assert found.eagle3 == Dialect(((2, 1), (1, 2)), False, False, False, False, False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["drafters.1.lm_head.weight"], drafters["chat"].lm_head.weight)
    assert '"method": "eagle3"' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm_output": True}, r"differ in norm_output \(False and True\)"),
        ({"fc_norm": True}, r"differ in fc_norm \(False and True\)"),
        ({"family": "qwen3"}, r"differ in qk_norm \(False and True\)"),
        ({"layer_ids": [1]}, r"differ in the number of layers they read \(2 and 1\)"),
        ({"draft_token_ids": None}, r"differ in a draft vocabulary \(True and False\)"),
    ],
)
def test_dialects_do_not_mix(settings, message):
    with pytest.raises(ValueError, match=message):
        compose({"a": made3(1), "b": made3(2, **settings)}, tiny_target())


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda: made(1), "'a' and 'b' have the same weights"),
        (lambda: made3(2), "of the kinds EagleDrafter and Eagle3Drafter, expected one kind"),
        (lambda: made(2, input_norm=True), r"differ in input_norm \(False and True\)"),
        (lambda: made(2, draft_token_ids=3), r"differ in a draft vocabulary \(False and True\)"),
        (
            lambda: made(2, target_name_or_path="somebody/other"),
            r"two targets \(`target_name_or_path` 'me/target' and 'somebody/other'\)",
        ),
        (
            lambda: made(2, tokenizer_fingerprint="b" * 16),
            r"two targets \(`tokenizer_fingerprint` 'aaaaaaaaaaaaaaaa' and 'bbbb",
        ),
    ],
)
def test_what_is_refused(tmp_path, second, message):
    first = made(1, target_name_or_path="me/target", tokenizer_fingerprint="a" * 16)
    with pytest.raises(ValueError, match=message):
        export_composed({"a": first, "b": second()}, tmp_path / "out", tiny_target())
    assert not list(tmp_path.iterdir())


def test_a_target_may_lie_elsewhere_under_its_name():
    names = ("hub/target", "/somewhere/target")
    drafters = {name: made(i, target_name_or_path=name) for i, name in enumerate(names)}
    assert compose(drafters, tiny_target()).config["taps_hf"]["target"] == "hub/target"


def test_families_that_cannot_be_served(tmp_path):
    (drafter,) = tiny_drafters(1, family="qwen3")
    with pytest.raises(ValueError, match="'a' cannot be served by the plugin: its layer is of the"):
        export_composed({"a": drafter}, tmp_path / "out", tiny_target("qwen3"))
    with pytest.raises(ValueError, match="A drafter is called 'lookup'"):
        compose({"lookup": made(1)}, tiny_target(), Drafting("draft"))
    with pytest.raises(ValueError, match="no drafters to compose"):
        compose({}, tiny_target())


def test_how_they_draft():
    assert [Drafting(routing).lookup for routing in ("token", "draft")] == [False, True]
    for wrong, message in (
        ({"routing": "cycle"}, "`routing` is 'cycle', expected 'token', 'draft' or"),
        ({"stop_below": 1}, "`stop_below` is 1, expected from 0 to below 1"),
        ({"lookup": True}, "`lookup` goes with `routing` 'draft', not with 'token'"),
    ):
        with pytest.raises(ValueError, match=message):
            Drafting(**wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (None, "is None, expected a composition of format 2"),
        ({"format": 1}, "expected a composition of format 2"),
        ({"format": 2, "drafting": {"speed": 1}}, "unexpected keyword argument 'speed'"),
        ({"format": 2, "colour": "red"}, "unexpected keyword argument 'colour'"),
        (
            {"format": 2, "eagle3": {"layer_ids": [[1]]}},
            "missing 5 required positional arguments: 'norm_before_residual'",
        ),
        ({"format": 2}, "missing 6 required positional arguments"),
    ],
)
def test_configurations_of_something_else(fields, message):
    with pytest.raises(ValueError, match=message):
        Composition.of(fields)
