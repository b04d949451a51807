"""The drafter that a run trains: another one, or a new one for the target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.configuration_eagle import tokenizer_fingerprint
from ..drafters.modeling_feature import FeatureDrafter
from ..loading import load_drafter
from .encoding import Example
from .objectives import get_objective
from .options import TrainOptions
from .start import check_can_be_fitted
from .trainer import frequent_tokens


def drafter_to_train(
    options: TrainOptions,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
) -> FeatureDrafter:
    """A drafter in float32 and in training mode, on the target's device.

    Args:
        options: of the run.
        target, tokenizer: that it drafts for.
        examples: whose answers say which tokens are frequent.

    Raises:
        ValueError: if `init_from` is no drafter of this kind, or `start` does not go with a target
            of this one.
    """
    tokens = None
    if options.draft_vocab is not None:
        size = target.get_output_embeddings().weight.shape[0]
        tokens = frequent_tokens(examples, options.draft_vocab, size)
    build = _new_drafter if options.init_from is None else _given_drafter
    drafter = build(options, target, tokenizer, tokens)
    if options.context_window is not None:
        drafter.config.context_window = options.context_window
    return drafter.train()


def _given_drafter(
    options: TrainOptions,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: torch.Tensor | None,
) -> FeatureDrafter:
    path, objective = options.init_from, get_objective(options.objective)
    called = f"`init_from` ({path})"
    drafter = load_drafter(path, target, tokenizer, called=called, dtype=torch.float32)
    if not isinstance(drafter, objective.drafter_class):
        raise ValueError(
            f"{called} is a {type(drafter).__name__}, expected the "
            f"{objective.drafter_class.__name__} that `objective` {options.objective} trains."
        )
    asked = _shape(options)
    found = {name: getattr(drafter.config, name) for name in asked}
    if found != asked:
        raise ValueError(f"`init_from` is a drafter with {found}, but {asked} was asked for.")
    for name, value in _provenance(options).items():
        setattr(drafter.config, name, value)
    if tokens is not None:
        drafter.score_only(tokens)
    return drafter


def _new_drafter(
    options: TrainOptions,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: torch.Tensor | None,
) -> FeatureDrafter:
    torch.manual_seed(options.seed)
    kind = get_objective(options.objective).drafter_class
    drafter = kind.from_target(
        target,
        draft_token_ids=tokens,
        target_name_or_path=target.config.name_or_path,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        **_shape(options),
        **_provenance(options),
    ).float()
    if options.start == "least_squares":
        check_can_be_fitted(drafter)
    return drafter


def _shape(options: TrainOptions) -> dict[str, object]:
    """What was asked for of the fields that shape its drafter."""
    names = get_objective(options.objective).drafter_options
    return {name: value for name in names if (value := getattr(options, name))}


def _provenance(options: TrainOptions) -> dict[str, object]:
    """What its configuration says of this run."""
    objective = get_objective(options.objective)
    found: dict[str, object] = {"training_data": [str(Path(text).name) for text in options.data]}
    if not hasattr(objective.drafter_class.config_class, "backbone"):
        found["backbone"] = objective.backbone  # several objectives train drafters of this kind
    return found
