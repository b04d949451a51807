"""A card says what was trained, on what and how, without saying where."""

from __future__ import annotations

from dataclasses import asdict

import torch
import yaml

from taps_hf.training.card import model_card, provenance
from taps_hf.training.options import TrainOptions, train_options

from ..tiny import tiny_drafters


def card_of(tmp_path, target=None, **changes):
    file = tmp_path / "math.jsonl"
    file.write_text("{}\n")
    options = TrainOptions(
        data=[f"{file}:100", "owner/set:50%"],
        features=[str(tmp_path)],
        out=str(tmp_path / "drafter"),
        objective="hass",
        init_from=str(tmp_path),
        epochs=1.5,
        **changes,
    )
    (drafter,) = tiny_drafters(1, draft_vocab=6)
    drafter.config.target_name_or_path = target
    record = {
        "options": asdict(options),
        "measured": {
            "math.jsonl_top_1": 0.5,
            "math.jsonl_deep_acceptance": 0.75,
            "math.jsonl_accepted_length": 1.25,
        },
        "examples": 95,
        "answer_tokens": 1234,
        "provenance": provenance(torch.device("cpu")),
    }
    return model_card(drafter, record)


def test_what_others_need_is_there_and_folders_are_not(tmp_path):
    card = card_of(tmp_path, "org/target", license="apache-2.0")
    assert card.data.base_model == "org/target"
    assert card.data.license == "apache-2.0"
    assert {"eagle2", "taps-hf"} <= set(card.data.tags)
    assert "scores 6 of the target's 16 tokens" in card.text
    assert "1,234 tokens" in card.text
    assert "| math.jsonl | 0.500 | 0.750 | 1.25 |" in card.text
    assert torch.__version__ in card.text
    assert str(tmp_path) not in card.content


def test_its_options_are_a_recipe(tmp_path):
    text = card_of(tmp_path).text
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.partition("```yaml\n")[2].partition("```")[0])
    values = yaml.safe_load(recipe.read_text())
    assert values == {
        "data": ["math.jsonl:100", "owner/set:50%"],
        "objective": "hass",
        "init_from": tmp_path.name,
        "epochs": 1.5,
    }
    assert train_options({"out": "x"}, recipe).epochs == 1.5


def test_a_target_in_a_folder_has_no_page_on_the_hub(tmp_path):
    card = card_of(tmp_path, str(tmp_path))
    assert card.data.base_model is None
    assert str(tmp_path) not in card.content
    assert f"drafter for {tmp_path.name}" in card.text
