"""Questions as tokens, and contexts in which they come late."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from prompts import Prompt
from transformers import PreTrainedTokenizerBase


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """(1, T) int64: the tokens of a question."""
    messages = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded["input_ids"]


def filling(
    tokenizer: PreTrainedTokenizerBase, filler: Sequence[Prompt], context: int
) -> Callable[[str], str]:
    """Puts other texts above a question, until it has `context` tokens or more.

    They are cut to the length asked for, and repeated if there is too little of them.
    """
    others = "\n\n".join(prompt.text for prompt in filler)

    def fill(text: str) -> str:
        if (missing := context - tokens_of(tokenizer, text).shape[1]) <= 0:
            return text
        above = tokenizer(others, add_special_tokens=False)["input_ids"]
        above = (above * (missing // len(above) + 1))[:missing]
        return f"{tokenizer.decode(above)}\n\n{text}"

    return fill
