"""The drafter: a projection and one decoder layer of the target's family.

At sequence index t the drafter reads the embedding of the token at t + 1 and the target's feature
at t (its last hidden state, i.e. what its LM head reads) and predicts the next feature

    f_hat[t + 1] = Layer(fc([embed(x[t + 1]); f[t]]))

which the target's own frozen LM head turns into token scores (EAGLE, arXiv 2401.15077, section
3.1; EAGLE-2 and HASS share the architecture). Embedding and head are the target's and are never
part of a drafter or of its checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..target import LAST
from .configuration_eagle import EagleDrafterConfig
from .modeling_feature import FeatureDrafter


class EagleDrafter(FeatureDrafter):
    """A one-layer draft model whose head is the target's (EAGLE-2, HASS).

    Build one with [`EagleDrafter.from_target`] (random weights) or load one with `from_pretrained`.
    """

    config_class = EagleDrafterConfig
    reads_layers = (LAST,)

    def __init__(self, config: EagleDrafterConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        # First, so that seeds give the weights that they always gave.
        self.fc = nn.Linear(2 * width, width, bias=config.fc_bias)
        self.make_trunk()
        if not config.input_norm:
            self.trunk.layers[0].input_layernorm = nn.Identity()
        self.post_init()

    @classmethod
    def from_target(
        cls,
        target: PreTrainedModel,
        draft_token_ids: torch.Tensor | int | None = None,
        **config_kwargs: Any,
    ) -> EagleDrafter:
        """A randomly initialised drafter that fits `target`, in the target's dtype, on its device.

        Args:
            target: the model to be accelerated.
            draft_token_ids: see [`score_only`].
            **config_kwargs: as [`EagleDrafterConfig.from_target`].

        Raises:
            ValueError: as [`score_only`] and [`EagleDrafterConfig.from_target`], or if the family's
                layer does not run as a drafter's.
        """
        config = EagleDrafterConfig.from_target(target.config, **config_kwargs)
        # Not cls(config).to(dtype): that would round the rotary frequencies too, and a checkpoint
        # loads with exact ones.
        drafter = cls._from_config(config, dtype=target.dtype)
        drafter.score_only(draft_token_ids)
        drafter.to(target.device).check_runs()
        return drafter

    def score_only(self, draft_token_ids: torch.Tensor | int | None) -> None:
        """Change which tokens the drafter scores: its weights do not depend on that.

        Fewer make drafting faster, as the head is most of a small drafter's step, and propose a
        little worse. What is generated stays the same.

        Args:
            draft_token_ids: int64 of shape (draft_vocab_size,), without repetition, the most
                frequent first; None for all. A number keeps the first so many of those scored now
                (of all: the lowest, as tokenizers learn frequent tokens first).

        Raises:
            ValueError: if they repeat or exceed the vocabulary, or if there are not so many.
        """
        draft_token_ids = self.resolve_token_ids(draft_token_ids)
        self.draft_token_ids = draft_token_ids
        self.config.draft_vocab_size = None if draft_token_ids is None else len(draft_token_ids)

    def join(self, inputs_embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.cat([inputs_embeds, features], dim=-1))


# A `custom_generate` repository has a copy of this module, and may be loaded more than once.
AutoConfig.register(EagleDrafterConfig.model_type, EagleDrafterConfig, exist_ok=True)
AutoModel.register(EagleDrafterConfig, EagleDrafter, exist_ok=True)
