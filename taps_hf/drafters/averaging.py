"""Averaging the weights of drafters: the baseline for composing them at inference time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import zip_longest

import torch

from .modeling_eagle import EagleDrafter

# Where drafters may differ and still be averaged.
_FREE_FIELDS = {
    "_name_or_path",
    "architectures",
    "dtype",
    "backbone",
    "draft_vocab_size",
    "target_name_or_path",
    "training_data",
    "transformers_version",
}


def average_drafters(
    drafters: Sequence[EagleDrafter], weights: Sequence[float] | None = None
) -> EagleDrafter:
    """A drafter whose parameters are the weighted mean of others' (TAPS, equation 11).

    theta = sum over i of weights[i] * theta_i, computed in float32 and stored in the dtype of the
    first drafter. No parameter belongs to a token of the vocabulary, so drafters that score
    different tokens can be averaged too: the average scores those that any of them scores.

    Args:
        drafters: at least two of the same architecture.
        weights: one for each, summing to 1; equal weights by default.

    Raises:
        ValueError: if the drafters differ in kind, or the weights do not fit.
    """
    if len(drafters) < 2:
        raise ValueError(f"{len(drafters)} drafters were given to average, expected at least 2.")
    if weights is None:
        weights = [1 / len(drafters)] * len(drafters)
    if len(weights) != len(drafters) or not abs(sum(weights) - 1) <= 1e-6:  # NaN is refused too
        raise ValueError(
            f"`weights` is {list(weights)}, expected {len(drafters)} numbers that sum to 1."
        )
    first = drafters[0]
    expected = _comparable(first)
    for other in drafters[1:]:
        found = _comparable(other)
        differing = sorted(k for k in {*expected, *found} if expected.get(k) != found.get(k))
        if differing:
            raise ValueError(
                f"The drafters differ in {', '.join(differing)}; expected the same architecture."
            )
    average = copy.deepcopy(first)
    scored = [drafter.draft_token_ids for drafter in drafters]
    all_known = all(ids is not None for ids in scored)
    average.score_only(_in_turns([ids.tolist() for ids in scored]) if all_known else None)
    states = [drafter.state_dict() for drafter in drafters]
    with torch.no_grad():
        for name, parameter in average.named_parameters():
            parts = [w * s[name].to(parameter.device).float() for w, s in zip(weights, states)]
            parameter.copy_(torch.stack(parts).sum(dim=0))
    data = [f"{w:g} x ({'; '.join(d.config.training_data)})" for w, d in zip(weights, drafters)]
    average.config.training_data = data
    average.name_or_path = average.config.name_or_path = ""  # it is not the first drafter's
    return average


def _in_turns(ranked: Sequence[Sequence[int]]) -> torch.Tensor:
    """All their entries, once: the first ones, then the second ones, and so on."""
    turns = [entry for turn in zip_longest(*ranked) for entry in turn if entry is not None]
    return torch.tensor(list(dict.fromkeys(turns)))


def _comparable(drafter: EagleDrafter) -> dict[str, object]:
    return {k: v for k, v in drafter.config.to_dict().items() if k not in _FREE_FIELDS}
