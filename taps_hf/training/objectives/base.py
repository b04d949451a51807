"""What all objectives share: their options, the target's side, a batch's losses; the registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ...checks import COUNT, NOT_NEGATIVE, Range, check_numbers
from ...drafters.modeling_feature import FeatureDrafter
from ...target import LAST
from ..features import features_of
from ..steps import IGNORED, accepted_chains, harmonised_steps, scored_slots


@dataclass(frozen=True)
class ObjectiveOptions:
    """Which losses, with which weights. The defaults are EAGLE's, for large targets.

    Args:
        steps: how many tokens deep the drafter drafts in training. 1 is EAGLE; more is HASS's
            harmonised context alignment (arXiv 2408.15766, section 3.2; 3 there) and EAGLE-3's
            training-time test (arXiv 2503.01840, section 3.2; 7 in its code).
        decay: weight of every step, of that of the step before it (0.8 in EAGLE-3's code).
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
    decay: float = 1.0
    regression_weight: float = 1.0
    token_weight: float = 0.1
    top_k_weight: float = 0.0
    top_k: int = 10
    noise: float = 0.1

    def __post_init__(self) -> None:
        weights = ("regression_weight", "token_weight", "top_k_weight", "noise")
        ranges = {"steps": COUNT, "top_k": COUNT, **dict.fromkeys(weights, NOT_NEGATIVE)}
        check_numbers(self, {**ranges, "decay": Range(above=0)})
        if not self.regression_weight + self.token_weight + self.top_k_weight:
            raise ValueError("All weights of the objective are 0, expected one above.")


class FrozenTarget:
    """What training needs of the target, outside of any module that is trained or saved.

    Args:
        target: the model, frozen.
        drafter: the drafter, for the tokens it scores.
    """

    def __init__(self, target: PreTrainedModel, drafter: FeatureDrafter) -> None:
        self.model = target
        self.embedding = target.get_input_embeddings()
        self.hidden_size = target.config.get_text_config(decoder=True).hidden_size
        self._drafter = drafter

    @cached_property
    def _head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of the head."""
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return head.weight.detach(), None if bias is None else bias.detach()

    @cached_property
    def _scored_head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same, of the tokens that the drafter scores."""
        weight, bias = self._head
        if self._drafter.draft_token_ids is None:
            return weight, bias
        rows = self._drafter.draft_token_ids.to(weight.device)
        return weight[rows], None if bias is None else bias[rows]

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Logits over the tokens the drafter scores, float32, from features (..., hidden)."""
        weight, bias = self._scored_head
        return F.linear(features.to(weight.dtype), weight, bias).float()

    def all_scores(self, features: torch.Tensor) -> torch.Tensor:
        """Logits over all tokens, in the head's dtype, from features (..., hidden)."""
        weight, bias = self._head
        return F.linear(features.to(weight.dtype), weight, bias)


@dataclass(frozen=True)
class Batch:
    """What an objective computes its losses from.

    Args:
        embeds: (batch, slots, hidden): embeddings of the next tokens, in the drafter's dtype.
        states: (batch, slots, layers x hidden): the target's states that the drafter reads, the
            same.
        wanted: (n, hidden): the target's last hidden states that scored slots should predict.
        tokens: (n,) int64: the tokens that come after those.
        slots: (n,) int64: the scored slots, as indices into (batch, slots) laid flat.
        scored: for each step, (batch, slots) bool (see [`scored_slots`]).
    """

    embeds: torch.Tensor
    states: torch.Tensor
    wanted: torch.Tensor
    tokens: torch.Tensor
    slots: torch.Tensor
    scored: list[torch.Tensor]

    def at_slots(self, values: torch.Tensor) -> torch.Tensor:
        """(n, ...): those at the scored slots, of (batch, slots, ...)."""
        return values.flatten(0, 1).index_select(0, self.slots)


class DraftObjective(nn.Module, ABC):
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
    """What their configurations say of it."""

    drafter_class: ClassVar[type[FeatureDrafter]]
    """Which drafters it trains."""

    published: ClassVar[Mapping[str, float | int]] = {}
    """Options of the paper, where they are not the defaults of [`ObjectiveOptions`]."""

    starts: ClassVar[tuple[str, ...]]
    """Where a new drafter's weights can start (see [`start`])."""

    cuts_gradients: ClassVar[bool] = True
    """Whether they end at what is handed from step to step (see [`harmonised_steps`])."""

    drafter_options: ClassVar[tuple[str, ...]]
    """Options of a run that shape its drafters, by the names of fields of their configurations."""

    # Read by transformers' Trainer: the loss divides by the number of labels by itself.
    accepts_loss_kwargs = True

    def __init__(
        self,
        drafter: FeatureDrafter,
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
        """The options as published, with some values changed.

        Raises:
            ValueError: for values that the objective cannot have.
        """
        return ObjectiveOptions(**{**cls.published, **changes})

    @property
    def frozen(self) -> FrozenTarget:
        """The target's side."""
        return self._frozen[0]

    @property
    def layers(self) -> tuple[int, ...]:
        """Whose states a batch's features are: those that the drafter reads, and the last ones."""
        read = tuple(self.drafter.reads_layers)
        return read if LAST in read else (*read, LAST)

    @abstractmethod
    def scores(self, predicted: torch.Tensor) -> torch.Tensor:
        """Logits (n, scored tokens) of predictions (n, hidden)."""

    @abstractmethod
    def losses(
        self, wanted: torch.Tensor
    ) -> Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]:
        """Losses against what n slots should predict, (n, hidden), the same at every step.

        Returns:
            a function of predictions (n, hidden) and of which of them count, (n,) bool, to sums
            over these by name: those for which [`ObjectiveOptions`] has weights.
        """

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        features: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Losses of a batch.

        Args:
            input_ids: (batch, length) int64, padded on the right.
            labels: (batch, length) int64, `IGNORED` where nothing is scored; so are the first two.
            features: (batch, length - 1, layers x hidden): the target's states of `layers`, of all
                tokens but the last; computed here if None.
            slots: (n,) int64: the scored slots, see [`Batch`]; found here if None, for which a
                device has to be waited for.
            num_items_in_batch: what sums over tokens are divided by; by default the labels here.

        Returns:
            `loss`, and in training the sums of each loss over slots and weighted steps, detached,
            in evaluation `counts`, (batch, depths, 2): both of [`accepted_chains`].
        """
        depth = self.options.steps if self.training else self.evaluation_depth
        batch = self._batch(input_ids, labels, features, slots, depth)
        if not self.training:
            return self._evaluate(batch)
        if num_items_in_batch is None:
            num_items_in_batch = (labels != IGNORED).sum()
        losses = self.losses(batch.wanted)
        sums: dict[str, torch.Tensor] = {}
        weight = total = 1.0
        for step, hidden in enumerate(self._steps(batch, depth, self.options.noise)):
            if step:
                weight *= self.options.decay
                total += weight
            found = losses(batch.at_slots(hidden), batch.at_slots(batch.scored[step]))
            sums = {name: sums.get(name, 0.0) + weight * value for name, value in found.items()}
        loss = self._weighted(sums) / (num_items_in_batch * total)
        return {"loss": loss, **{name: value.detach() for name, value in sums.items()}}

    def _steps(self, batch: Batch, depth: int, noise: float = 0.0) -> Iterator[torch.Tensor]:
        """What the drafter predicts 1, 2, ... `depth` tokens deep: (batch, slots, hidden) each.

        Args:
            noise: half-width of uniform noise on the target's states that the drafter reads.
        """
        states = batch.states
        if noise:
            states = states + (torch.rand_like(states) * 2 - 1) * noise
        first = 0
        if states.device.type == "cpu":  # another device would have to be waited for
            first = int(batch.scored[0].any(dim=0).int().argmax())
        return harmonised_steps(
            self.drafter, batch.embeds, self.fuse(states), depth, self.cuts_gradients, first
        )

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """What the drafter makes of the target's states, (batch, slots, layers x hidden)."""
        return self.drafter.fuse(states)

    def finish(self) -> None:
        """Leave the drafter as it is used outside of this module, when all is learnt."""

    def _batch(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        features: torch.Tensor | None,
        slots: torch.Tensor | None,
        depth: int,
    ) -> Batch:
        dtype = self.drafter.dtype
        scored = scored_slots(labels, depth)
        if slots is None:
            slots = scored[0].flatten().nonzero()[:, 0]
        # The target computes as it does in decoding, whatever precision the drafter is trained in.
        with torch.no_grad(), torch.autocast(input_ids.device.type, enabled=False):
            if features is None:
                features = features_of(self.frozen.model, input_ids[:, :-1], layers=self.layers)
            parts = features.split(self.frozen.hidden_size, dim=2)
            last = parts[self.layers.index(LAST)]
            read = features[..., : len(self.drafter.reads_layers) * self.frozen.hidden_size]
            return Batch(
                embeds=self.frozen.embedding(input_ids[:, 1:-1]).to(dtype),
                states=read[:, :-1].to(dtype),
                wanted=last[:, 1:].flatten(0, 1)[slots],
                tokens=input_ids[:, 2:].flatten()[slots],
                slots=slots,
                scored=scored,
            )

    def _weighted(self, sums: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return sum(getattr(self.options, f"{name}_weight") * value for name, value in sums.items())

    @torch.no_grad()
    def _evaluate(self, batch: Batch) -> dict[str, torch.Tensor]:
        hits = []
        loss = batch.wanted.new_zeros((), dtype=torch.float32)
        for step, hidden in enumerate(self._steps(batch, self.evaluation_depth)):
            predicted = batch.at_slots(hidden)
            best = self.scores(predicted).argmax(dim=1)
            if self.drafter.draft_token_ids is not None:
                best = self.drafter.draft_token_ids[best]
            hit = torch.zeros_like(batch.scored[0])
            hit.view(-1)[batch.slots] = best == batch.tokens
            hits.append(hit)
            if step == 0:
                counted = torch.ones_like(batch.slots, dtype=torch.bool)
                loss = self._weighted(self.losses(batch.wanted)(predicted, counted))
        could, were = accepted_chains(hits, batch.scored)
        counts = torch.stack([could, were], dim=2)
        return {"loss": loss / could[:, 0].sum().clamp(min=1), "counts": counts}


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
