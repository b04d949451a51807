"""What drafters are trained to minimise: the EAGLE and the HASS objective, and the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..checks import COUNT, NOT_NEGATIVE, check_numbers
from ..drafters.modeling_eagle import EagleDrafter
from .features import features_of
from .steps import IGNORED, accepted_chains, harmonised_steps, scored_slots


@dataclass(frozen=True)
class ObjectiveOptions:
    """Which losses, with which weights. The defaults are EAGLE's, for large targets.

    Args:
        steps: how many tokens deep the drafter drafts in training. 1 is EAGLE; more is HASS's
            harmonised context alignment (arXiv 2408.15766, section 3.2; 3 there).
        regression_weight: of the smooth-L1 distance between predicted and true features (EAGLE,
            arXiv 2401.15077, section 3.2).
        token_weight: of the cross-entropy against the target's whole distribution (the same).
        top_k_weight: of the cross-entropy against the target's `top_k` likeliest tokens (HASS,
            section 3.1: -sum q log p; 1.0 there).
        top_k: how many those are (10 there).
        noise: half-width of the uniform noise added to the target's features that the drafter
            reads while training (EAGLE, section 4; in units of the features).
    """

    steps: int = 1
    regression_weight: float = 1.0
    token_weight: float = 0.1
    top_k_weight: float = 0.0
    top_k: int = 10
    noise: float = 0.1

    def __post_init__(self) -> None:
        weights = ("regression_weight", "token_weight", "top_k_weight", "noise")
        ranges = {"steps": COUNT, "top_k": COUNT, **dict.fromkeys(weights, NOT_NEGATIVE)}
        check_numbers(self, ranges)
        if not self.regression_weight + self.token_weight + self.top_k_weight:
            raise ValueError("All weights of the objective are 0, expected one above.")


class FrozenTarget:
    """What training needs of the target, outside of any module that is trained or saved.

    Args:
        target: the model, frozen.
        drafter: the drafter, for the tokens it scores.
    """

    def __init__(self, target: PreTrainedModel, drafter: EagleDrafter) -> None:
        self.model = target
        self.embedding = target.get_input_embeddings()
        head = target.get_output_embeddings()
        bias = getattr(head, "bias", None)
        self.head_weight = head.weight.detach()
        self.head_bias = None if bias is None else bias.detach()
        if drafter.draft_token_ids is not None:
            rows = drafter.draft_token_ids.to(self.head_weight.device)
            self.head_weight = self.head_weight[rows]
            self.head_bias = None if self.head_bias is None else self.head_bias[rows]

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Logits over the tokens the drafter scores, float32, from features (..., hidden)."""
        weight, bias = self.head_weight, self.head_bias
        return F.linear(features.to(weight.dtype), weight, bias).float()


@dataclass(frozen=True)
class _Wanted:
    """What n slots should predict; the same at every step, so it is computed once.

    Args:
        features: (n, hidden): the target's.
        probabilities: (n, scored tokens) float32: the target's distributions, if a loss needs them.
        likeliest: values and indices, (n, top_k) each, of the likeliest tokens, if one needs them.
    """

    features: torch.Tensor
    probabilities: torch.Tensor | None = None
    likeliest: torch.return_types.topk | None = None


class DraftObjective(nn.Module):
    """A drafter with the loss it is trained on; in evaluation mode, with what is measured.

    An objective is a subclass that was given a name by [`register_objective`].

    Args:
        drafter: the model that is trained.
        frozen: the target's side, not part of this module's state.
        options: which losses.
        evaluation_depth: length of the drafts that are replayed in evaluation.
    """

    title: ClassVar[str]
    """What model cards call drafters that were trained with it."""

    backbone: ClassVar[str]
    """What their configurations say of it: a value of `EagleDrafterConfig.backbone`."""

    published: ClassVar[Mapping[str, float | int]] = {}
    """Options of the paper, where they are not the defaults of [`ObjectiveOptions`]."""

    # Read by transformers' Trainer: the loss divides by the number of labels by itself.
    accepts_loss_kwargs = True

    def __init__(
        self,
        drafter: EagleDrafter,
        frozen: FrozenTarget,
        options: ObjectiveOptions,
        evaluation_depth: int = 5,
    ) -> None:
        super().__init__()
        self.drafter = drafter
        self.options = options
        self.evaluation_depth = evaluation_depth
        self._frozen = (frozen,)  # in a tuple: its tensors are the target's

    @classmethod
    def options_with(cls, **changes: float | int) -> ObjectiveOptions:
        """The options as published, with some values changed."""
        return ObjectiveOptions(**{**cls.published, **changes})

    @property
    def frozen(self) -> FrozenTarget:
        """The target's side."""
        return self._frozen[0]

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        features: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Losses of a batch.

        Args:
            input_ids: (batch, length) int64, padded on the right.
            labels: (batch, length) int64, `IGNORED` where nothing is scored; so are the first two.
            features: (batch, length - 1, hidden): the target's, of all tokens but the last;
                computed here if None.
            num_items_in_batch: what sums over tokens are divided by; by default the labels here.

        Returns:
            `loss`, and in training the sums `regression`, `token` and `top_k`, detached, in
            evaluation `counts` (see [`accepted_chains`]).
        """
        dtype = self.drafter.dtype
        # The target computes as it does in decoding, whatever precision the drafter is trained in.
        with torch.no_grad(), torch.autocast(input_ids.device.type, enabled=False):
            if features is None:
                features = features_of(self.frozen.model, input_ids[:, :-1])
            true = features[:, :-1].to(dtype)
            embeds = self.frozen.embedding(input_ids[:, 1:-1]).to(dtype)
        if num_items_in_batch is None:
            num_items_in_batch = (labels != IGNORED).sum()
        if not self.training:
            return self._evaluate(embeds, true, features, input_ids, labels)
        if self.options.noise:
            true = true + (torch.rand_like(true) * 2 - 1) * self.options.noise
        sums = dict.fromkeys(("regression", "token", "top_k"), features.new_zeros((), dtype=dtype))
        steps = harmonised_steps(self.drafter, embeds, true, self.options.steps)
        scored = scored_slots(labels, self.options.steps)
        wanted = self._wanted(features[:, 1:][scored[0]])
        for hidden, counted in zip(steps, scored):
            found = self._losses(hidden[scored[0]], wanted, counted[scored[0]])
            sums = {name: value + found[name] for name, value in sums.items()}
        weights = {name: getattr(self.options, f"{name}_weight") for name in sums}
        divisor = num_items_in_batch * self.options.steps
        loss = sum(weights[name] * value for name, value in sums.items()) / divisor
        return {"loss": loss, **{name: value.detach() for name, value in sums.items()}}

    @torch.no_grad()
    def _wanted(self, true: torch.Tensor) -> _Wanted:
        """What n slots should predict, from the true features (n, hidden)."""
        if not (self.options.token_weight or self.options.top_k_weight):
            return _Wanted(true)
        with torch.autocast(true.device.type, enabled=False):
            probabilities = self.frozen.scores(true).softmax(dim=1)
        if not self.options.top_k_weight:
            return _Wanted(true, probabilities)
        likeliest = probabilities.topk(min(self.options.top_k, probabilities.shape[1]), dim=1)
        return _Wanted(true, probabilities, likeliest)

    def _losses(
        self, predicted: torch.Tensor, wanted: _Wanted, counted: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Sums over those of n slots that count, (n,) bool, of predicted features (n, hidden)."""
        zero = predicted.new_zeros((), dtype=torch.float32)
        losses = dict.fromkeys(("regression", "token", "top_k"), zero)
        if self.options.regression_weight:
            distance = F.smooth_l1_loss(
                predicted.float(), wanted.features.float(), reduction="none"
            )
            losses["regression"] = (distance.mean(dim=1) * counted).sum()
        if wanted.probabilities is None:
            return losses
        log_p = self.frozen.scores(predicted).log_softmax(dim=1)
        if self.options.token_weight:
            losses["token"] = -((wanted.probabilities * log_p).sum(dim=1) * counted).sum()
        if wanted.likeliest is not None:
            foreseen = log_p.gather(1, wanted.likeliest.indices)
            losses["top_k"] = -((wanted.likeliest.values * foreseen).sum(dim=1) * counted).sum()
        return losses

    def _evaluate(
        self,
        embeds: torch.Tensor,
        true: torch.Tensor,
        features: torch.Tensor,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        depth = self.evaluation_depth
        scored = scored_slots(labels, depth)
        hits = []
        for step, hidden in enumerate(harmonised_steps(self.drafter, embeds, true, depth)):
            best = self.frozen.scores(hidden[scored[step]]).argmax(dim=1)
            if self.drafter.draft_token_ids is not None:
                best = self.drafter.draft_token_ids[best]
            hit = torch.zeros_like(scored[step])
            hit[scored[step]] = best == input_ids[:, 2:][scored[step]]
            hits.append(hit)
            if step == 0:
                wanted = self._wanted(features[:, 1:][scored[0]])
                found = self._losses(hidden[scored[0]], wanted, scored[0][scored[0]])
        counts = accepted_chains(hits, scored[0])
        weights = {name: getattr(self.options, f"{name}_weight") for name in found}
        loss = sum(weights[name] * value for name, value in found.items())
        return {"loss": loss / counts[:, 0].sum().clamp(min=1), "counts": counts}


_REGISTRY: dict[str, type[DraftObjective]] = {}
_Class = TypeVar("_Class", bound=type[DraftObjective])


def register_objective(name: str) -> Callable[[_Class], _Class]:
    """Class decorator: make an objective available as `--objective name`.

    Raises:
        ValueError: if the name is taken.
    """

    def register(cls: _Class) -> _Class:
        if name in _REGISTRY:
            raise ValueError(f"An objective named {name!r} is registered already.")
        _REGISTRY[name] = cls
        return cls

    return register


def list_objectives() -> tuple[str, ...]:
    """The registered names."""
    return tuple(sorted(_REGISTRY))


def get_objective(name: str) -> type[DraftObjective]:
    """An objective by its name.

    Raises:
        ValueError: for an unknown one.
    """
    if name not in _REGISTRY:
        raise ValueError(
            f"`objective` is {name!r}, expected one of {', '.join(list_objectives())}."
        )
    return _REGISTRY[name]


@register_objective("eagle")
class Eagle(DraftObjective):
    """Features and the target's whole distribution, one token deep (arXiv 2401.15077)."""

    title = "EAGLE-2"
    backbone = "eagle2"


@register_objective("hass")
class Hass(DraftObjective):
    """The same three tokens deep, and the target's likeliest tokens (arXiv 2408.15766)."""

    title = "HASS"
    backbone = "hass"
    published: ClassVar[Mapping[str, float | int]] = {"steps": 3, "top_k_weight": 1.0}
