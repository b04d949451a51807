"""Every format that is read: a folder as others write it, compared with the obvious forward."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import torch

import taps_hf
from taps_hf import Eagle3Drafter, EagleDrafter, load_drafter

from ..drafters import reference
from ..tiny import tiny_drafters, tiny_eagle3
from . import foreign
from .foreign import EAGLE3_CONFIG, EAGLE_CONFIG, SPECULATORS_CONFIG, TOKENS, VOCAB, WIDTH


def slots(count: int = 5, features: int = 1) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Embeddings of the target's tokens, and states of some of its layers, (n, hidden) each."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCAB, (count,), generator=generator)
    states = [torch.randn(count, WIDTH, generator=generator) for _ in range(features)]
    return foreign.target().get_input_embeddings().weight.detach()[tokens], states


def same_as_eagle(drafter, tensors, shape=foreign.EAGLE_SHAPE) -> None:
    assert type(drafter) is EagleDrafter
    embeds, (features,) = slots()
    with torch.no_grad():
        found = drafter(embeds[None], features[None]).last_hidden_state[0]
    wanted = reference.eagle(tensors, shape, embeds, features)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def same_as_eagle3(drafter, tensors, shape=foreign.EAGLE3_SHAPE, tokens=TOKENS) -> None:
    assert type(drafter) is Eagle3Drafter
    embeds, states = slots(features=len(drafter.config.layer_ids))
    with torch.no_grad():
        fused = drafter.fuse(torch.cat(states, dim=1)[None])
        first = drafter(embeds[None], fused).last_hidden_state
        again = drafter(embeds[None], first).last_hidden_state  # a dialect feeds back otherwise
        found = drafter.scores(again)[0]
    read = reference.fuse(tensors, shape, states)
    wanted = reference.eagle3(tensors, shape, embeds, read)
    wanted = reference.eagle3(tensors, shape, embeds, wanted)
    wanted = reference.eagle3_logits(tensors, shape, wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert drafter.draft_token_ids.tolist() == list(tokens)


@pytest.mark.parametrize("prefix", ["", "model.", "module.draft_model."])
@pytest.mark.parametrize("how", ["safetensors", "shards", "pickle"])
@pytest.mark.parametrize("bias", [False, True])
def test_eagle2_heads(tmp_path, prefix, how, bias):
    tensors = foreign.eagle(bias=bias)
    named = {prefix + name: x for name, x in tensors.items()}
    named["model.rotary_emb.inv_freq"] = torch.ones(4)
    named["lm_head.weight"] = foreign.target().lm_head.weight.detach().clone()
    foreign.write(tmp_path, named, EAGLE_CONFIG, how)
    drafter = load_drafter(str(tmp_path), foreign.target(), pickles=True)
    same_as_eagle(drafter, tensors)
    assert drafter.config.fc_bias == bias
    assert drafter.config.layer_config["max_position_embeddings"] == 512  # the target's
    assert set(drafter.state_dict()) == {
        name.replace("layers.", "trunk.layers.") for name in tensors if "embed" not in name
    }
    assert not drafter.training


def test_qwen2_heads(tmp_path):
    tensors = foreign.eagle(qkv_bias=True)
    foreign.write(tmp_path, tensors, {**EAGLE_CONFIG, "qkv_bias": True})
    drafter = load_drafter(str(tmp_path), foreign.target())
    assert drafter.trunk.config.model_type == "qwen2"
    same_as_eagle(drafter, tensors)


@pytest.mark.parametrize(("said", "bias"), [(False, True), (True, False)])
def test_the_tensors_are_followed_where_the_configuration_lies(tmp_path, said, bias):
    tensors = foreign.eagle(bias=bias)
    foreign.write(tmp_path, tensors, {**EAGLE_CONFIG, "bias": said})
    with pytest.warns(UserWarning, match=f"says `bias` {said}"):
        drafter = load_drafter(str(tmp_path), foreign.target())
    same_as_eagle(drafter, tensors)


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({"rope_theta": 500.0}, 500.0),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}, "rope_theta": 1.0},
            700.0,
        ),
        ({"rope_scaling": None}, 10000.0),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rope_theta": 9.0}, 9.0),
    ],
    ids=str,
)
def test_rotary_positions_in_either_spelling(tmp_path, fields, theta):
    tensors = foreign.eagle(embedding=False)
    foreign.write(tmp_path, tensors, {**EAGLE_CONFIG, **fields})
    drafter = load_drafter(str(tmp_path), foreign.target())
    same_as_eagle(drafter, tensors, replace(foreign.EAGLE_SHAPE, theta=theta))


def test_what_speculators_once_wrote_of_hass(tmp_path):
    tensors = foreign.eagle(bias=True, embedding=False)
    named = {
        name.replace("fc.", "fusion_fc.").replace("layers.0.", "transformer."): x
        for name, x in tensors.items()
    }
    config = {
        "speculators_model_type": "eagle",
        "transformer_layer_architecture": "LlamaDecoderLayer",
        "transformer_layer_config": EAGLE_CONFIG,
        "layernorms": False,
        "fusion_bias": True,
    }
    foreign.write(tmp_path / "a-hass-head", named, config)
    drafter = load_drafter(str(tmp_path / "a-hass-head"), foreign.target())
    same_as_eagle(drafter, tensors)
    assert drafter.config.backbone == "hass"


@pytest.mark.parametrize("prefix", ["midlayer.", "layers.0."])
@pytest.mark.parametrize("how", ["safetensors", "shards", "pickle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eagle3_heads(tmp_path, prefix, how, dtype):
    tensors = foreign.eagle3(prefix)
    foreign.write(tmp_path, tensors, EAGLE3_CONFIG, how, dtype)
    drafter = load_drafter(str(tmp_path), foreign.target(), pickles=True)
    assert drafter.dtype == dtype
    assert drafter.config.layer_ids == [2, 4, 5]
    if dtype == torch.float32:
        same_as_eagle3(drafter, tensors)


@pytest.mark.parametrize(
    ("extra", "config", "shape"),
    [
        ({}, {"norm_before_residual": True}, {"norm_before_residual": True}),
        ({f"fc_norm.{i}.weight": (WIDTH,) for i in range(3)}, {"fc_norm": True}, {}),
        ({"input_norm.weight": (3 * WIDTH,)}, {"norm_before_fc": True}, {}),
        ({}, {"norm_output": True}, {"norm_output": True}),
        (
            {f"midlayer.self_attn.{n}_proj.bias": (s,) for n, s in zip("qkvo", (32, 16, 16, 32))},
            {"attention_bias": True},
            {},
        ),
        ({f"midlayer.self_attn.{n}_norm.weight": (8,) for n in "qk"}, {}, {}),
    ],
    ids=["residual", "fc_norm", "input_norm", "norm_output", "attention_bias", "qwen3"],
)
@pytest.mark.filterwarnings("ignore:.*norm_output.*")
def test_dialects_of_eagle3(tmp_path, extra, config, shape):
    tensors = foreign.eagle3(extra=extra)
    foreign.write(tmp_path, tensors, {**EAGLE3_CONFIG, **config})
    drafter = load_drafter(str(tmp_path), foreign.target())
    same_as_eagle3(drafter, tensors, replace(foreign.EAGLE3_SHAPE, **shape))


def test_the_legacy_names_of_norms(tmp_path):
    tensors = foreign.eagle3(extra={f"fc_norm.{i}.weight": (WIDTH,) for i in range(3)})
    legacy = dict(zip(("fc_norm.0.", "fc_norm.1.", "fc_norm.2."), ("low", "mid", "high")))
    named = {}
    for name, x in tensors.items():
        start = next((s for s in legacy if name.startswith(s)), None)
        named[name if start is None else f"aux_norm_{legacy[start]}.weight"] = x
    foreign.write(tmp_path, named, {**EAGLE3_CONFIG, "use_aux_norm": True})
    same_as_eagle3(load_drafter(str(tmp_path), foreign.target()), tensors)


def test_heads_of_another_size_than_their_share(tmp_path):
    tensors = foreign.eagle3(size=16)
    foreign.write(tmp_path, tensors, {**EAGLE3_CONFIG, "head_dim": 16})
    drafter = load_drafter(str(tmp_path), foreign.target())
    same_as_eagle3(drafter, tensors, replace(foreign.EAGLE3_SHAPE, head_size=16))


@pytest.mark.parametrize(
    ("config", "given", "wanted"),
    [
        ({}, None, [2, 4, 5]),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 8]}, None, [1, 3, 8]),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 7]}}, None, [2, 4, 8]),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 7]}}, [1, 3, 7], [1, 3, 7]),
        ({"eagle_config": {"use_aux_hidden_state": True}}, None, [2, 4, 5]),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*as SGLang reads them.*")
def test_ids_of_layers_in_either_convention(tmp_path, config, given, wanted):
    foreign.write(tmp_path, foreign.eagle3(), {**EAGLE3_CONFIG, **config})
    drafter = load_drafter(str(tmp_path), foreign.target(), layer_ids=given)
    assert drafter.config.layer_ids == wanted
    assert drafter.reads_layers == tuple(layer - 1 for layer in wanted)


def test_an_ambiguous_convention_is_warned_of(tmp_path):
    ids = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 7]}}
    foreign.write(tmp_path, foreign.eagle3(), {**EAGLE3_CONFIG, **ids})
    with pytest.warns(UserWarning, match=r"hidden_states \[2, 4, 8\].*vLLM would read"):
        load_drafter(str(tmp_path), foreign.target())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_speculators(tmp_path, family):
    extra = {f"layers.0.self_attn.{n}_norm.weight": (8,) for n in "qk"} if family == "qwen3" else {}
    tensors = foreign.eagle3("layers.0.", extra=extra)
    layer = {**SPECULATORS_CONFIG["transformer_layer_config"], "model_type": family}
    foreign.write(tmp_path, tensors, {**SPECULATORS_CONFIG, "transformer_layer_config": layer})
    drafter = load_drafter(str(tmp_path), foreign.target())
    assert drafter.trunk.config.model_type == family
    same_as_eagle3(drafter, tensors, replace(foreign.EAGLE3_SHAPE, norm_before_residual=True))


def test_more_layers_than_three(tmp_path):
    tensors = foreign.eagle3(features=4)
    ids = {"eagle_aux_hidden_state_layer_ids": [1, 3, 5, 7]}
    foreign.write(tmp_path, tensors, {**EAGLE3_CONFIG, **ids})
    same_as_eagle3(load_drafter(str(tmp_path), foreign.target()), tensors)


def test_draft_vocabularies_in_any_order_are_sorted_with_their_rows(tmp_path):
    tensors = foreign.eagle3()
    order = torch.randperm(len(TOKENS), generator=torch.Generator().manual_seed(1))
    mixed = dict(tensors)
    mixed["lm_head.weight"] = tensors["lm_head.weight"][order]
    mixed["d2t"] = torch.tensor(TOKENS)[order] - torch.arange(len(TOKENS))
    foreign.write(tmp_path, mixed, EAGLE3_CONFIG)
    same_as_eagle3(load_drafter(str(tmp_path), foreign.target()), tensors)


@pytest.mark.parametrize("without", ["d2t", "t2d"])
@pytest.mark.filterwarnings("ignore:.*there is no d2t.*")
def test_one_of_both_maps_is_enough(tmp_path, without):
    tensors = foreign.eagle3()
    some = {name: x for name, x in tensors.items() if name != without}
    foreign.write(tmp_path, some, EAGLE3_CONFIG)
    same_as_eagle3(load_drafter(str(tmp_path), foreign.target()), tensors)


@pytest.mark.parametrize("maps", ["none", "identity"])
def test_heads_over_the_whole_vocabulary(tmp_path, maps):
    tensors = foreign.eagle3()
    tensors["lm_head.weight"] = foreign.random((VOCAB, WIDTH), 50)
    del tensors["d2t"], tensors["t2d"]
    if maps == "identity":  # all zeros are offsets of nothing, and not nothing
        tensors["d2t"] = torch.zeros(VOCAB, dtype=torch.long)
        tensors["t2d"] = torch.ones(VOCAB, dtype=torch.bool)
    foreign.write(tmp_path, tensors, {**EAGLE3_CONFIG, "draft_vocab_size": VOCAB})
    drafter = load_drafter(str(tmp_path), foreign.target())
    assert drafter.draft_token_ids is None
    drafter.draft_token_ids = torch.arange(VOCAB)
    same_as_eagle3(drafter, tensors, tokens=range(VOCAB))


def test_identity_offsets_with_a_small_head(tmp_path):
    """Zeros of a map that nobody filled in are the first tokens, as engines read them."""
    tensors = foreign.eagle3()
    tensors["d2t"] = torch.zeros(len(TOKENS), dtype=torch.long)
    tensors["t2d"] = torch.ones(VOCAB, dtype=torch.bool)
    foreign.write(tmp_path, tensors, EAGLE3_CONFIG)
    same_as_eagle3(load_drafter(str(tmp_path), foreign.target()), tensors, tokens=range(10))


def test_ours_are_loaded_too(tmp_path):
    target = foreign.target()
    torch.manual_seed(0)
    for drafter in (
        EagleDrafter.from_target(target),
        Eagle3Drafter.from_target(target, layer_ids=[2]),
    ):
        drafter.save_pretrained(tmp_path / type(drafter).__name__)
        loaded = load_drafter(str(tmp_path / type(drafter).__name__), target)
        assert type(loaded) is type(drafter)
        assert loaded.digest() == drafter.digest()


@pytest.mark.parametrize("seed", [None, 3])
def test_assistant_models_by_name(tmp_path, seed):
    """Somebody's EAGLE-2 head, an EAGLE-3 head and one of ours, in one tree, by their folders."""
    target = foreign.target()
    ours = EagleDrafter.from_target(target)
    ours.save_pretrained(tmp_path / "ours")
    names = [
        foreign.write(tmp_path / "eagle", foreign.eagle(), EAGLE_CONFIG),
        str(foreign.write(tmp_path / "eagle3", foreign.eagle3(), EAGLE3_CONFIG)),
        str(tmp_path / "ours"),
    ]
    prompt = torch.randint(0, VOCAB, (1, 7), generator=torch.Generator().manual_seed(2))
    given = {"do_sample": seed is not None, "top_k": 0, "max_new_tokens": 14}
    tree = taps_hf.DynamicTree(depth=3, top_k=6, num_nodes=24)
    outputs = []
    for extra in ({}, {"assistant_models": names}, {"assistant_models": dict(zip("abc", names))}):
        more = {"strategy": "merged", "tree": tree} if extra else {}
        torch.manual_seed(seed or 0)
        found = target.generate(prompt, **given, **extra, **more, return_dict_in_generate=True)
        outputs.append(found)
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert torch.equal(outputs[0].sequences, outputs[2].sequences)
    assert list(outputs[1].draft_trace.drafters) == ["eagle", "eagle3", "ours"]
    assert list(outputs[2].draft_trace.drafters) == ["a", "b", "c"]
    assert outputs[1].draft_trace.accepted_length > 0


def test_a_named_drafter_is_loaded_once(tmp_path, monkeypatch):
    from taps_hf.formats import names

    folder = foreign.write(tmp_path / "eagle", foreign.eagle(), EAGLE_CONFIG)
    once = names.with_loaded([str(folder)], foreign.target())
    assert names.with_loaded(str(folder), foreign.target()) is once[0]
    assert names.with_loaded({"x": folder}, foreign.target()) == {"x": once[0]}
    assert names.with_loaded([*once, None], foreign.target()) == [*once, None]


# What is refused, each with the file, the tensor, what was found and what was expected.


def without(name):
    return lambda tensors, config: tensors.pop(name)


def replaced(name, value):
    return lambda tensors, config: tensors.update({name: value})


def configured(**fields):
    return lambda tensors, config: config.update(fields)


EAGLE_REFUSED = {
    "missing": (
        without("fc.weight"),
        r"no drafter in a known format: there is no matrix fc.weight",
    ),
    "no layer": (
        without("layers.0.mlp.up_proj.weight"),
        r": layers.0.mlp.up_proj.weight is missing, expected \[40, 32\]",
    ),
    "shape": (
        replaced("fc.weight", torch.zeros(WIDTH, 3 * WIDTH)),
        r"model.safetensors: fc.weight is float32 \[32, 96\], expected \[32, 64\]",
    ),
    "integers": (
        replaced("fc.weight", torch.zeros(WIDTH, 2 * WIDTH, dtype=torch.int32)),
        r"fc.weight is int32 \[32, 64\], expected numbers",
    ),
    "unknown": (replaced("strange", torch.zeros(2)), r"strange \(float32 \[2\]\) is not part of"),
    "norms": (
        replaced("embed_layernorm.weight", torch.zeros(WIDTH)),
        "norms of the embedding, the feature and the head",
    ),
    "mistral": (replaced("norm.weight", torch.zeros(WIDTH)), "a final norm"),
    "two layers": (replaced("layers.1.x", torch.zeros(2)), "more than one layer"),
    "embedding": (
        lambda tensors, config: tensors["embed_tokens.weight"].mul_(2),
        r"embed_tokens.weight is not the target's embedding \(24 of 24 rows differ",
    ),
    "another width": (
        replaced("embed_tokens.weight", torch.zeros(VOCAB, 16)),
        r"expected \[24, 32\], the target's embedding",
    ),
    "head": (
        replaced("lm_head.weight", torch.ones(VOCAB, WIDTH)),
        "lm_head.weight is not the target's LM head",
    ),
    "vocabulary": (configured(vocab_size=5000), r"has 5000 tokens, but the target has 24"),
    "two checkpoints": (
        replaced("model.fc.weight", torch.zeros(2)),
        "two checkpoints in one folder",
    ),
    "scales": (replaced("fc.weight_scale", torch.zeros(1)), "quantised drafters are not supported"),
    "quantised": (configured(quantization_config={}), "has a `quantization_config`"),
    "heads": (
        configured(num_attention_heads=8),
        r"k_proj.weight is float32 \[16, 32\], expected \[8",
    ),
    "no heads": (
        configured(num_attention_heads=None),
        "`num_attention_heads` None, expected a posit",
    ),
    "scaling": (
        configured(rope_scaling={"type": "dynamic", "factor": 2}),
        "by 'dynamic', expected",
    ),
    "partly": (configured(partial_rotary_factor=0.5), "rotates a part of each head only"),
    "medusa": (replaced("medusa_heads.0.w", torch.zeros(1)), "holds Medusa heads"),
    "other kinds": (configured(speculators_model_type="dflash"), "'dflash', expected one of eagle"),
}


@pytest.mark.parametrize("name", EAGLE_REFUSED)
def test_eagle2_heads_that_are_refused(tmp_path, name):
    change, message = EAGLE_REFUSED[name]
    tensors, config = foreign.eagle(), dict(EAGLE_CONFIG)
    change(tensors, config)
    foreign.write(tmp_path, tensors, config)
    with pytest.raises(ValueError, match=message):
        load_drafter(str(tmp_path), foreign.target())


EAGLE3_REFUSED = {
    "no maps": (
        lambda tensors, config: [tensors.pop(name) for name in ("d2t", "t2d")],
        r"d2t is missing: lm_head.weight scores 10 tokens, the target has 24",
    ),
    "absolute": (replaced("d2t", torch.tensor(TOKENS)), "d2t and t2d do not name the same tokens"),
    "twice": (
        lambda tensors, config: (tensors.pop("t2d"), tensors["d2t"].copy_(-torch.arange(10))),
        "1 of 10 distinct",
    ),
    "beyond": (
        lambda tensors, config: (tensors.pop("t2d"), tensors["d2t"].add_(20)),
        "tokens from 21 to 43",
    ),
    "short map": (
        replaced("d2t", torch.zeros(3, dtype=torch.long)),
        r"d2t is int64 \[3\], expected",
    ),
    "other vocabulary": (
        replaced("t2d", torch.ones(2000, dtype=torch.bool)),
        "t2d has 2000 tokens",
    ),
    "few chosen": (
        lambda tensors, config: (tensors.pop("d2t"), tensors["t2d"].fill_(False)),
        "t2d chooses 0 tokens, expected 10",
    ),
    "size": (configured(draft_vocab_size=12), "`draft_vocab_size` 12, but the head scores 10"),
    "no fc": (without("fc.weight"), "read the target's last state only"),
    "bias": (replaced("fc.bias", torch.zeros(WIDTH)), "EAGLE-3's projection has no bias"),
    "two layers": (replaced("layers.1.x", torch.zeros(2)), "heads of several layers"),
    "mixed": (replaced("layers.0.mlp.x", torch.zeros(2)), "tensors of midlayer. and layers.0."),
    "peagle": (replaced("mask_hidden", torch.zeros(2)), "P-EAGLE heads"),
    "some biases": (
        replaced("midlayer.self_attn.q_proj.bias", torch.zeros(32)),
        "biases of some of q_proj",
    ),
    "no fc_norm": (configured(fc_norm=True), r"fc_norm.0.weight is missing, expected \[32\]"),
    "no input_norm": (
        configured(eagle_config={"norm_before_fc": True}),
        r"input_norm.weight is missing, expected \[96\]",
    ),
    "norm": (without("norm.weight"), r"norm.weight is missing, expected \[32\]"),
    "features": (
        configured(eagle_aux_hidden_state_layer_ids=[1, 2]),
        r"fc.weight is float32 \[32, 96\], expected \[32, 64\]",
    ),
    "layers": (
        configured(eagle_aux_hidden_state_layer_ids=[1, 2, 9]),
        r"\[1, 2, 9\], expected layers of the target, which has 8",
    ),
    "embedding": (
        replaced("embed_tokens.weight", torch.ones(VOCAB, WIDTH)),
        "has one of its own, which is not supported",
    ),
    "window": (configured(layer_types=["sliding_attention"]), "attend to a window only"),
    "both norms": (
        lambda tensors, config: tensors.update(
            {"input_norm.weight": torch.ones(96)}
            | {f"fc_norm.{i}.weight": torch.ones(32) for i in range(3)}
        ),
        "both true",
    ),
}


@pytest.mark.parametrize("name", EAGLE3_REFUSED)
def test_eagle3_heads_that_are_refused(tmp_path, name):
    change, message = EAGLE3_REFUSED[name]
    tensors, config = foreign.eagle3(), dict(EAGLE3_CONFIG)
    change(tensors, config)
    foreign.write(tmp_path, tensors, config)
    with pytest.raises(ValueError, match=message):
        load_drafter(str(tmp_path), foreign.target())


def test_a_target_of_another_width_is_named(tmp_path):
    config = {
        **EAGLE3_CONFIG,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    foreign.write(tmp_path, foreign.eagle3(), config)
    with pytest.raises(ValueError, match=r"fc.weight is float32 \[32, 96\], expected \[16, 48\]"):
        load_drafter(str(tmp_path), foreign.target())


ODD_VALUES = [-1, 0, 1.5, "x", [], {}, [1, "a"], {"a": 1}, True, 10**30, float("nan")]
ODD_FIELDS = {*EAGLE_CONFIG, *EAGLE3_CONFIG, *SPECULATORS_CONFIG, "eagle_config", "layer_types"}
ODD_FIELDS |= {"rope_scaling", "rope_parameters", "head_dim", "norm_output", "taps_hf", "bias"}
ODD_FIELDS |= {"eagle_aux_hidden_state_layer_ids", "partial_rotary_factor"}


@pytest.mark.parametrize("field", sorted(ODD_FIELDS))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fields_of_nonsense_raise_nothing_else(tmp_path, field):
    """Read or refused: a file is data, and nobody should have to look at a traceback."""
    read = 0
    for tensors, config in (
        (foreign.eagle(), EAGLE_CONFIG),
        (foreign.eagle3("layers.0."), SPECULATORS_CONFIG),
    ):
        foreign.write(tmp_path, tensors, config)
        for value in ODD_VALUES:
            (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
            with contextlib.suppress(ValueError):
                read += load_drafter(str(tmp_path), foreign.target()) is not None
    if field in ("hidden_size", "num_attention_heads", "transformer_layer_config"):
        assert read < 2 * len(ODD_VALUES)


@pytest.mark.parametrize("shape", [(), (2,), (1, 1, 1), (0, 4)], ids=str)
def test_tensors_of_odd_shapes_are_refused(tmp_path, shape):
    for tensors, config in ((foreign.eagle(), EAGLE_CONFIG), (foreign.eagle3(), EAGLE3_CONFIG)):
        for name, x in tensors.items():
            foreign.write(tmp_path, {**tensors, name: torch.zeros(shape, dtype=x.dtype)}, config)
            with pytest.raises(ValueError, match=r"\w"):
                load_drafter(str(tmp_path), foreign.target())


@pytest.mark.parametrize("how", ["safetensors", "pickle"])
def test_files_that_are_cut_off(tmp_path, how):
    foreign.write(tmp_path, foreign.eagle(), EAGLE_CONFIG, how)
    (file,) = (f for f in tmp_path.iterdir() if f.suffix != ".json")
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=file.name):
        load_drafter(str(tmp_path), foreign.target(), pickles=True)


def test_pickles_are_read_only_when_asked_for(tmp_path):
    foreign.write(tmp_path, foreign.eagle(), EAGLE_CONFIG, "pickle")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle, expected safetensors"):
        load_drafter(str(tmp_path), foreign.target())
    with pytest.raises(ValueError, match="taps-hf convert"):
        foreign.target().generate(torch.ones(1, 4).long(), assistant_models=[str(tmp_path)])


class _Evil:
    def __reduce__(self):
        return (open, ("/nonexistent/written", "w"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fc.weight": _Evil()}, "cannot be read as plain tensors"),
        ([torch.ones(2)], "does not hold named tensors only"),
        ({"fc.weight": 3}, "does not hold named tensors only"),
        ({"fc.weight": torch.ones(1, 1).expand(10**6, 10**6)}, "larger than what is stored"),
    ],
    ids=["code", "list", "number", "expanded"],
)
def test_pickles_of_anything_else_are_refused(tmp_path, content, message):
    foreign.write(tmp_path, {}, EAGLE_CONFIG, "pickle")
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        load_drafter(str(tmp_path), foreign.target(), pickles=True)


def test_folders_without_anything(tmp_path):
    with pytest.raises(OSError, match=r"config.json"):
        load_drafter(str(tmp_path), foreign.target())
    (tmp_path / "config.json").write_text(json.dumps(EAGLE_CONFIG))
    with pytest.raises(OSError, match="no weights that can be read"):
        load_drafter(str(tmp_path), foreign.target())
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        load_drafter(str(tmp_path), foreign.target())


def test_a_whole_language_model_is_no_drafter(tmp_path):
    foreign.target().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no drafter in a known format"):
        load_drafter(str(tmp_path), foreign.target())


def test_overrides_are_for_heads_that_have_two_meanings(tmp_path):
    foreign.write(tmp_path / "eagle", foreign.eagle(), EAGLE_CONFIG)
    with pytest.raises(ValueError, match="reads the target's last states"):
        load_drafter(str(tmp_path / "eagle"), foreign.target(), layer_ids=[1])
    tiny_eagle3()[0].save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="has no two meanings"):
        load_drafter(str(tmp_path / "ours"), foreign.target(), norm_output=True)


def test_drafters_of_other_targets_are_refused(tmp_path):
    tiny_drafters(1)[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`vocab_size` 16, but the target's is 24"):
        load_drafter(str(tmp_path), foreign.target())
