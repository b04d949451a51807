"""Answers by transformers, batch after batch.

Own loop rather than `generate`: rows that have ended leave the batch, the cache grows in place, and
the features, which `generate` would compute and forget, can be kept for training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ...cache import CACHE, InPlaceCache
from ...target import LAST
from ..features import LayerStates
from .base import Answer, AnswerEngine, RegenerateOptions


class BatchedEngine(AnswerEngine):
    """Answers prompts of like length together.

    Args:
        target: the model.
        options: how prompts are answered.
        end_ids: tokens that end an answer.
        layers: whose states are kept, side by side in this order; none for no features.
    """

    name = "transformers"

    def __init__(
        self,
        target: PreTrainedModel,
        options: RegenerateOptions,
        end_ids: set[int],
        layers: Sequence[int] = (),
    ) -> None:
        self._target = target
        self._options = options
        self._end_ids = end_ids
        self._layers = tuple(layers)

    @property
    def asked(self) -> Mapping[str, Any]:
        """Nothing: runs that began before there were other engines have noted none."""
        return {}

    def answer(self, prompts: Sequence[Sequence[int]], first: int) -> list[Answer]:
        options = self._options
        generator = torch.Generator(self._target.device).manual_seed(options.seed * 10**6 + first)
        answers: dict[int, Answer] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), options.batch_size):
            batch = order[start : start + options.batch_size]
            found = answer_batch(
                self._target,
                [prompts[i] for i in batch],
                options.max_new_tokens,
                self._end_ids,
                options.temperature,
                generator,
                self._layers,
            )
            answers.update(zip(batch, found))
        return [answers[i] for i in range(len(prompts))]


@torch.inference_mode()
def answer_batch(
    target: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: set[int],
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    layers: Sequence[int] = (),
) -> list[Answer]:
    """Answer tokenised prompts together.

    Args:
        prompts: token ids of each prompt.
        max_new_tokens: longest answer.
        end_ids: tokens that end an answer.
        temperature: 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature).
        generator: where random numbers come from, on the target's device.
        layers: whose states of prompts and answers are returned, side by side in this order (see
            [`training.features`]); none for no features.

    Raises:
        ValueError: if the target has no such layers.
    """
    device, head = target.device, target.get_output_embeddings()
    read = tuple(layers) if LAST in layers else (*layers, LAST)
    decoder = LayerStates(target, read)
    width = target.config.get_text_config(decoder=True).hidden_size
    scored = slice(read.index(LAST) * width, (read.index(LAST) + 1) * width)
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * n + list(p) for n, p in zip(padding, prompts)], device=device)
    mask = torch.tensor([[0] * n + [1] * len(p) for n, p in zip(padding, prompts)], device=device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = InPlaceCache(DynamicCache(config=target.config.get_text_config(decoder=True)))
    answers: list[list[int]] = [[] for _ in prompts]
    features: list[list[torch.Tensor]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt a row of the shrinking batch belongs to
    while True:
        states = decoder(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{CACHE: cache.cache},
        )
        tokens = _choose(head(states[:, -1, scored]).float(), temperature, generator)
        # Of all rows at once: a device would be waited for row by row.
        kept_states = states[..., : len(layers) * width].to("cpu", copy=True) if layers else None
        going = []
        for row, token in enumerate(tokens.tolist()):
            index = rows[row]
            answer = answers[index]
            if answer and answer[-1] in end_ids:
                continue  # ended, but still in the batch
            if kept_states is not None:
                first = 0 if answer else padding[index]
                features[index].append(kept_states[row, first:])
            answer.append(token)
            if token not in end_ids:
                going.append(row)
        if not going or len(answers[rows[going[0]]]) == max_new_tokens:
            break
        if len(going) < 0.85 * len(rows):  # dropping rows copies the cache: not every time
            kept = torch.tensor(going, device=device)
            cache.select_rows(kept)
            tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
            rows = [rows[row] for row in going]
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [
        Answer(answer, torch.cat(parts) if layers else None)
        for answer, parts in zip(answers, features)
    ]


def _choose(
    logits: torch.Tensor, temperature: float, generator: torch.Generator | None
) -> torch.Tensor:
    """(batch,) int64 tokens from (batch, vocabulary) float32 logits."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # The Gumbel trick rather than multinomial, which is slow for many rows on a CPU.
    noise = torch.empty_like(logits).exponential_(generator=generator).log_()
    return (logits / temperature - noise).argmax(dim=-1)
