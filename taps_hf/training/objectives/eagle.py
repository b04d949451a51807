"""The objectives of EAGLE and HASS: foresee the target's features, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch.nn import functional as F

from ...drafters.modeling_eagle import EagleDrafter
from .base import DraftObjective, register_objective


class FeatureObjective(DraftObjective):
    """Predicted features against the target's, and the target's distributions against theirs."""

    drafter_class = EagleDrafter
    starts = ("random", "least_squares")
    drafter_options = ("fc_bias", "input_norm")

    def scores(self, predicted: torch.Tensor) -> torch.Tensor:
        return self.frozen.scores(predicted)

    def losses(
        self, wanted: torch.Tensor
    ) -> Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]:
        options = self.options
        probabilities = likeliest = None
        if options.token_weight or options.top_k_weight:
            with torch.no_grad(), torch.autocast(wanted.device.type, enabled=False):
                probabilities = self.frozen.scores(wanted).softmax(dim=1)
        if options.top_k_weight:
            likeliest = probabilities.topk(min(options.top_k, probabilities.shape[1]), dim=1)

        def of(predicted: torch.Tensor, counted: torch.Tensor) -> dict[str, torch.Tensor]:
            zero = predicted.new_zeros((), dtype=torch.float32)
            found = dict.fromkeys(("regression", "token", "top_k"), zero)
            if options.regression_weight:
                distance = F.smooth_l1_loss(predicted.float(), wanted.float(), reduction="none")
                found["regression"] = (distance.mean(dim=1) * counted).sum()
            if probabilities is None:
                return found
            log_p = self.scores(predicted).log_softmax(dim=1)
            if options.token_weight:
                found["token"] = -((probabilities * log_p).sum(dim=1) * counted).sum()
            if likeliest is not None:
                foreseen = log_p.gather(1, likeliest.indices)
                found["top_k"] = -((likeliest.values * foreseen).sum(dim=1) * counted).sum()
            return found

        return of


@register_objective("eagle")
class Eagle(FeatureObjective):
    """Features and the target's whole distribution, one token deep (arXiv 2401.15077)."""

    title = "EAGLE-2"
    backbone = "eagle2"


@register_objective("hass")
class Hass(FeatureObjective):
    """The same three tokens deep, and the target's likeliest tokens (arXiv 2408.15766)."""

    title = "HASS"
    backbone = "hass"
    published: ClassVar[Mapping[str, float | int]] = {"steps": 3, "top_k_weight": 1.0}
