"""Drafting in training: what is predicted how deep, which slots count, what would be accepted.

Slot t of a drafter reads (token t + 1, feature t) and predicts feature t + 1, from which the
target's head scores token t + 2. It is *scored* where token t + 2 belongs to an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from ..drafters.modeling_feature import FeatureDrafter
from ..masks import additive
from .attention import attending_along_chains, can_attend_along_chains

IGNORED = -100  # label of a token that no drafter is asked to foresee


def harmonised_steps(
    drafter: FeatureDrafter,
    embeds: torch.Tensor,
    features: torch.Tensor,
    steps: int,
    cut: bool = True,
    first: int = 0,
) -> Iterator[torch.Tensor]:
    """Predictions when drafting 1, 2, ... `steps` tokens deep, at every slot at once.

    Step j at slot p is what the drafter computes at the j-th node of a chain that starts from the
    true features up to slot p - j + 1 and follows the true tokens. It reads its own prediction
    from step j - 1 at slot p - 1; its attention sees true slots up to p - j + 1, and behind them
    the slot p - j + i of each step i < j: the slots that chain would have left in the cache
    (HASS's harmonised context alignment, EAGLE-3's training-time test). Every step's slots are
    appended to one key-value cache and a mask picks among them, so this runs the modules that
    drafting runs; only where that is slow is the attention one that knows which they are (see
    [`attention`]). HASS's own code instead multiplies attention logits by 0 or 1 and masks again
    after the softmax without normalising anew; inference does neither.

    Args:
        embeds: (batch, slots, hidden): embeddings of the next tokens.
        features: (batch, slots, hidden): true features.
        steps: how deep.
        cut: whether gradients end at the features handed from step to step, as in HASS, where those
            are told what they should be. In EAGLE-3 only what follows from them tells.
        first: from which slot on chains start. Before it only the first step is run.

    Yields:
        (batch, slots, hidden) for each step. At step j no chain has come to the first j - 1 slots
        from `first` on; of slots before `first` later steps give zeros.
    """
    batch, slots = embeds.shape[:2]
    device = embeds.device
    if steps == 1:
        yield drafter(inputs_embeds=embeds, features=features).last_hidden_state
        return
    cache = DynamicCache(config=drafter.trunk.config)
    positions = torch.arange(slots, device=device)[None].expand(batch, -1)
    behind = positions[0] - positions[0, :, None]  # where a key stands, seen from a query
    unmasked = can_attend_along_chains(drafter.trunk, device)
    inputs, start = features, 0
    for step in range(1, steps + 1):
        mask, attending = None, nullcontext()  # at first plainly causal
        if step > 1 and unmasked:
            attending = attending_along_chains(drafter.trunk, first)
        elif step > 1:
            mask = _visible(behind, step, first)
            if drafter.trunk.config._attn_implementation == "eager":
                mask = additive(mask, embeds.dtype)
        with attending:
            hidden = drafter(
                inputs_embeds=embeds[:, start:],
                features=inputs,
                attention_mask=mask,
                position_ids=positions[:, start:],
                past_key_values=cache,
            ).last_hidden_state
        yield F.pad(hidden, (0, 0, start, 0))
        handed = hidden[:, first - start : -1]
        handed = handed.detach() if cut else handed
        start = first
        inputs = torch.cat([features[:, first : first + 1], handed.to(features.dtype)], dim=1)


def _visible(behind: torch.Tensor, step: int, first: int = 0) -> torch.Tensor:
    """(1, 1, n, slots + (step - 1) x n) bool: which slots of the steps so far those n look at.

    Args:
        behind: (slots, slots): key minus query.
        step: from 2.
        first: of all slots those n, the last ones, that are run after the first step.
    """
    # Of the first step all slots up to where a chain started, of step i the one step - i back.
    true = behind[first:] <= 1 - step
    offsets = torch.arange(2 - step, 1, device=behind.device)
    drafted = behind[first:, None, first:] == offsets[:, None]
    return torch.cat([true, drafted.flatten(1)], dim=1)[None, None]


def scored_slots(labels: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Which slots are scored at each step: (batch, length - 2) bool, one for each step.

    At step j those whose chain of j drafted tokens lies within one answer.

    Args:
        labels: (batch, length) int64: token ids, `IGNORED` outside of answers.
    """
    first = labels[:, 2:] != IGNORED
    scored = [first]
    for _ in range(1, steps):
        shifted = F.pad(scored[-1][:, :-1], (1, 0), value=False)
        scored.append(first & shifted)
    return scored


def accepted_chains(
    hits: Sequence[torch.Tensor], scored: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What chains of drafts would have had accepted, had one started at every scored slot.

    Args:
        hits: for each depth j, (batch, slots) bool: whether the token drafted by step j at a slot
            is the true one.
        scored: as [`scored_slots`] gives them, for as many depths.

    Returns:
        (batch, depths) float32 each: of the chains accepted to depth j - 1 those whose answer has a
        token j (of depth 1 all chains), and those accepted to depth j. The sum of the latter over
        all chains is the accepted length.
    """
    could, were = [], []
    alive = scored[0]
    for hit, within in zip(hits, scored):
        # A chain that started at slot p is at slot p + j - 1 at step j.
        could.append((alive & within).sum(dim=1))
        alive = alive & hit & within
        were.append(alive.sum(dim=1))
        alive = F.pad(alive[:, :-1], (1, 0), value=False)
    return torch.stack(could, dim=1).float(), torch.stack(were, dim=1).float()
