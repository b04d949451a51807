"""Adapters of peft: those inside the layers are exact, those before the prompt are refused."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import taps_hf
from tests.tiny import prompt, tiny_drafters, tiny_target

# peft's, not ours: transformers 5.23 deprecates what peft asks of the model.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
COMMON = {"max_new_tokens": 20, "do_sample": False}
OURS = {
    "assistant_models": tiny_drafters(2),
    "strategy": "merged",
    "tree": taps_hf.DynamicTree(depth=4, top_k=6, num_nodes=30),
}
CAUSAL = {"task_type": "CAUSAL_LM"}
LAYERS = {
    "LoRA": peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj", "lm_head"], **CAUSAL),
    "IA3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL
    ),
}
PROMPTS = {
    "PROMPT_TUNING": peft.PromptTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "PREFIX_TUNING": peft.PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "P_TUNING": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, **CAUSAL),
}


def adapted(config: peft.PeftConfig) -> peft.PeftModel:
    """The tiny target with an adapter that says something."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = peft.get_peft_model(copy.deepcopy(tiny_target()), copy.deepcopy(config)).eval()
        for name, weight in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                torch.nn.init.normal_(weight)
    return model


@pytest.mark.parametrize("kind", LAYERS)
def test_adapters_inside_the_layers(kind: str):
    model = adapted(LAYERS[kind])
    bare = tiny_target().generate(prompt(), **COMMON)
    for _ in range(2):  # generate leaves something of its own on the model
        plain = model.generate(input_ids=prompt(), **COMMON)
        assert not torch.equal(plain, bare)
        ours = model.generate(input_ids=prompt(), **COMMON, **OURS, return_dict_in_generate=True)
        assert torch.equal(plain, ours.sequences)
    with model.disable_adapter():
        assert torch.equal(bare, model.generate(input_ids=prompt(), **COMMON, **OURS))


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompt_learning_is_refused(kind: str):
    model = adapted(PROMPTS[kind])
    passes = []
    model.base_model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match=f"adapter is {kind}.*expected an adapter inside"):
        model.generate(input_ids=prompt(), **COMMON, **OURS)
    assert not passes
    bare = tiny_target().generate(prompt(), **COMMON)
    with model.disable_adapter():
        assert torch.equal(bare, model.generate(input_ids=prompt(), **COMMON, **OURS))
    # What peft leaves on the base model is the base model's own.
    assert torch.equal(bare, model.base_model.generate(prompt(), **COMMON, **OURS))
