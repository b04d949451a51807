"""The real target and the drafters in hub_cards/."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import taps_hf
from taps_hf.embedded import EMBEDDED_DRAFTERS, load_embedded_target, load_embedded_tokenizer

pytestmark = pytest.mark.real
CARDS = Path(__file__).resolve().parent.parent / "hub_cards"
ZOO = sorted(folder.name for folder in CARDS.glob("smollm2-*"))
QUESTIONS = {
    "math": "A baker fills 6 trays with 12 rolls each and sells 50 rolls. How many are left?",
    "chat": "My neighbour is moving away next week. What could I write on a farewell card?",
}
TREE = taps_hf.DynamicTree(depth=5, top_k=8, num_nodes=24)


@pytest.fixture(scope="module")
def target(load_real):
    return load_real()


@pytest.fixture(scope="module")
def drafters():
    return {
        name: taps_hf.EagleDrafter.from_pretrained(CARDS / folder, dtype=torch.float32).eval()
        for name, folder in EMBEDDED_DRAFTERS.items()
    }


@pytest.fixture(scope="module")
def tokenizer(real_folder):
    return AutoTokenizer.from_pretrained(real_folder)


def encode(tokenizer, question: str):
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


def test_the_target_is_the_real_one(target, tokenizer):
    """Out of its package: an ordinary float32 model, as the other tests read it from a folder."""
    embedded = load_embedded_target(torch.float32)
    assert getattr(embedded.config, "quantization_config", None) is None
    assert sum(p.numel() for p in embedded.parameters()) == 134_515_008
    weights, expected = target.state_dict(), embedded.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    fingerprints = map(taps_hf.tokenizer_fingerprint, (tokenizer, load_embedded_tokenizer()))
    assert len(set(fingerprints)) == 1


def test_it_answers_sensibly(target, tokenizer):
    inputs = encode(tokenizer, "What is the capital of France?")
    out = target.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])


@pytest.mark.parametrize("strategy", ["single", "confidence", "merged"])
def test_parity_and_acceptance(target, drafters, tokenizer, strategy):
    for name, question in QUESTIONS.items():
        inputs = encode(tokenizer, question)
        for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8}):
            outs = []
            for extra in ({}, {"assistant_models": drafters, "strategy": strategy, "tree": TREE}):
                torch.manual_seed(1)
                outs.append(
                    target.generate(
                        **inputs,
                        max_new_tokens=64,
                        return_dict_in_generate=True,
                        **sampling,
                        **extra,
                    )
                )
            assert torch.equal(outs[0].sequences, outs[1].sequences)
            # Random drafters reach 1.0; the maths drafter alone on conversation not much more.
            assert outs[1].draft_trace.tau > 1.1, (name, strategy, sampling)


def test_specialists_are_better_at_what_they_were_trained_for(target, drafters, tokenizer):
    """On maths the maths drafter, alone, has the larger tau."""
    inputs = encode(tokenizer, QUESTIONS["math"])
    tau = {}
    for name, drafter in drafters.items():
        out = target.generate(
            **inputs,
            max_new_tokens=96,
            do_sample=False,
            assistant_models=[drafter],
            tree=TREE,
            return_dict_in_generate=True,
        )
        tau[name] = out.draft_trace.tau
    assert tau["math"] > tau["chat"]


@pytest.mark.parametrize("folder", ZOO)
def test_every_drafter_fits_and_foresees_the_target(folder, target, tokenizer):
    drafter = taps_hf.EagleDrafter.from_pretrained(CARDS / folder, dtype=torch.float32).eval()
    assert drafter.config.tokenizer_fingerprint == taps_hf.tokenizer_fingerprint(tokenizer)
    inputs = encode(tokenizer, QUESTIONS["math"])
    plain = target.generate(**inputs, max_new_tokens=32, do_sample=False)
    out = target.generate(
        **inputs,
        max_new_tokens=32,
        do_sample=False,
        assistant_models=[drafter],
        return_dict_in_generate=True,
    )
    assert out.sequences.equal(plain)
    assert out.draft_trace.tau > 1.3


@pytest.mark.parametrize("folder", ZOO)
def test_folders_are_ready_for_the_hub(folder):
    """Configuration, weights, card; nothing else. The card has a licence and the measurement."""
    assert {f.name for f in (CARDS / folder).iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    card = (CARDS / folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "license: apache-2.0" in card
    assert "taps-hf evaluate" in card
