from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, DynamicCache

from taps_hf import Eagle3Drafter, EagleDrafter
from taps_hf.drafters.ensemble import groups_of

from ..tiny import DIALECTS, FAMILIES, VOCAB, tiny_drafters, tiny_eagle3, tiny_target
from . import reference


def shape_of(drafter: Eagle3Drafter) -> reference.Shape:
    layer, config = drafter.trunk.config, drafter.config
    return reference.Shape(
        layer.num_attention_heads,
        layer.num_key_value_heads,
        layer.head_dim,
        layer.rms_norm_eps,
        layer.rope_parameters["rope_theta"],
        config.norm_before_residual,
        config.norm_output,
    )


def tensors_of(drafter: Eagle3Drafter) -> dict[str, torch.Tensor]:
    """By the names that they have elsewhere."""
    state = drafter.state_dict()
    return {name.replace("trunk.layers.0.", "midlayer."): x for name, x in state.items()}


def inputs(length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings, (1, n, hidden), and the states of two layers side by side."""
    generator = torch.Generator().manual_seed(0)
    embeds, low, high = torch.randn(3, 1, length, 32, generator=generator)
    return embeds, torch.cat([low, high], dim=-1)


def output(drafter: Eagle3Drafter) -> torch.Tensor:
    embeds, states = (x.to(drafter.dtype) for x in inputs())
    with torch.no_grad():
        return drafter.scores(drafter(embeds, drafter.fuse(states)).last_hidden_state)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_what_it_says(dialect):
    """Against a forward written from the format; one prediction fed back, as drafting does."""
    (drafter,) = tiny_eagle3(dialect=dialect)
    tensors, shape = tensors_of(drafter), shape_of(drafter)
    embeds, states = inputs()
    with torch.no_grad():
        fused = drafter.fuse(states)
        cache = DynamicCache(config=drafter.trunk.config)
        first = drafter(embeds[:, :5], fused[:, :5], past_key_values=cache).last_hidden_state
        last = drafter(embeds[:, 5:], first[:, 4:], past_key_values=cache).last_hidden_state
        logits = drafter.scores(torch.cat([first, last], dim=1))[0]
        wanted_fused = reference.fuse(tensors, shape, list(states[0].split(32, dim=1)))
        wanted = reference.eagle3(tensors, shape, embeds[0, :5], wanted_fused[:5])
        fed = torch.cat([wanted_fused[:5], wanted[4:]])
        wanted = reference.eagle3(tensors, shape, embeds[0], fed)
        wanted_logits = reference.eagle3_logits(tensors, shape, wanted)
    torch.testing.assert_close(fused[0], wanted_fused, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([first, last], dim=1)[0], wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-4, atol=1e-4)


def test_the_dialects_differ():
    """No flag is without effect: the same weights say something else under each."""
    (drafter,) = tiny_eagle3()
    found = [output(drafter)]
    for flag in ("norm_before_residual", "norm_output"):
        other = Eagle3Drafter.from_target(
            tiny_target(), torch.arange(12), layer_ids=[1, 2], **{flag: True}
        )
        other.load_state_dict(drafter.state_dict())
        embeds, states = inputs()
        with torch.no_grad():
            hidden = other(embeds, other.fuse(states)).last_hidden_state
            found.append(other.scores(other(embeds, hidden).last_hidden_state))
        assert other.digest() != drafter.digest()
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    assert not torch.allclose(found[1], found[2], atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("load", [Eagle3Drafter.from_pretrained, AutoModel.from_pretrained])
def test_save_and_load(tmp_path, dialect, dtype, load):
    (drafter,) = tiny_eagle3(dialect=dialect, dtype=dtype)
    drafter.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype="auto")
    assert type(loaded) is Eagle3Drafter
    assert loaded.config.layer_ids == [1, 2]
    assert loaded.reads_layers == (0, 1)
    assert loaded.digest() == drafter.digest()
    assert set(loaded.state_dict()) == set(drafter.state_dict())
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, drafter.state_dict()[name]), name
    assert torch.equal(output(loaded), output(drafter))


def test_a_drafter_of_one_kind_is_not_loaded_as_another(tmp_path):
    tiny_eagle3()[0].save_pretrained(tmp_path / "three")
    tiny_drafters(1)[0].save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="'taps_eagle3', expected 'taps_eagle'"):
        EagleDrafter.from_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="'taps_eagle', expected 'taps_eagle3'"):
        Eagle3Drafter.from_pretrained(tmp_path / "two")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda w: w.update({"fc.bias": torch.zeros(32)}), "fc.bias is unknown"),
        (lambda w: w.update({"fc.weight": torch.zeros(32, 96)}), r"fc.weight is F32 \[32, 96\]"),
        (lambda w: w["draft_token_ids"].copy_(w["draft_token_ids"].flip(0)), "ascending order"),
        (lambda w: w["draft_token_ids"].fill_(3), "1 of them distinct"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, change, message):
    tiny_eagle3()[0].save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        Eagle3Drafter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_ids": []}, "`layer_ids` is \\[\\]"),
        ({"layer_ids": [0, 1]}, "0 is the embedding"),
        ({"layer_ids": 3}, "`layer_ids` is 3, expected list"),
        ({"norm_output": 1}, "`norm_output` is 1, expected bool"),
        ({"fc_norm": True, "norm_before_fc": True}, "both true"),
        ({"draft_vocab_size": VOCAB + 1}, "`draft_vocab_size` is 17"),
    ],
)
def test_configurations_of_nonsense_are_refused(tmp_path, fields, message):
    tiny_eagle3()[0].save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        Eagle3Drafter.from_pretrained(tmp_path)


def test_targets_that_have_too_few_layers_are_refused():
    with pytest.raises(ValueError, match="2 layers, too few"):
        Eagle3Drafter.from_target(tiny_target())
    with pytest.raises(ValueError, match="expected numbers from 1 to 2"):
        Eagle3Drafter.from_target(tiny_target(), layer_ids=[1, 3])
    with pytest.raises(ValueError, match="`model_type` 'gemma3_text', expected one of"):
        Eagle3Drafter.from_target(tiny_target(), layer_ids=[1], family="gemma3_text")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_fits_targets_of_any_family(family):
    """The layer is a Llama's, whatever the target's is; with its heads and its width."""
    (drafter,) = tiny_eagle3(family=family)
    drafter.check_target("it", tiny_target(family))
    assert drafter.trunk.config.model_type == "llama"
    assert drafter.trunk.layers[0].self_attn.q_proj.weight.shape == (32, 64)
    assert drafter.trunk.layers[0].self_attn.k_proj.weight.shape == (16, 64)


def test_heads_wider_or_narrower_than_their_share(tmp_path):
    (drafter,) = tiny_eagle3()
    layer = {**drafter.config.layer_config, "head_dim": 16}
    config = type(drafter.config).from_dict({**drafter.config.to_dict(), "layer_config": layer})
    wide = Eagle3Drafter(config)
    assert wide.trunk.layers[0].self_attn.q_proj.weight.shape == (64, 64)
    assert wide.trunk.layers[0].self_attn.o_proj.weight.shape == (32, 64)
    wide.check_runs()


def test_the_draft_vocabulary_is_kept_in_ascending_order():
    drafter = Eagle3Drafter.from_target(
        tiny_target(), torch.tensor([7, 2, 11, 5]), layer_ids=[1, 2]
    )
    assert drafter.draft_token_ids.tolist() == [2, 5, 7, 11]
    assert drafter.lm_head.weight.shape == (4, 32)
    before = drafter.lm_head.weight.detach().clone()
    drafter.score_only(torch.tensor([11, 5]))
    assert drafter.draft_token_ids.tolist() == [5, 11]
    assert torch.equal(drafter.lm_head.weight, before[[1, 3]])
    with pytest.raises(ValueError, match="has 1 tokens that the drafter's own head does not score"):
        drafter.score_only(torch.tensor([5, 6]))
    drafter.score_only(1)
    assert drafter.draft_token_ids.tolist() == [5]
    whole = Eagle3Drafter.from_target(tiny_target(), layer_ids=[1, 2])
    assert whole.draft_token_ids is None
    whole.score_only(3)
    assert whole.draft_token_ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("ids", [[3, 3, 4], [-1, 2], [0, VOCAB], []], ids=str)
def test_draft_vocabularies_of_nonsense_are_refused(ids):
    with pytest.raises(ValueError, match=r"`draft_(token_ids|vocab_size)`"):
        Eagle3Drafter.from_target(
            tiny_target(), torch.tensor(ids, dtype=torch.long), layer_ids=[1, 2]
        )


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_weight_and_both_inputs_matter(dialect):
    drafter = Eagle3Drafter.from_target(tiny_target(), 12, layer_ids=[1, 2], **DIALECTS[dialect])
    embeds, states = (x.requires_grad_() for x in inputs())
    hidden = drafter(embeds, drafter.fuse(states)).last_hidden_state
    (drafter.scores(hidden) * torch.arange(12)).tanh().sum().backward()
    for name, tensor in (*drafter.named_parameters(), ("embeds", embeds), ("states", states)):
        assert tensor.grad is not None, name
        assert tensor.grad.abs().max() > 0, name


def test_only_drafters_of_one_dialect_run_as_one():
    drafters = [
        *tiny_eagle3(2),
        *tiny_eagle3(1, dialect="norm_before_residual"),
        *tiny_eagle3(2, draft_vocab=8),
        *tiny_drafters(2),
    ]
    assert groups_of(drafters) == [(0, 1), (2,), (3, 4), (5, 6)]


def test_digests_differ_by_what_changes_proposals():
    one, two = tiny_eagle3(2)
    assert one.digest() == tiny_eagle3(1)[0].digest() != two.digest()
    other = Eagle3Drafter.from_target(tiny_target(), 12, layer_ids=[2, 1])
    other.load_state_dict(one.state_dict())
    assert other.digest() != one.digest()


def test_a_target_of_another_width_or_vocabulary_is_refused():
    (drafter,) = tiny_eagle3()
    config = type(drafter.config).from_dict({**drafter.config.to_dict(), "vocab_size": 99})
    with pytest.raises(ValueError, match="`vocab_size` 99, but the target's is 16"):
        Eagle3Drafter(config).check_target("it", tiny_target())
