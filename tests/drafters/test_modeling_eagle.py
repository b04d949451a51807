from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, DynamicCache, GPT2Config, GPT2LMHeadModel

from taps_hf import EagleDrafter

from ..tiny import FAMILIES, VOCAB, tiny_drafters, tiny_target


def inputs(length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    embeds, features = torch.randn(2, 1, length, 32, generator=generator)
    return embeds, features


def output(drafter: EagleDrafter) -> torch.Tensor:
    embeds, features = (x.to(drafter.dtype) for x in inputs())
    with torch.no_grad():
        return drafter(embeds, features).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("load", [EagleDrafter.from_pretrained, AutoModel.from_pretrained])
def test_save_and_load(tmp_path, family, dtype, load):
    drafter = EagleDrafter.from_target(tiny_target(family, dtype)).eval()
    drafter.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype="auto")
    assert type(loaded) is EagleDrafter
    assert not loaded.training
    assert loaded.dtype == dtype
    expected = drafter.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == dtype
        assert torch.equal(weight, expected[name])
    assert torch.equal(output(loaded), output(drafter))


def test_the_checkpoint_holds_only_what_the_target_lacks(tmp_path):
    (drafter,) = tiny_drafters(1)
    drafter.save_pretrained(tmp_path)
    assert {x.suffix for x in tmp_path.iterdir()} == {".json", ".safetensors"}
    weights = load_file(tmp_path / "model.safetensors")
    # The projection and one decoder layer: no embedding, no head, no final norm.
    assert {name for name in weights if not name.startswith("trunk.layers.0.")} == {"fc.weight"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "taps_eagle"
    assert config["vocab_size"] == VOCAB
    assert not drafter.config.tie_word_embeddings


def rewrite(path, change) -> None:
    file = path / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def lose(weights):
    del weights["fc.weight"]


def add(weights):
    weights["lm_head.weight"] = torch.zeros(VOCAB, 32)


def reshape(weights):
    weights["fc.weight"] = torch.zeros(32, 33)


@pytest.mark.parametrize(
    ("change", "name"),
    [(lose, "fc.weight"), (add, "lm_head.weight"), (reshape, "fc.weight")],
)
@pytest.mark.parametrize("load", [EagleDrafter.from_pretrained, AutoModel.from_pretrained])
@pytest.mark.parametrize("ignore", [{}, {"ignore_mismatched_sizes": True}])
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, change, name, load, ignore):
    tiny_drafters(1)[0].save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=name):
        load(tmp_path, **ignore)


@pytest.mark.parametrize("load", [EagleDrafter.from_pretrained, AutoModel.from_pretrained])
def test_pickles_are_never_read(tmp_path, load):
    (drafter,) = tiny_drafters(1)
    drafter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`use_safetensors` is False"):
        load(tmp_path, use_safetensors=False)
    (tmp_path / "model.safetensors").unlink()
    torch.save(drafter.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(tmp_path)


def test_loading_info_is_handed_on(tmp_path):
    tiny_drafters(1)[0].save_pretrained(tmp_path)
    drafter, info = EagleDrafter.from_pretrained(tmp_path, output_loading_info=True)
    assert type(drafter) is EagleDrafter
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_draft_vocabulary_is_part_of_the_checkpoint(tmp_path, dtype):
    ids = torch.tensor([11, 2, 7])
    drafter = EagleDrafter.from_target(tiny_target(), draft_token_ids=ids).to(dtype)
    drafter.save_pretrained(tmp_path)
    loaded = EagleDrafter.from_pretrained(tmp_path)
    for each in (drafter, loaded):
        assert each.draft_token_ids.tolist() == [11, 2, 7]
        assert each.draft_token_ids.dtype == torch.int64
        assert each.config.draft_vocab_size == 3
    assert tiny_drafters(1)[0].draft_token_ids is None


def test_a_draft_vocabulary_can_be_cut_to_its_most_frequent_tokens(tmp_path):
    drafter = EagleDrafter.from_target(tiny_target(), draft_token_ids=torch.tensor([11, 2, 7]))
    drafter.score_only(2)
    drafter.save_pretrained(tmp_path)
    loaded = EagleDrafter.from_pretrained(tmp_path)
    for each in (drafter, loaded):
        assert each.draft_token_ids.tolist() == [11, 2]
        assert each.config.draft_vocab_size == 2
    whole = EagleDrafter.from_target(tiny_target(), draft_token_ids=3)
    assert whole.draft_token_ids.tolist() == [0, 1, 2]
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"`draft_token_ids` is {count}, expected 1 to 2"):
            drafter.score_only(count)


@pytest.mark.parametrize(
    "ids", [[3, 3, 4], [-1, 2], [0, VOCAB], [], list(range(VOCAB)) + [0]], ids=str
)
def test_draft_vocabularies_of_nonsense_are_refused(ids):
    with pytest.raises(ValueError, match=r"`draft_(token_ids|vocab_size)`"):
        EagleDrafter.from_target(tiny_target(), torch.tensor(ids, dtype=torch.long))


def test_families_of_another_build_are_refused():
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=VOCAB, n_positions=16)
    with pytest.raises(ValueError, match=r"'gpt2' are not supported.*embed_tokens"):
        EagleDrafter.from_target(GPT2LMHeadModel(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_target_takes_the_targets_dtype(dtype):
    assert EagleDrafter.from_target(tiny_target(dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("settings", [{"fc_bias": True}, {"input_norm": True}])
def test_optional_parts(tmp_path, settings):
    plain = set(tiny_drafters(1)[0].state_dict())
    drafter = EagleDrafter.from_target(tiny_target(), **settings)
    (extra,) = set(drafter.state_dict()) - plain
    assert extra in ("fc.bias", "trunk.layers.0.input_layernorm.weight")
    drafter.save_pretrained(tmp_path)
    assert extra in EagleDrafter.from_pretrained(tmp_path).state_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prediction_reads_no_later_slot(family):
    (drafter,) = tiny_drafters(1, family)
    embeds, features = inputs()
    with torch.no_grad():
        whole = drafter(embeds, features).last_hidden_state
        part = drafter(embeds[:, :4], features[:, :4]).last_hidden_state
    torch.testing.assert_close(part, whole[:, :4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prediction_knows_distances_and_no_positions(family):
    """So there is nothing to learn from positions beyond those of training (docs/training.md)."""
    drafter = EagleDrafter.from_target(tiny_target(family)).eval()
    embeds, features = inputs()
    places = torch.arange(embeds.shape[1])[None]
    near, far, apart = (
        drafter(embeds, features, position_ids=where).last_hidden_state
        for where in (places, places + 100, places * 3)
    )
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    assert (near - apart).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_and_both_inputs_matter(family):
    drafter = EagleDrafter.from_target(tiny_target(family), fc_bias=True)
    embeds, features = (x.requires_grad_() for x in inputs())
    drafter(embeds, features).last_hidden_state.square().sum().backward()
    for name, tensor in (*drafter.named_parameters(), ("embeds", embeds), ("features", features)):
        assert tensor.grad is not None, name
        assert tensor.grad.abs().max() > 0, name


def test_forward_leaves_nothing_behind():
    (drafter,) = tiny_drafters(1)
    before = [{**vars(module)} for module in drafter.modules()]
    embeds, features = inputs()
    cache = DynamicCache(config=drafter.trunk.config)
    with torch.no_grad():
        drafter(embeds, features, past_key_values=cache)
        first = drafter(embeds, features).last_hidden_state
        assert torch.equal(first, drafter(embeds, features).last_hidden_state)
    assert cache.get_seq_length() == 7
    for module, known in zip(drafter.modules(), before):
        assert list(vars(module)) == list(known)
        assert all(vars(module)[name] is value for name, value in known.items())


def test_no_cache_is_made_unless_given():
    embeds, features = inputs()
    (drafter,) = tiny_drafters(1)
    assert drafter(embeds, features).past_key_values is None
    assert drafter(embeds, features, use_cache=True).past_key_values.get_seq_length() == 7


def test_the_attention_implementation_reaches_the_layer(tmp_path):
    (drafter,) = tiny_drafters(1)
    drafter.save_pretrained(tmp_path)
    for name in ("sdpa", "eager"):
        loaded = EagleDrafter.from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.trunk.config._attn_implementation == name
        torch.testing.assert_close(output(loaded), output(drafter), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_frequencies_are_exact_in_any_dtype(family):
    frequencies = []
    for dtype in (torch.float32, torch.bfloat16):
        drafter = EagleDrafter.from_target(tiny_target(family, dtype))
        assert {p.dtype for p in drafter.parameters()} == {dtype}
        frequencies.append([b for name, b in drafter.named_buffers() if "inv_freq" in name])
    assert frequencies[0]
    for exact, found in zip(*frequencies):
        assert torch.equal(found, exact)
