"""vLLM serves what is exported for it: the texts of plain vLLM, and the acceptance of our chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from taps_hf import Eagle3Drafter, EagleDrafter
from taps_hf.drafters.modeling_feature import FeatureDrafter
from taps_hf.embedded import EMBEDDED_DRAFTERS
from taps_hf.exchange import export

from ..serving.served import (
    SMALL_VOCAB,
    assert_as_ours,
    chain,
    drafted_by,
    encoded,
    needs_vllm,
    save_small_target,
    serve,
)
from ..test_real import CARDS, QUESTIONS

pytestmark = needs_vllm
ASKED = [
    *QUESTIONS.values(),
    "Tom has 3 boxes with 15 pens each. He gives away 9 pens. How many pens does he have left?",
    "A train travels 60 miles an hour for 3 hours, then 40 miles an hour for 2. How far is that?",
]
SMALL_ANSWER, TAUGHT = 64, 60
SCORED = torch.tensor([0, 1, 2, 4, 5, 6, 8, 9, 11, 13, 14, 15])
# Folder: what it is exported to, vLLM's method, and the dialect.
SERVED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "eagle2": ("vllm", "eagle", {}),
    "eagle3": ("vllm", "eagle3", {}),
    "eagle3-norms": ("vllm", "eagle3", {"norm_before_residual": True, "fc_norm": True}),
    "speculators": ("speculators", "eagle3", {"norm_before_residual": True, "norm_output": True}),
    "speculators-qwen3": ("speculators", "eagle3", {"family": "qwen3"}),
}


@pytest.fixture(scope="module")
def prompts(real_folder) -> list[list[int]]:
    return encoded(real_folder, ASKED)


def remade(drafter: EagleDrafter, **changes: Any) -> EagleDrafter:
    """With some fields of its configuration changed, and the weights that are left, in float32."""
    config = drafter.config_class.from_dict({**drafter.config.to_dict(), **changes})
    new = EagleDrafter._from_config(config, dtype=torch.float32)
    state = drafter.state_dict()
    new.load_state_dict({name: state[name] for name in new.state_dict()})
    return new.eval()


def export_folded(drafter: EagleDrafter, out: Path, target: PreTrainedModel) -> None:
    """For vLLM, whose projection has no bias: folded into an embedding of the drafter's own.

    `fc` reads [embedding; feature], so that its bias is what its left half W makes of one vector
    more in each row of the embedding: v with W v = bias. That v is large where W is nearly
    singular (exact in float32, ruined by bfloat16): a test's way, and not one for users.
    """
    assert drafter.config.fc_bias
    export(remade(drafter, fc_bias=False), out, target, "vllm")
    width = drafter.config.hidden_size
    left, bias = drafter.fc.weight[:, :width].detach().double(), drafter.fc.bias.detach().double()
    shift = torch.linalg.solve(left, bias)
    tensors = load_file(out / "model.safetensors")
    embedding = target.get_input_embeddings().weight.detach().double()
    tensors["embed_tokens.weight"] = (embedding + shift).float()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def test_the_maths_drafter_of_the_zoo(tmp_path, real_at_folder, prompts):
    drafter = EagleDrafter.from_pretrained(
        CARDS / EMBEDDED_DRAFTERS["math"], dtype=torch.float32
    ).eval()
    drafter = remade(drafter, draft_vocab_size=None)  # vLLM scores the whole vocabulary
    export_folded(drafter, tmp_path / "drafter", real_at_folder)
    job = {"model": real_at_folder.config.name_or_path, "prompts": prompts}
    speculative = drafted_by(tmp_path / "drafter", "eagle")
    plain, served = (
        result["answers"]
        for result in serve(
            tmp_path, [{**job, "speculative": None}, {**job, "speculative": speculative}]
        )
    )
    assert sum(answer["accepted"] for answer in served) > 100
    assert_as_ours(served, plain, chain(real_at_folder, drafter, prompts), "zoo")


@pytest.fixture(scope="module")
def small_target(tmp_path_factory) -> PreTrainedModel:
    return save_small_target(tmp_path_factory.mktemp("small"))


def taught_drafter(
    target: PreTrainedModel, prompts: torch.Tensor, kind: str, **settings: Any
) -> FeatureDrafter:
    """One that has learnt by heart some of what the target answers to these prompts."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        if kind == "eagle":
            drafter = EagleDrafter.from_target(target)
        else:
            drafter = Eagle3Drafter.from_target(target, SCORED, **settings)
    answers = target.generate(prompts, max_new_tokens=SMALL_ANSWER, do_sample=False)
    with torch.no_grad():
        states = target(answers, output_hidden_states=True).hidden_states
        embeds = target.get_input_embeddings()(answers)[:, 1:-1]
    layers = drafter.config.layer_ids if drafter.has_own_head else [-1]
    features = torch.cat([states[layer] for layer in layers], dim=-1)[:, :-2]
    wanted = answers[:, 2:]
    if drafter.has_own_head:  # in places of the draft vocabulary; -100 is not asked for
        places = torch.full((SMALL_VOCAB,), -100).index_copy(0, SCORED, torch.arange(len(SCORED)))
        wanted = places[wanted]
    optimizer = torch.optim.Adam(drafter.parameters(), lr=0.003)
    for _ in range(TAUGHT):
        hidden = drafter(embeds, drafter.fuse(features)).last_hidden_state
        head = drafter.scores if drafter.has_own_head else target.get_output_embeddings()
        loss = F.cross_entropy(head(hidden).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return drafter.requires_grad_(False).eval()


def test_drafters_of_each_kind(tmp_path, small_target):
    """Right now and then, and in vLLM at the same places."""
    generator = torch.Generator().manual_seed(7)
    prompts = torch.randint(0, SMALL_VOCAB, (3, 9), generator=generator)
    job = {
        "model": small_target.config.name_or_path,
        "prompts": prompts.tolist(),
        "new_tokens": SMALL_ANSWER,
    }
    jobs, drafters = [{**job, "speculative": None}], {}
    for name, (to, kind, settings) in SERVED.items():
        drafters[name] = taught_drafter(small_target, prompts, kind, **settings)
        export(drafters[name], tmp_path / name, small_target, to)
        jobs.append({**job, "speculative": drafted_by(tmp_path / name, kind)})
    plain, *served = (result["answers"] for result in serve(tmp_path, jobs))
    for (name, drafter), answers in zip(drafters.items(), served):
        here = chain(small_target, drafter, prompts.tolist(), SMALL_ANSWER)
        assert sum(answer["accepted"] for answer in here) > 50, name
        assert_as_ours(answers, plain, here, name)
