"""Writing drafters as engines read them, and reading back what was written.

What an engine cannot serve is refused: it would load without a word and accept nothing, or raise
in somebody else's server. Facts about engines: docs/checkpoints.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..drafters.modeling_eagle import EagleDrafter
from ..drafters.modeling_eagle3 import Eagle3Drafter
from ..drafters.modeling_feature import FeatureDrafter
from ..files import write_json
from . import write_eagle, write_eagle3
from .load import read_drafter
from .written import Written, window_notes

_Writer = Callable[[Any, PreTrainedModel], Written]

ENGINES: Mapping[str, Mapping[type[FeatureDrafter], _Writer]] = {
    "eagle": {EagleDrafter: write_eagle.to_eagle, Eagle3Drafter: write_eagle3.to_eagle},
    "sglang": {EagleDrafter: write_eagle.to_sglang, Eagle3Drafter: write_eagle3.to_sglang},
    "vllm": {EagleDrafter: write_eagle.to_vllm, Eagle3Drafter: write_eagle3.to_vllm},
    "speculators": {Eagle3Drafter: write_eagle3.to_speculators},
    "llama.cpp": {Eagle3Drafter: write_eagle3.to_llama_cpp},
}
"""Who can serve which kinds, and what writes them."""


def written_as(
    to: str, drafter: FeatureDrafter, target: PreTrainedModel, dtype: torch.dtype | None = None
) -> Written:
    """What the files of an engine hold of a drafter.

    Args:
        to: one of [`ENGINES`].
        drafter: with weights.
        target: that it drafts for.
        dtype: of the weights, by default the drafter's.

    Raises:
        ValueError: if there is no such engine, or it cannot serve the drafter, with the reason.
    """
    if to not in ENGINES:
        raise ValueError(f"`to` is {to!r}, expected one of {', '.join(ENGINES)}.")
    writers = ENGINES[to]
    kind = next((kind for kind in writers if isinstance(drafter, kind)), None)
    if kind is None:
        raise ValueError(
            f"`to` is {to!r}, which has no place for a drafter of the kind "
            f"{type(drafter).__name__} ({drafter.config.backbone}); expected "
            f"{' or '.join(known.__name__ for known in writers)}."
        )
    found = writers[kind](drafter, target)
    found.notes += window_notes({"the drafter": drafter})
    dtype = drafter.dtype if dtype is None else dtype
    found.config["torch_dtype"] = found.config["dtype"] = str(dtype).removeprefix("torch.")
    found.tensors = {
        name: (x.to(dtype) if x.is_floating_point() else x).detach().cpu().contiguous().clone()
        for name, x in found.tensors.items()
    }
    return found


def write(written: Written, folder: Path) -> None:
    """Write a folder's files."""
    write_json(folder / "config.json", written.config)
    save_file(written.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if written.token_map is not None:
        torch.save(written.token_map, folder / "token_map.pt")


@torch.no_grad()
def check_read_back(
    folder: Path, drafter: FeatureDrafter, target: PreTrainedModel, dtype: torch.dtype
) -> None:
    """Read a folder that was written, and compare what it scores with what the drafter does.

    Args:
        folder: as [`write`] wrote it.
        drafter: what was written.
        target: that it drafts for.
        dtype: of the weights in the folder.

    Raises:
        RuntimeError: if they differ by more than rounding: then the folder must not be used.
    """
    found, _ = read_drafter(folder, target, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        expected = type(drafter)._from_config(drafter.config, dtype=torch.float32).eval()
    state = drafter.state_dict()
    expected.load_state_dict(
        {k: x.to("cpu", dtype).float() if x.is_floating_point() else x for k, x in state.items()}
    )
    both = [_scores(one, target) for one in (found, expected)]
    # Same tensors, same code: what differs is the order of sums, if anything.
    error = (both[0] - both[1]).abs().max() / both[1].abs().max()
    same_layers = found.reads_layers == drafter.reads_layers
    if both[0].shape != both[1].shape or not error < 1e-4 or not same_layers:
        raise RuntimeError(
            f"{folder} was written and reads back otherwise: its scores differ by {float(error):g} "
            f"of the largest, and it reads the layers {found.reads_layers} "
            f"({drafter.reads_layers} were written)."
        )


def _scores(drafter: FeatureDrafter, target: PreTrainedModel) -> torch.Tensor:
    """Of all tokens that it scores, in float32 after some random slots and one fed back."""
    generator = torch.Generator().manual_seed(0)
    embedding = target.get_input_embeddings().weight
    tokens = torch.randint(0, drafter.config.vocab_size, (6,), generator=generator)
    embeds = embedding[tokens.to(embedding.device)].float().cpu()[None]
    states = torch.randn(1, 6, drafter.feature_size, generator=generator)
    hidden = drafter(embeds, drafter.fuse(states)).last_hidden_state
    hidden = drafter(embeds, hidden).last_hidden_state
    if drafter.has_own_head:
        return drafter.scores(hidden)
    head = target.get_output_embeddings().weight.cpu()
    if (tokens := drafter.draft_token_ids) is not None:
        head = head[tokens]
    return hidden @ head.float().T
