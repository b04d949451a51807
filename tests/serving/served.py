"""vLLM in a process of its own, and our own decoding to compare it with."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from taps_hf import (
    ChainTree,
    DraftTree,
    DynamicTree,
    EagleDrafter,
    GenerationContext,
    PromptLookup,
)
from taps_hf.drafters.base import Drafter, DrafterSession, DraftRequest
from taps_hf.drafters.lookup import LookupSession
from taps_hf.drafters.modeling_feature import FeatureDrafter
from taps_hf.exchange import export_composed
from taps_hf.formats.composition import PER_TOKEN, Drafting, Routing
from taps_hf.serving.routing import Trust
from taps_hf.strategies import Choice, CycleOutcome, Strategy

from ..test_real import encode

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="`make test-engine` installs vllm"
)
ENGINE = Path(__file__).with_name("engine.py")
LENGTH, NEW_TOKENS = 4, 96
SMALL_VOCAB = 16
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines run side by side, one thread each
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def serve(tmp_path: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What vLLM answers to each job, and what it counted: see engine.py."""
    jobs_file, result = tmp_path / "jobs.json", tmp_path / "result.json"
    jobs_file.write_text(json.dumps([{"new_tokens": NEW_TOKENS, **job} for job in jobs]))
    done = subprocess.run(
        [sys.executable, str(ENGINE), str(jobs_file), str(result)],
        env={**os.environ, **SETTINGS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return json.loads(result.read_text())


def encoded(folder: Path, questions: list[str]) -> list[list[int]]:
    """The tokens of questions, by the tokenizer in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [encode(tokenizer, question)["input_ids"][0].tolist() for question in questions]


def small_config(**changes: Any) -> PretrainedConfig:
    """Of a Llama with heads as narrow as vLLM has kernels for, and few tokens to guess."""
    fields = {
        "vocab_size": SMALL_VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": None,
    }
    return AutoConfig.for_model("llama", **{**fields, **changes})


def save_small_target(folder: Path) -> PreTrainedModel:
    """A random one of that configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        AutoModelForCausalLM.from_config(small_config()).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def compose_small(folder: Path, target: PreTrainedModel, drafting: Drafting = PER_TOKEN) -> None:
    """Write two random drafters for it, which are sometimes right."""
    drafters = {}
    with torch.random.fork_rng():
        for seed, name in enumerate(("a", "b")):
            torch.manual_seed(seed)
            drafters[name] = EagleDrafter.from_target(target, fc_bias=True).eval()
            for part, weight in drafters[name].named_parameters():
                if "fc." in part or "o_proj" in part or "down_proj" in part:
                    weight.data *= 0.1  # or they would be certain of all they propose
    export_composed(drafters, folder, target, drafting)


def whole(routing: Routing) -> Drafting:
    """Drafts of learned drafters alone, that end at vLLM's length."""
    return Drafting(routing, stop_below=0, lookup=False)


def drafted_by(folder: Path, method: str) -> dict[str, Any]:
    return {"method": method, "model": str(folder), "num_speculative_tokens": LENGTH}


def chain(
    target: PreTrainedModel,
    drafters: FeatureDrafter | list[FeatureDrafter],
    prompts: list[list[int]],
    new_tokens: int = NEW_TOKENS,
    strategy: str | Strategy = "single",
) -> list[dict[str, Any]]:
    """The same of our own decoding, drafting chains of the same length."""
    drafters = drafters if isinstance(drafters, list) else [drafters]
    answers = []
    for prompt in prompts:
        out = target.generate(
            torch.tensor([prompt]),
            max_new_tokens=new_tokens,
            do_sample=False,
            assistant_models=drafters,
            strategy=strategy,
            tree=ChainTree(LENGTH),
            return_dict_in_generate=True,
        )
        cycles = out.draft_trace.cycles
        answers.append(
            {
                "tokens": out.sequences[0, len(prompt) :].tolist(),
                "drafts": len(cycles),
                "drafted": sum(cycle.num_nodes for cycle in cycles),
                "accepted": sum(cycle.accepted_length for cycle in cycles),
            }
        )
    return answers


class ChainLookup(PromptLookup):
    """As it looks up for a tree, the likeliest path alone."""

    @classmethod
    def start(cls, drafters: Sequence[Drafter], target: PreTrainedModel) -> DrafterSession:
        return _ChainSession(*drafters)


class _ChainSession(LookupSession):
    def propose(self, rows: Sequence[int], request: DraftRequest) -> dict[int, DraftTree]:
        wide = replace(request, shape=DynamicTree(LENGTH, 64, 4096))
        tree = super().propose(rows, wide).get(0)
        if tree is None:
            return {}
        path = [0]
        while below := (tree.parents == path[-1]).nonzero().flatten().tolist():
            path.append(max(below, key=lambda node: float(tree.confidence[0, node])))
        return {0: tree.select(torch.tensor(path[: request.shape.num_nodes + 1]))}


class ByTrust(Strategy):
    """Routing per draft, and drafts that end, as `taps_hf.serving` says; for one text at a time.

    Args:
        stop_below: drafts end with the first token at which all of them are less likely right.
    """

    def __init__(self, stop_below: float = 0.0) -> None:
        self.stop_below = stop_below

    def begin(self, context: GenerationContext) -> Strategy:
        begun = ByTrust(self.stop_below)
        begun.right = [Trust.BEFORE / 2] * context.num_drafters
        return begun

    def compose(self, trees: Mapping[int, DraftTree]) -> Choice:
        self.first = {i: int(tree.tokens[1]) for i, tree in trees.items()}
        scores = {
            i: float(tree.confidence[i, 1]) * self.right[i] ** Trust.POWER
            for i, tree in trees.items()
        }
        best = max(scores, key=scores.get)
        likely = trees[best].path_confidence[best]
        length = 1
        while length < len(likely) - 1 and likely[length] >= self.stop_below:
            length += 1
        return Choice(trees[best].select(torch.arange(length + 1)), (best,))

    def observe(self, outcome: CycleOutcome) -> None:
        for i in range(len(self.right)):
            right = self.first.get(i) == outcome.emitted[0].token
            self.right[i] = Trust.KEPT * self.right[i] + right


def assert_as_ours(
    served: list[dict[str, Any]],
    plain: list[dict[str, Any]],
    ours: list[dict[str, Any]],
    name: str,
) -> None:
    """Texts are plain vLLM's and plain `generate`'s; so many drafts, so long, so often right.

    Per prompt, which is far tighter than in sum: one pass more or less for who drafts in the first,
    the rest of the last draft for who counts beyond the end, and one tie rounded the other way.
    """
    for number, (there, alone, here) in enumerate(zip(served, plain, ours, strict=True)):
        case = f"{name}, prompt {number}: {_counted(there)} there, {_counted(here)} here"
        print(case)
        assert there["tokens"] == alone["tokens"] == here["tokens"], case
        assert abs(there["drafted"] - here["drafted"]) <= 3 * LENGTH, case
        assert abs(there["drafts"] - here["drafts"]) <= 2, case
        assert abs(there["accepted"] - here["accepted"]) <= LENGTH + 1, case


def _counted(answer: dict[str, Any]) -> str:
    return f"{answer['accepted']} tokens of {answer['drafts']} drafts accepted"
