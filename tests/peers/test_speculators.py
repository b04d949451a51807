"""Against the package `speculators` itself: `make test-peers`, in an environment of its own."""

from __future__ import annotations

import pytest
import torch

from taps_hf.exchange import export

from ..formats import foreign
from ..formats.test_writing import eagle3, load_quietly
from ..tiny import DIALECTS

speculators = pytest.importorskip("speculators")


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("targets") / "target"
    foreign.target().save_pretrained(folder)
    return str(folder)


def their_logits(folder, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """(n, draft vocabulary) of the model that speculators' own loader makes of a folder."""
    config = speculators.SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = speculators.SpeculatorModel.from_pretrained(folder, config=config).eval().float()
    with torch.no_grad():
        model.embed_tokens.weight.copy_(foreign.target().get_input_embeddings().weight)
    heard = []
    model.lm_head.register_forward_hook(lambda module, args, output: heard.append(output))
    length = tokens.shape[1]
    with torch.no_grad():
        model(
            hidden_states=states,
            input_ids=tokens,
            document_ids=torch.zeros(1, length, dtype=torch.long),
            ttt_steps=1,
        )
    return heard[0][0]


@pytest.mark.parametrize("whole", [False, True], ids=["draft vocabulary", "whole"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_their_model_scores_as_ours(tmp_path, target_folder, dialect, whole):
    target = foreign.target()
    drafter = eagle3(dialect, tokens=None if whole else foreign.TOKENS)
    drafter.config.target_name_or_path = target_folder
    export(drafter, tmp_path / "out", target, "speculators")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, foreign.VOCAB, (1, 6), generator=generator)
    states = torch.randn(1, 6, 3 * foreign.WIDTH, generator=generator)
    with torch.no_grad():
        embeds = target.get_input_embeddings()(tokens)
        ours = drafter.scores(drafter(embeds, drafter.fuse(states)).last_hidden_state)[0]
    theirs = their_logits(tmp_path / "out", tokens, states)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_their_model_saves_is_read(tmp_path, target_folder):
    """Out of their own save: names, configuration and maps as they write them now."""
    drafter = eagle3("norm_before_fc")
    drafter.config.target_name_or_path = target_folder
    export(drafter, tmp_path / "ours", foreign.target(), "speculators")
    model = speculators.SpeculatorModel.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        model.embed_tokens.weight.copy_(foreign.target().get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "theirs")
    assert load_quietly(tmp_path / "theirs").digest() == drafter.digest()
