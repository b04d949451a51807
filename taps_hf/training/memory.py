"""Whether a run fits into memory, told before it starts."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from .encoding import Example
from .objectives import DraftObjective


def estimate_memory(objective: DraftObjective, examples: Sequence[Example], batch_size: int) -> int:
    """Bytes that training takes next to the target, by a rough count that errs upwards.

    Weights, gradients and AdamW's two moments in float32; per token of the largest batch the
    target's states and the activations of the one layer for every step; per scored token the
    target's distribution and, for every step, logits, their logarithms and their gradient.
    """
    drafter, steps = objective.drafter, objective.options.steps
    parameters = sum(parameter.numel() for parameter in drafter.parameters())
    largest = sorted((len(example.input_ids) for example in examples), reverse=True)[:batch_size]
    tokens = largest[0] * len(largest)
    answers = sorted((sum(example.is_answer) for example in examples), reverse=True)[:batch_size]
    config = drafter.trunk.config
    wide = 12 * config.hidden_size + 4 * getattr(config, "intermediate_size", config.hidden_size)
    activations = tokens * wide * 4 * steps
    states = tokens * len(objective.layers) * config.hidden_size * 6  # as they come, and as float32
    logits = sum(answers) * drafter.num_scored_tokens * 4 * (2 + 3 * steps)
    return 16 * parameters + activations + states + logits


def check_memory(needed: int, device: torch.device) -> None:
    """Refuse a run that cannot fit.

    Raises:
        ValueError: if the device has less free memory than `needed` bytes.
    """
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )
    if needed > free:
        raise ValueError(
            f"Training takes about {needed / 1e9:.1f} GB next to the target, but {device} has "
            f"{free / 1e9:.1f} GB free; expected a smaller `batch_size`, `max_length` or "
            "`draft_vocab`."
        )
