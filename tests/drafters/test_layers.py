from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from benchmarks.families import outcome, tiny_config
from taps_hf import EagleDrafterConfig
from taps_hf.drafters.layers import build_config, build_trunk, layer_config

from ..tiny import needs_family

# Families of mixtures of experts, and whose dense layer their drafters have.
EXPERTS = {
    "deepseek_v3": "deepseek_v3",
    "exaone_moe": "exaone_moe",
    "glm4_moe": "glm4_moe",
    "gpt_oss": "llama",
    "granitemoe": "granite",
    "jetmoe": "llama",
    "minimax_m2": "llama",
    "mixtral": "mistral",
    "olmoe": "llama",
    "phimoe": "llama",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen3",
}


@pytest.mark.parametrize(("family", "layer"), EXPERTS.items())
def test_targets_with_experts_have_dense_drafters_that_work(family, layer):
    """One and two: the tokens are those of plain generate."""
    needs_family(family)
    found = outcome(family)
    assert (found.verdict, found.layer, found.together) == ("works", layer, True), found


@pytest.mark.parametrize("family", EXPERTS)
def test_a_dense_layer_is_as_wide_as_the_target(family):
    needs_family(family)
    config = tiny_config(family)
    fields = layer_config(config)
    weights = build_trunk(fields, "meta").layers[0].state_dict().values()
    assert all(weight.dim() <= 2 for weight in weights)
    assert build_config(fields).hidden_size == config.hidden_size


def test_a_dense_layer_is_as_wide_as_the_experts_of_a_token_together():
    config = AutoConfig.for_model("mixtral", intermediate_size=48, num_experts_per_tok=3)
    assert layer_config(config)["intermediate_size"] == 144
    config = AutoConfig.for_model("qwen3_moe", intermediate_size=96, moe_intermediate_size=16)
    assert layer_config(config)["intermediate_size"] == 96


def test_a_sparse_layer_can_be_asked_for():
    fields = layer_config(tiny_config("mixtral"), dense=False)
    assert fields["model_type"] == "mixtral"
    shapes = {weight.dim() for weight in build_trunk(fields, "meta").layers[0].parameters()}
    assert 3 in shapes


def test_families_without_a_known_dense_layer_are_refused():
    needs_family("kolibri1")
    with pytest.raises(ValueError, match=r"\(kolibri1\) are mixtures of experts.*`dense=False`"):
        EagleDrafterConfig.from_target(tiny_config("kolibri1"))


@pytest.mark.parametrize("family", ["llama", "mistral", "smollm3", "qwen3", "gemma3_text"])
def test_lists_with_an_entry_a_layer_are_cut_to_one(family):
    fields = layer_config(tiny_config(family))
    config = build_config(fields)
    assert config.num_hidden_layers == 1
    assert all(len(value) == 1 for value in fields.values() if isinstance(value, list))


def test_what_a_familys_code_raises_is_a_value_error():
    with pytest.raises(ValueError, match="'falcon_mamba'"):
        layer_config(tiny_config("falcon_mamba"))
    with pytest.raises(ValueError, match="cannot be made of `layer_config`: KeyError"):
        build_trunk({"model_type": "llama", "hidden_act": "nonsense"}, torch.device("meta"))


def test_a_family_that_counts_its_layers_otherwise_is_refused():
    """It makes none of a configuration of one, or (in early versions) fails over it."""
    needs_family("longcat_flash")
    assert outcome("longcat_flash").verdict == "refused"
