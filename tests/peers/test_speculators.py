"""EAGLE-3 as the speculators project computes it, writes it and reads it: the same drafter."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from taps_hf import Eagle3Drafter, Eagle3DrafterConfig, load_drafter
from taps_hf.exchange import export

from ..formats.foreign import HEADS, MIDDLE, SHARED, TOKENS, VOCAB, WIDTH
from ..formats.foreign import target as random_target
from ..tiny import DIALECTS

# Not `importorskip`: where it is installed and broken, that is to be seen.
if importlib.util.find_spec("speculators") is None:
    pytest.skip("`make test-peers` installs speculators", allow_module_level=True)

from speculators import SpeculatorModel, SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig

LAYER_FIELDS = ("attention_bias", "head_dim")
LAYER_IDS, LENGTH, DEPTH = [2, 4, 5], 7, 3
# What a layer of random weights scores is of the order of one.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
MADE: dict[str, dict] = {
    **DIALECTS,
    "qwen3, norm_before_residual": {"family": "qwen3", "norm_before_residual": True},
    "wide heads": {"head_dim": 16},
    "attention_bias": {"attention_bias": True},
    "whole vocabulary": {"scored": None},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> PreTrainedModel:
    """Out of a folder: their loader reads the target's embedding there."""
    folder = tmp_path_factory.mktemp("target")
    random_target().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def randomise(model: torch.nn.Module) -> None:
    """All weights but those that are the target's; norms too, since new ones are all alike."""
    generator = torch.Generator().manual_seed(8)
    for name, weight in model.named_parameters():
        if name.startswith(("embed_tokens.", "verifier_")):
            continue
        new = torch.rand(weight.shape, generator=generator)
        weight.data = new + 0.5 if "norm" in name else (new - 0.5)


def theirs(target: PreTrainedModel, dialect: str) -> Eagle3DraftModel:
    """A random drafter of theirs."""
    settings = dict(MADE[dialect])
    scored = TOKENS if settings.pop("scored", TOKENS) else list(range(VOCAB))
    layer = AutoConfig.for_model(
        settings.pop("family", "llama"),
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=MIDDLE,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=SHARED,
        head_dim=settings.pop("head_dim", WIDTH // HEADS),
        attention_bias=settings.pop("attention_bias", False),
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    layer._attn_implementation = "eager"
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=len(scored),
        eagle_aux_hidden_state_layer_ids=LAYER_IDS,
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=DEPTH)],
            default_proposal_method="greedy",
            verifier=VerifierConfig.from_pretrained(target.config.name_or_path),
        ),
        **settings,
    )
    model = Eagle3DraftModel(config)
    chosen = torch.tensor(scored)
    t2d = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, chosen, True)
    model.load_vocab_mappings(t2d, chosen - torch.arange(len(scored)))
    model.load_verifier_weights()
    randomise(model)
    return model.eval()


def ours(target: PreTrainedModel, dialect: str) -> Eagle3Drafter:
    """A random drafter of ours."""
    settings = dict(MADE[dialect])
    scored = settings.pop("scored", TOKENS)
    layer = {name: settings.pop(name) for name in LAYER_FIELDS if name in settings}
    config = Eagle3DrafterConfig.from_target(target.config, layer_ids=LAYER_IDS, **settings)
    config.layer_config = {**config.layer_config, **layer}
    config.draft_vocab_size = None if scored is None else len(scored)
    drafter = Eagle3Drafter._from_config(config, dtype=torch.float32)
    if scored is not None:
        drafter.draft_token_ids.copy_(torch.tensor(scored))
    randomise(drafter)
    return drafter.eval()


@torch.no_grad()
def scores_of_theirs(model: Eagle3DraftModel, tokens, features) -> list[torch.Tensor]:
    """(LENGTH, scored) of each of DEPTH steps. At step j slot t has been drafted j deep."""
    scores = []
    hook = model.lm_head.register_forward_hook(lambda *call: scores.append(call[-1][0]))
    try:
        model(
            hidden_states=features[None],
            input_ids=tokens[None],
            document_ids=torch.zeros(1, len(tokens), dtype=torch.long),
            ttt_steps=DEPTH,
        )
    finally:
        hook.remove()
    return scores


@torch.no_grad()
def scores_of_ours(drafter: Eagle3Drafter, target, tokens, features) -> list[torch.Tensor]:
    """The same, each slot drafted by itself behind the true features up to it."""
    embeds = target.get_input_embeddings()(tokens)
    fused = drafter.fuse(features[None])[0]
    scores = []
    for step in range(DEPTH):
        rows = []
        for slot in range(len(tokens) - step):
            states = fused[: slot + 1]
            for depth in range(step + 1):
                read = embeds[: slot + 1 + depth]
                out = drafter(read[None], states[None]).last_hidden_state[0]
                states = torch.cat([states, out[-1:]])
            rows.append(drafter.scores(out[-1:][None])[0, 0])
        scores.append(torch.stack(rows))
    return scores


def assert_alike(model: Eagle3DraftModel, drafter: Eagle3Drafter, target) -> None:
    """They score the same, from the target's features and from what they feed themselves."""
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(0, VOCAB, (LENGTH,), generator=generator)
    features = torch.randn(LENGTH, len(LAYER_IDS) * WIDTH, generator=generator)
    expected = scores_of_theirs(model, tokens, features)
    found = scores_of_ours(drafter, target, tokens, features)
    assert len(expected) == len(found) == DEPTH
    for step, (a, b) in enumerate(zip(found, expected)):
        # Behind the last token theirs reads padding.
        torch.testing.assert_close(a, b[: len(tokens) - step], **CLOSE)
    assert max(float(x.std()) for x in expected) > 0.1
    ids = drafter.draft_token_ids
    if model.d2t is None:
        assert ids is None
    else:
        assert ids.tolist() == (model.d2t + torch.arange(len(model.d2t))).tolist()
    assert model.target_layer_ids == drafter.config.layer_ids


@pytest.mark.parametrize("dialect", MADE)
def test_what_it_saves_is_read_here(tmp_path, target, dialect):
    """With the copy of the target's embedding that it saves, which is checked and dropped."""
    model = theirs(target, dialect)
    model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["speculators_model_type"] == "eagle3"
    assert_alike(model, load_drafter(str(tmp_path), target), target)


@pytest.mark.parametrize("dialect", MADE)
def test_what_is_exported_is_read_there(tmp_path, target, dialect):
    """By its own loader, which completes it with the target's embedding."""
    drafter = ours(target, dialect)
    export(drafter, tmp_path / "out", target, "speculators")
    config = SpeculatorModelConfig.from_pretrained(tmp_path / "out")
    config.transformer_layer_config._attn_implementation = "eager"  # flex wants 128 slots or more
    model = SpeculatorModel.from_pretrained(tmp_path / "out", config=config)
    assert isinstance(model, Eagle3DraftModel)
    assert not any(x.isnan().any() for x in model.parameters()), "something was not loaded"
    assert_alike(model.eval(), drafter, target)
    model.save_pretrained(tmp_path / "again")
    again = load_drafter(str(tmp_path / "again"), target)
    assert again.digest() == drafter.digest()
