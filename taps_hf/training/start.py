"""Where a drafter's weights start, before any step of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from ..drafters.modeling_eagle import EagleDrafter
from ..drafters.modeling_eagle3 import Eagle3Drafter
from ..drafters.modeling_feature import FeatureDrafter
from .encoding import Example
from .objectives import Eagle3

_SLOTS = 100_000  # that the projection is fitted to, at most
_RIDGE = 1e-3  # penalty, in units of the inputs' variances


@torch.no_grad()
def balance_inputs(
    drafter: EagleDrafter,
    embedding: torch.nn.Module,
    examples: Sequence[Example],
    features_of: Callable[[Example], torch.Tensor],
) -> None:
    """Scale the projection so that embedding and feature contribute alike before training.

    A target's embeddings are often ten and more times smaller than its features. With equal initial
    weights the next token, half of what the drafter is told, would at first be lost.

    Args:
        drafter: changed in place.
        embedding: the target's.
        examples: what it will be trained on.
        features_of: the target's features of an example's tokens but the last, (n - 1, hidden).
    """
    few = examples[:16]
    features = torch.cat([features_of(example) for example in few]).float()
    tokens = torch.cat([torch.tensor(example.input_ids) for example in few])
    embeds = embedding(tokens.to(drafter.device)).float()
    width = drafter.config.hidden_size
    drafter.fc.weight[:, :width] *= (features.std() / embeds.std()).to(drafter.device)


@torch.no_grad()
def balance_layers(
    objective: Eagle3,
    examples: Sequence[Example],
    features_of: Callable[[Example], torch.Tensor],
    scale: bool,
) -> None:
    """Have an EAGLE-3 drafter's projection learn of all that it reads alike.

    See [`Eagle3.divide_inputs`]; a drafter with norms before its projection needs none of it.

    Args:
        objective: with the drafter, changed in place.
        examples: what it will be trained on.
        features_of: the target's states of an example's tokens but the last, (n - 1, layers x
            hidden): those that the drafter reads, and maybe others after them.
        scale: also change what the projection computes, to features of size 1 to which every
            dimension contributes alike: for new drafters.
    """
    drafter = objective.drafter
    read = torch.cat([features_of(example) for example in examples[:16]])
    read = read[:, : drafter.feature_size].to(drafter.device).float()
    sizes = read.std(dim=0).clamp(min=1e-6)
    plain = drafter.fc_norm is None and drafter.input_norm is None
    if scale and plain:
        drafter.fc.weight /= sizes
    if scale:
        drafter.fc.weight /= drafter.fuse(read).std()
    if plain:
        objective.divide_inputs(sizes)


@torch.no_grad()
def copy_head(drafter: Eagle3Drafter, target: PreTrainedModel) -> None:
    """Start an EAGLE-3 drafter's head as the target's.

    The norm before it starts with weights so small that scores are about as far apart as those of a
    random head: the target's own would be certain of whatever a new drafter's states resemble.

    Args:
        drafter: changed in place.
        target: that it drafts for.
    """
    rows = target.get_output_embeddings().weight
    if drafter.draft_token_ids is not None:
        rows = rows[drafter.draft_token_ids.to(rows.device)]
    drafter.lm_head.weight.copy_(rows)
    drafter.norm.weight.fill_(1 / drafter.lm_head.weight.norm(dim=1).mean())


def check_can_be_fitted(drafter: FeatureDrafter) -> None:
    """Raise `ValueError` unless the layer adds its outputs to what the projection gives."""
    layer = drafter.trunk.layers[0]
    # Gemma's layers normalise their outputs before adding them: no weights make those small.
    fits = hasattr(getattr(layer, "self_attn", None), "o_proj")
    fits = fits and hasattr(getattr(layer, "mlp", None), "down_proj")
    if not fits or hasattr(layer, "post_feedforward_layernorm"):
        raise ValueError(
            f"`start` is 'least_squares', but a {type(layer).__name__} has other outputs than "
            "those of `o_proj` and `down_proj`; expected 'random'."
        )


@torch.no_grad()
def fit_projection(
    drafter: EagleDrafter,
    embedding: torch.nn.Module,
    examples: Sequence[Example],
    features_of: Callable[[Example], torch.Tensor],
) -> float:
    """Start as the best linear prediction of the next feature, with a layer that adds nothing.

    Ridge regression of feature t + 1 on (embedding of token t + 1, feature t), over the slots of
    the answers. The layer's outputs start at zero and learn what a linear map cannot predict.

    Args:
        drafter: float32, changed in place; [`check_can_be_fitted`] must have passed.
        embedding: the target's.
        examples: what it will be trained on.
        features_of: the target's features of an example's tokens but the last, (n - 1, hidden).

    Returns:
        share of the features' variance that the projection explains, from -inf to 1.
    """
    device, width = drafter.device, drafter.config.hidden_size
    sums = _Sums(2 * width, width, device)
    for example in examples:
        features = features_of(example).to(device)
        tokens = torch.tensor(example.input_ids[1:-1], device=device)
        slots = torch.tensor(example.is_answer[2:], device=device)
        embeds = embedding(tokens).to(device, features.dtype)
        sums.add(torch.cat([embeds, features[:-1]], dim=1)[slots], features[1:][slots])
        if sums.count >= _SLOTS:
            break
    fitted = sums.solution(drafter.config.fc_bias)
    drafter.fc.weight.copy_(fitted[:-1].T)
    if drafter.fc.bias is not None:
        drafter.fc.bias.copy_(fitted[-1])
    _silence(drafter.trunk.layers[0])
    return sums.explained(fitted)


def _silence(layer: torch.nn.Module) -> None:
    """Have a layer add nothing to what it reads."""
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        linear.weight.zero_()
        if linear.bias is not None:
            linear.bias.zero_()


class _Sums:
    """Sums of products for a ridge regression, the last input of which is constant.

    In float64: features have dimensions ten and more times larger than others.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        how = {"dtype": torch.float64, "device": device}
        self.gram = torch.zeros(inputs + 1, inputs + 1, **how)
        self.cross = torch.zeros(inputs + 1, outputs, **how)
        self.squares = torch.zeros(outputs, **how)
        self.count = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Slots, (n, inputs) and (n, outputs)."""
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).double()
        y = y.double()
        self.gram += x.T @ x
        self.cross += x.T @ y
        self.squares += (y * y).sum(dim=0)
        self.count += len(x)

    def solution(self, with_constant: bool) -> torch.Tensor:
        """(inputs + 1, outputs): weights, and a constant, which may be bound to be 0."""
        gram, cross = self.gram.clone(), self.cross.clone()
        if not with_constant:
            gram[-1, :-1] = gram[:-1, -1] = cross[-1] = 0.0
        means = gram[-1, :-1] / self.count
        variance = gram.diagonal()[:-1] / self.count - means**2
        penalty = torch.cat([variance, variance.new_zeros(1)]).clamp(min=1e-12)
        return torch.linalg.solve(gram + torch.diag(penalty * _RIDGE * self.count), cross)

    def explained(self, fitted: torch.Tensor) -> float:
        """Share of the outputs' variance that a solution explains, from -inf to 1."""
        left = self.squares - 2 * (fitted * self.cross).sum(dim=0)
        left += (fitted * (self.gram @ fitted)).sum(dim=0)
        total = self.squares - self.cross[-1] ** 2 / self.count
        return 1.0 - float(left.sum() / total.sum())
