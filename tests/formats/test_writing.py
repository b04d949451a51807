"""What is written for engines: by name and shape, read by an obvious forward, and read back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from taps_hf import Eagle3Drafter, EagleDrafter, load_drafter
from taps_hf.exchange import export
from taps_hf.formats import writing
from taps_hf.formats.writing import ENGINES, written_as

from ..drafters import reference
from ..drafters.test_modeling_eagle3 import shape_of
from ..tiny import DIALECTS
from . import foreign
from .foreign import HEADS, SHARED, TOKENS, VOCAB, WIDTH


def eagle(**settings) -> EagleDrafter:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        settings = {"layer_config": _plain_layer(), **settings}
        config = EagleDrafter.config_class(
            hidden_size=WIDTH, vocab_size=VOCAB, target_name_or_path="somebody/target", **settings
        )
        return EagleDrafter(config).eval()


def _plain_layer(**fields) -> dict:
    config = EagleDrafter.from_target(foreign.target()).config
    return {**config.layer_config, **fields}


def eagle3(dialect: str = "original", tokens=TOKENS, **settings) -> Eagle3Drafter:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        given = {**DIALECTS[dialect], **settings}
        ids = None if tokens is None else torch.tensor(tokens)
        drafter = Eagle3Drafter.from_target(foreign.target(), ids, **given)
        for name, weight in drafter.named_parameters():
            if "norm" in name:
                weight.data.uniform_(0.5, 1.5)
    return drafter.eval()


def exported(drafter, to: str, folder) -> tuple[dict, dict]:
    export(drafter, folder, foreign.target(), to)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


SERVED = [("eagle", False), ("eagle", True), ("sglang", False), ("sglang", True), ("vllm", False)]


@pytest.mark.parametrize(("to", "bias"), SERVED)
def test_eagle2_heads_by_an_obvious_forward(tmp_path, to, bias):
    """The file's own tensors and configuration say what the drafter computes."""
    drafter = eagle(fc_bias=bias, backbone="hass")
    config, tensors = exported(drafter, to, tmp_path / "out")
    assert "head_dim" in config
    shape = reference.Shape(
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
        config["rms_norm_eps"],
        config["rope_theta"],
    )
    embeds, features = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = drafter(embeds[None], features[None]).last_hidden_state[0]
    wanted = reference.eagle(tensors, shape, embeds, features)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    wanted = set(foreign.eagle(bias=bias, embedding=to == "eagle"))
    assert set(tensors) == wanted | ({"fc.bias"} if to == "sglang" else set())
    assert config["bias"] == ("fc.bias" in tensors)
    assert config["max_position_embeddings"] == 512
    assert config["tie_word_embeddings"] is False
    assert config["architectures"] == [
        "LlamaForCausalLMEagle" if to == "sglang" else "LlamaForCausalLM"
    ]
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"]


@pytest.mark.parametrize("to", ["eagle", "sglang", "vllm"])
def test_what_was_written_reads_back_as_it_was(tmp_path, to):
    """Draft vocabulary, method and training data included: under a key that engines ignore."""
    drafter = eagle(backbone="hass", draft_vocab_size=3, training_data=["sums"])
    drafter.score_only(torch.tensor([7, 2, 11]))
    export(drafter, tmp_path / "out", foreign.target(), to)
    found = load_drafter(str(tmp_path / "out"), foreign.target())
    assert found.draft_token_ids.tolist() == [7, 2, 11]
    assert (found.config.backbone, found.config.training_data) == ("hass", ["sums"])
    expected = drafter.state_dict()
    state = found.state_dict()
    if to == "sglang":
        assert not state.pop("fc.bias").any()
    assert set(state) == set(expected)
    assert all(torch.equal(x, expected[name]) for name, x in state.items())


def test_sglang_gets_the_draft_vocabulary_as_a_file(tmp_path):
    drafter = eagle(draft_vocab_size=3)
    drafter.score_only(torch.tensor([7, 2, 11]))
    notes = export(drafter, tmp_path / "out", foreign.target(), "sglang")
    tokens = torch.load(tmp_path / "out" / "token_map.pt", weights_only=True)
    assert tokens.tolist() == [7, 2, 11]
    assert any("--speculative-token-map" in note for note in notes)
    assert "--speculative-token-map" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("to", ["eagle", "vllm"])
def test_a_draft_vocabulary_without_a_place_is_told(tmp_path, to):
    drafter = eagle(draft_vocab_size=3)
    (note,) = export(drafter, tmp_path / "out", foreign.target(), to)
    assert "draft vocabulary of 3 tokens has no place" in note


@pytest.mark.parametrize("to", ENGINES)
def test_a_window_without_a_place_is_told(tmp_path, to):
    drafter = eagle3(context_window=4)
    notes = export(drafter, tmp_path / "out", foreign.target(), to)
    assert any("the context windows of the drafter have no place there" in note for note in notes)


@pytest.mark.parametrize("to", ENGINES)
@pytest.mark.parametrize("tokens", [TOKENS, None], ids=["draft vocabulary", "whole"])
def test_eagle3_heads_by_an_obvious_forward(tmp_path, to, tokens):
    drafter = eagle3(tokens=tokens)
    config, tensors = exported(drafter, to, tmp_path / "out")
    layer = config.get("transformer_layer_config", config)
    shape = reference.Shape(
        layer["num_attention_heads"],
        layer["num_key_value_heads"],
        layer["head_dim"],
        layer["rms_norm_eps"],
        layer["rope_parameters"]["rope_theta"],
    )
    assert shape == shape_of(drafter)
    generator = torch.Generator().manual_seed(0)
    embeds, low, mid, high = torch.randn(4, 5, WIDTH, generator=generator)
    with torch.no_grad():
        fused = drafter.fuse(torch.cat([low, mid, high], dim=1)[None])
        found = drafter.scores(drafter(embeds[None], fused).last_hidden_state)[0]
    out = reference.eagle3(tensors, shape, embeds, reference.fuse(tensors, shape, [low, mid, high]))
    wanted = reference.eagle3_logits(tensors, shape, out)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    prefix = "layers.0." if to == "speculators" else "midlayer."
    maps = set() if to == "speculators" and tokens is None else {"d2t", "t2d"}
    copied = {"embed_tokens.weight"} if to == "speculators" else set()
    assert set(tensors) == (foreign.eagle3(prefix).keys() - {"d2t", "t2d"}) | maps | copied
    if maps:
        ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
        assert ids.tolist() == (list(range(VOCAB)) if tokens is None else tokens)
        assert tensors["t2d"].nonzero().flatten().tolist() == ids.tolist()
        assert (tensors["d2t"].diff() >= 0).all()
    assert config["draft_vocab_size"] == len(tokens or range(VOCAB))


def test_layers_in_each_engines_convention(tmp_path):
    drafter = eagle3(layer_ids=[1, 4, 7])
    written = {to: written_as(to, drafter, foreign.target()).config for to in list(ENGINES)[1:]}
    inner = written["sglang"]["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert inner == [0, 3, 6]
    assert "eagle_aux_hidden_state_layer_ids" not in written["sglang"]
    for to in ("vllm", "speculators", "llama.cpp"):
        assert written[to]["eagle_aux_hidden_state_layer_ids"] == [1, 4, 7]
    for to in written:
        export(drafter, tmp_path / to, foreign.target(), to)
        assert load_quietly(tmp_path / to).config.layer_ids == [1, 4, 7]


def load_quietly(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taps_hf.loading.warn_of", lambda *_: None)
        return load_drafter(str(folder), foreign.target())


CAN = (
    {("sglang", dialect) for dialect in ("original", "norm_output", "fc_norm", "norm_before_fc")}
    | {("vllm", dialect) for dialect in DIALECTS if dialect != "qwen3"}
    | {("speculators", dialect) for dialect in DIALECTS}
    | {("llama.cpp", dialect) for dialect in ("original", "norm_before_residual", "norm_before_fc")}
    | {("eagle", "original")}
)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("to", ENGINES)
def test_dialects_are_written_where_they_are_served(tmp_path, to, dialect):
    residual = {"norm_before_residual": False} if to == "sglang" and "fc" in dialect else {}
    drafter = eagle3(dialect, **residual)
    if (to, dialect) not in CAN:
        with pytest.raises(ValueError, match=f"cannot be exported to {to}: "):
            written_as(to, drafter, foreign.target())
        return
    export(drafter, tmp_path / "out", foreign.target(), to)
    found = load_quietly(tmp_path / "out")
    assert found.digest() == drafter.digest()
    assert found.trunk.config.model_type == drafter.trunk.config.model_type


REFUSED = [
    ("vllm", lambda: eagle(fc_bias=True), "its projection has a bias"),
    ("eagle", lambda: eagle(input_norm=True), "normalises the layer's input"),
    ("sglang", lambda: eagle(input_norm=True), "normalises the layer's input"),
    ("vllm", lambda: eagle(input_norm=True), "normalises the layer's input"),
    (
        "vllm",
        lambda: eagle(layer_config=_plain_layer(model_type="qwen3")),
        "is of the family 'qwen3', and only those of llama, mistral",
    ),
    ("eagle", lambda: eagle(layer_config=_plain_layer(head_dim=16)), "heads have size 16"),
    ("eagle", lambda: eagle(layer_config=_plain_layer(hidden_act="gelu")), "its MLP has 'gelu'"),
    ("eagle", lambda: eagle(layer_config=_plain_layer(mlp_bias=True)), "its MLP has biases"),
    (
        "eagle",
        lambda: eagle(layer_config=_plain_layer(attention_bias=True)),
        "its attention has a bias on the output",
    ),
    (
        "eagle",
        lambda: eagle(
            layer_config=_plain_layer(
                rope_parameters={
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": 256,
                }
            )
        ),
        "scaled by 'yarn', which it has not",
    ),
    ("eagle", lambda: eagle3(layer_ids=[1, 4, 5]), r"hidden_states \[1, 4, 5\], and the original"),
    ("sglang", lambda: eagle3(layer_ids=[4]), "reads one layer only"),
    ("vllm", lambda: eagle3(layer_ids=[5, 4, 2]), "vLLM sorts them"),
    ("speculators", lambda: eagle3(layer_ids=[2, 2, 5]), "vLLM sorts them"),
    ("sglang", lambda: eagle3("norm_before_residual"), "SGLang's layer has not"),
    ("vllm", lambda: eagle3("qwen3"), "expected `speculators`"),
    ("eagle", lambda: eagle3("fc_norm"), r"dialect that the original has not \(fc_norm\)"),
    ("speculators", eagle, "no place for a drafter of the kind EagleDrafter"),
    ("llama.cpp", lambda: eagle3("fc_norm"), r"dialect that llama.cpp has not \(fc_norm\)"),
    ("llama.cpp", lambda: eagle3(layer_ids=[4, 5]), "reads 2 layers, and llama.cpp's three"),
    ("llama.cpp", lambda: eagle3("qwen3"), "is of the family 'qwen3'"),
    ("llama.cpp", lambda: eagle3(layer_ids=[2, 4, 8]), r"\[2, 4, 8\], of which llama.cpp has"),
    ("tensorrt", eagle, "`to` is 'tensorrt', expected one of eagle, sglang, vllm, speculators, "),
]


@pytest.mark.parametrize(("to", "make", "reason"), REFUSED)
def test_what_an_engine_cannot_serve_is_refused_with_the_reason(tmp_path, to, make, reason):
    with pytest.raises(ValueError, match=reason):
        export(make(), tmp_path / "out", foreign.target(), to)
    assert not (tmp_path / "out").exists()


def test_llama_cpp_has_no_states_of_some_families_layers():
    target = copy.deepcopy(foreign.target())
    target.config.model_type = "qwen2"
    with pytest.raises(ValueError, match="its target is of the family 'qwen2', of whose layers"):
        written_as("llama.cpp", eagle3(), target)


def test_qwen2_heads_are_served_by_two(tmp_path):
    drafter = eagle(layer_config=_plain_layer(model_type="qwen2"))
    torch.nn.init.normal_(drafter.trunk.layers[0].self_attn.q_proj.bias)
    config, tensors = exported(drafter, "sglang", tmp_path / "sglang")
    assert config["architectures"] == ["Qwen2ForCausalLMEagle"]
    assert torch.equal(
        tensors["layers.0.self_attn.q_proj.bias"], drafter.trunk.layers[0].self_attn.q_proj.bias
    )
    assert exported(drafter, "eagle", tmp_path / "eagle")[0]["qkv_bias"] is True
    with pytest.raises(ValueError, match="family 'qwen2'"):
        written_as("vllm", drafter, foreign.target())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_written_in_the_dtype_asked_for(tmp_path, dtype):
    export(eagle3(), tmp_path / "out", foreign.target(), "vllm", dtype)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {dtype, torch.int64, torch.bool}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("name", ["fc.weight", "midlayer.mlp.up_proj.weight", "lm_head.weight"])
def test_a_folder_that_reads_back_otherwise_is_not_written(tmp_path, name, monkeypatch):
    original = writing.save_file

    def damaged(tensors, *args, **kwargs):
        tensors[name][0] += 1.0
        original(tensors, *args, **kwargs)

    monkeypatch.setattr(writing, "save_file", damaged)
    with pytest.raises(RuntimeError, match="reads back otherwise"):
        export(eagle3(), tmp_path / "out", foreign.target(), "vllm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["eagle", "sglang"])
def test_what_it_costs_is_the_drafters_alone(to):
    """Copies of the target's are in the reference's format alone."""
    written = written_as(to, eagle(), foreign.target())
    assert ("embed_tokens.weight" in written.tensors) == (to == "eagle")
    assert "lm_head.weight" not in written.tensors
    assert (written.config["num_attention_heads"], written.config["num_key_value_heads"]) == (
        HEADS,
        SHARED,
    )
