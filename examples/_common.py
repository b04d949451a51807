"""What the examples share: models named on the command line, and a handful of prompts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from taps_hf import EagleDrafter
from taps_hf.checks import named_paths
from taps_hf.embedded import (
    EMBEDDED_DRAFT_VOCAB,
    EMBEDDED_DRAFTERS,
    load_embedded_target,
    load_embedded_tokenizer,
)

_HERE = Path(__file__).resolve().parent
DRAFTERS = {
    name: str(_HERE.parent / "hub_cards" / folder) for name, folder in EMBEDDED_DRAFTERS.items()
}


def argument_parser(description: str | None, max_new_tokens: int) -> argparse.ArgumentParser:
    """A parser that knows `--target`, `--drafters`, `--draft-vocab` and `--max-new-tokens`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target", help="folder or Hub name (default: the embedded SmolLM2-135M-Instruct)"
    )
    parser.add_argument(
        "--drafters",
        nargs="+",
        metavar="NAME=PATH",
        help="folders or Hub names of drafters (default: math and chat, from hub_cards/)",
    )
    parser.add_argument(
        "--draft-vocab",
        type=int,
        metavar="N",
        help=f"tokens that drafters score (default: {EMBEDDED_DRAFT_VOCAB} with those of "
        "hub_cards/, otherwise as saved)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N")
    return parser


def load_target(
    name: str | None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A target and its tokenizer, by folder or Hub name; the embedded ones for None."""
    logging.disable_progress_bar()
    if name is None:
        return load_embedded_target(dtype), load_embedded_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def load_drafters(
    named: list[str] | None = None, draft_vocab: int | None = None
) -> dict[str, EagleDrafter]:
    """Drafters by name, in the dtype they were saved in.

    A bfloat16 drafter is fine for a float32 target: only what is proposed depends on it.

    Args:
        named: NAME=PATH each; None for those in hub_cards/.
        draft_vocab: tokens to score, the most frequent ones; None for as many as pay on a CPU of
            those in hub_cards/, and for those that others score.

    Raises:
        ValueError: unless every entry of `named` is NAME=PATH, with distinct names.
    """
    if named is None:
        named = [f"{name}={path}" for name, path in DRAFTERS.items()]
        draft_vocab = EMBEDDED_DRAFT_VOCAB if draft_vocab is None else draft_vocab
    paths = named_paths(named, "--drafters")
    drafters = {name: EagleDrafter.from_pretrained(path).eval() for name, path in paths.items()}
    if draft_vocab is not None:
        for drafter in drafters.values():
            drafter.score_only(draft_vocab)
    return drafters


def prompts(kind: str) -> list[str]:
    """Our own prompts of a kind: "math" or "chat"."""
    lines = (_HERE / "prompts" / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["turns"][0] for line in lines]


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> BatchEncoding:
    """A user's prompt in the chat template: `input_ids` and `attention_mask`, (1, T) int64."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


def answer_tokens(inputs: Mapping[str, torch.Tensor], sequences: torch.Tensor) -> list[int]:
    """The generated token ids, without the prompt's."""
    return sequences[0, inputs["input_ids"].shape[1] :].tolist()
