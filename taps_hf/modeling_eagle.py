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
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache import CACHE
from .configuration_eagle import EagleDrafterConfig


class EagleDrafter(PreTrainedModel):
    """A one-layer, feature-level draft model.

    Build one with [`EagleDrafter.from_target`] (random weights) or load one with `from_pretrained`.
    It is stateless: the key-value cache of a running generation belongs to the caller.
    """

    config_class = EagleDrafterConfig
    base_model_prefix = "drafter"
    _supports_sdpa = True
    _supports_flash_attn = False

    def __init__(self, config: EagleDrafterConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.fc = nn.Linear(2 * width, width, bias=config.fc_bias)
        layer_config = config.build_layer_config()
        attention = config._attn_implementation or "sdpa"
        if attention == "sdpa" and not MODEL_MAPPING[type(layer_config)]._supports_sdpa:
            attention = "eager"
        trunk = AutoModel.from_config(layer_config, attn_implementation=attention)
        missing = [name for name in ("embed_tokens", "layers", "norm") if not hasattr(trunk, name)]
        if missing:
            raise ValueError(
                f"Drafters for the family {config.layer_config['model_type']!r} are not supported: "
                f"its transformers model has no {', '.join(missing)} (expected a Llama-like one)."
            )
        trunk.embed_tokens = None
        trunk.norm = nn.Identity()
        if not config.input_norm:
            trunk.layers[0].input_layernorm = nn.Identity()
        self.trunk = trunk
        # (draft_vocab_size,) int64, the most frequent first: the tokens that the drafter scores;
        # None for all.
        size = config.draft_vocab_size
        self.register_buffer("draft_token_ids", None if size is None else torch.arange(size))
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
            **config_kwargs: fields of [`EagleDrafterConfig`].

        Raises:
            ValueError: as [`score_only`].
        """
        config = EagleDrafterConfig.from_target(target.config, **config_kwargs)
        # Not cls(config).to(dtype): that would round the rotary frequencies too, and a checkpoint
        # loads with exact ones.
        drafter = cls._from_config(config, dtype=target.dtype)
        drafter.score_only(draft_token_ids)
        return drafter.to(target.device)

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
        if isinstance(draft_token_ids, int):
            scored = self.draft_token_ids
            if scored is None:
                scored = torch.arange(self.config.vocab_size)
            if not 0 < draft_token_ids <= len(scored):
                raise ValueError(
                    f"`draft_token_ids` is {draft_token_ids}, expected 1 to {len(scored)}, the "
                    "number of tokens that the drafter scores."
                )
            draft_token_ids = scored[:draft_token_ids].clone()
        if draft_token_ids is not None:
            draft_token_ids = draft_token_ids.to(self.device)
            ids = draft_token_ids.unique()
            known = (ids >= 0) & (ids < self.config.vocab_size)
            if not len(ids) or len(ids) < len(draft_token_ids) or not known.all():
                raise ValueError(
                    f"`draft_token_ids` has {len(draft_token_ids)} entries, {len(ids)} of them "
                    f"distinct and {int(known.sum())} of these token ids; expected one or more, "
                    f"all distinct and from 0 to {self.config.vocab_size - 1}."
                )
        self.draft_token_ids = draft_token_ids
        self.config.draft_vocab_size = None if draft_token_ids is None else len(draft_token_ids)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, for complete safetensors checkpoints only.

        Raises:
            ValueError: if `use_safetensors=False` is asked for (a pickle can run code), or if the
                checkpoint lacks a weight, has one too many, or one of another shape.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors` is False, but drafters load from safetensors only.")
        kwargs["use_safetensors"] = True
        kwargs["ignore_mismatched_sizes"] = True  # they are refused below, like other misfits
        wants_info = kwargs.pop("output_loading_info", False)
        drafter, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = {k: sorted(map(str, info[k])) for k in info if k.endswith("_keys") and info[k]}
        if wrong:
            raise ValueError(f"The checkpoint {args[:1]} does not fit its configuration: {wrong}.")
        return (drafter, info) if wants_info else drafter

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Predict the next features.

        Args:
            inputs_embeds: (batch, length, hidden): the target's embeddings of the *next* tokens.
            features: (batch, length, hidden): the target's last hidden states, or, beyond the known
                prefix, the drafter's own predictions of them.
            attention_mask: None (causal), (batch, past + length), or a prepared 4-D mask of shape
                (batch, 1, length, past + length), boolean, True where a query may look.
            position_ids: (batch, length) int64.
            past_key_values: a cache with one layer, extended in place.

        Returns:
            `last_hidden_state` of shape (batch, length, hidden): predictions of the next features.
        """
        hidden = self.fc(torch.cat([inputs_embeds, features], dim=-1))
        return self.trunk(
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=past_key_values is not None if use_cache is None else use_cache,
            **{CACHE: past_key_values},
            **kwargs,
        )


AutoConfig.register(EagleDrafterConfig.model_type, EagleDrafterConfig)
AutoModel.register(EagleDrafterConfig, EagleDrafter)
