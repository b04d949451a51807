"""The EAGLE-3 drafter: one layer over features of several of the target's layers, with a head.

Of the target's hidden states h of some layers it makes one feature, once, and from then on feeds
itself its own states (arXiv 2503.01840, section 3; `e` is the embedding of the *next* token):

    g[t]     = fc([h_low[t]; h_mid[t]; h_high[t]])        or, beyond the known prefix, out[t]
    r[t]     = g[t] + Attention([norm(e[t + 1]); norm(g[t])])
    out[t+1] = r[t] + MLP(norm(r[t]))
    logits   = lm_head(norm(out[t+1]))

So nothing ties its states to the target's features. Norms, projection, head and the choice of
scored tokens are its own; only the embedding is the target's. In the attention, rotary positions
and MLP of its layer it is a Llama or a Qwen3: those modules are transformers'.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_eagle3 import Eagle3DrafterConfig
from .modeling_feature import FeatureDrafter


class Eagle3Layer(nn.Module):
    """A decoder layer whose attention reads [embedding; feature], and whose residual the feature.

    Args:
        layer: of a Llama-like family; its modules are taken over.
        norm_before_residual: see [`Eagle3DrafterConfig`].
    """

    def __init__(self, layer: nn.Module, norm_before_residual: bool) -> None:
        super().__init__()
        self.norm_before_residual = norm_before_residual
        # Early versions of transformers ask Qwen3's layers which mask they want.
        self.attention_type = "full_attention"
        self.self_attn = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(self.self_attn, name)
            wide = nn.Linear(
                2 * narrow.in_features, narrow.out_features, bias=narrow.bias is not None
            )
            setattr(self.self_attn, name, wide)
        self.mlp = layer.mlp
        self.input_layernorm = layer.input_layernorm  # of the embedding
        self.hidden_norm = _norm_like(layer.input_layernorm)  # of the feature
        self.post_attention_layernorm = layer.post_attention_layernorm

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(batch, length, hidden) from (batch, length, 2 * hidden), [embedding; feature].

        Args:
            hidden_states: embeddings and features side by side.
            **kwargs: of the family's attention.
        """
        embeds, features = hidden_states.chunk(2, dim=-1)
        normed = self.hidden_norm(features)
        residual = normed if self.norm_before_residual else features
        read = torch.cat([self.input_layernorm(embeds), normed], dim=-1)
        residual = residual + self.self_attn(hidden_states=read, **kwargs)[0]
        return residual + self.mlp(self.post_attention_layernorm(residual))


def _norm_like(norm: nn.Module, size: int | None = None) -> nn.Module:
    """Another norm of its kind, as wide or of some other width."""
    return type(norm)(len(norm.weight) if size is None else size, eps=norm.variance_epsilon)


class Eagle3Drafter(FeatureDrafter):
    """A one-layer draft model with a head of its own, which reads several of the target's layers.

    Build one with [`Eagle3Drafter.from_target`] (random weights) or load one with
    `from_pretrained`.
    """

    config_class = Eagle3DrafterConfig
    has_own_head = True

    def __init__(self, config: Eagle3DrafterConfig) -> None:
        super().__init__(config)
        self.make_trunk()
        width, read = config.hidden_size, self.feature_size
        layer = Eagle3Layer(self.trunk.layers[0], config.norm_before_residual)
        self.trunk.layers[0] = layer
        norm = layer.input_layernorm
        self.input_norm = _norm_like(norm, read) if config.norm_before_fc else None
        self.fc_norm = None
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(_norm_like(norm) for _ in config.layer_ids)
        self.fc = nn.Linear(read, width, bias=False)
        self.norm = _norm_like(norm)
        self.lm_head = nn.Linear(width, self.num_scored_tokens, bias=False)
        self.post_init()

    @classmethod
    def from_target(
        cls,
        target: PreTrainedModel,
        draft_token_ids: torch.Tensor | int | None = None,
        **config_kwargs: Any,
    ) -> Eagle3Drafter:
        """A randomly initialised drafter that fits `target`, in the target's dtype, on its device.

        Args:
            target: the model to be accelerated.
            draft_token_ids: which tokens are scored: int64 of shape (draft_vocab_size,), without
                repetition, in any order: they are kept in ascending order. None for all, a number
                for the lowest so many, as tokenizers learn frequent tokens first.
            **config_kwargs: as [`Eagle3DrafterConfig.from_target`].

        Raises:
            ValueError: if token ids repeat or exceed the vocabulary, and as
                [`Eagle3DrafterConfig.from_target`].
        """
        config = Eagle3DrafterConfig.from_target(target.config, **config_kwargs)
        if isinstance(draft_token_ids, int):
            config.draft_vocab_size = draft_token_ids
        elif draft_token_ids is not None:
            draft_token_ids = draft_token_ids.sort().values
            config.draft_vocab_size = len(draft_token_ids)
        config._check()
        # Not cls(config).to(dtype): that would round the rotary frequencies too.
        drafter = cls._from_config(config, dtype=target.dtype)
        if isinstance(draft_token_ids, torch.Tensor):
            drafter.check_token_ids(draft_token_ids)
            drafter.draft_token_ids.copy_(draft_token_ids)
        drafter.to(target.device).check_runs()
        return drafter

    @property
    def reads_layers(self) -> tuple[int, ...]:
        """What layer L - 1 gives is what `hidden_states[L]` holds."""
        return tuple(layer - 1 for layer in self.config.layer_ids)

    @property
    def feature_size(self) -> int:
        return len(self.config.layer_ids) * self.config.hidden_size

    def score_only(self, draft_token_ids: torch.Tensor | int | None) -> None:
        """Score fewer tokens: the head keeps their rows only, in ascending order of the ids.

        Args:
            draft_token_ids: int64, without repetition, of those scored now; a number for the lowest
                so many; None changes nothing.

        Raises:
            ValueError: if the drafter's head has no rows for some of them.
        """
        if draft_token_ids is None:
            return
        if isinstance(draft_token_ids, torch.Tensor):
            draft_token_ids = draft_token_ids.sort().values
        wanted = self.resolve_token_ids(draft_token_ids)
        scored = self.draft_token_ids
        if scored is None:
            scored = torch.arange(self.config.vocab_size, device=self.device)
        rows = torch.searchsorted(scored, wanted).clamp(max=len(scored) - 1)
        unknown = int((scored[rows] != wanted).sum())
        if unknown:
            raise ValueError(
                f"`draft_token_ids` has {unknown} tokens that the drafter's own head does not "
                f"score, expected some of the {len(scored)} that it does."
            )
        head = nn.Linear(self.config.hidden_size, len(wanted), bias=False, device="meta")
        head.weight = nn.Parameter(self.lm_head.weight.detach()[rows])
        head.weight.requires_grad_(self.lm_head.weight.requires_grad)
        self.lm_head, self.draft_token_ids = head, wanted
        self.config.draft_vocab_size = len(wanted)

    def check_token_ids(self, draft_token_ids: torch.Tensor) -> None:
        """Raise `ValueError` unless these are tokens of the target's, in ascending order."""
        super().check_token_ids(draft_token_ids)
        if (draft_token_ids.diff() < 0).any():
            raise ValueError(
                "`draft_token_ids` is not in ascending order, expected that of the head's rows."
            )

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        if self.fc_norm is not None:
            parts = features.split(self.config.hidden_size, dim=-1)
            features = torch.cat([norm(x) for norm, x in zip(self.fc_norm, parts)], dim=-1)
        if self.input_norm is not None:
            features = self.input_norm(features)
        return self.fc(features)

    def join(self, inputs_embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return torch.cat([inputs_embeds, features], dim=-1)

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden if self.config.norm_output else self.norm(hidden))

    def digest(self) -> str:
        """As a feature drafter's; it changes with the flags that change what is proposed, too."""
        flags = [getattr(self.config, name) for name in self.config.shape_fields]
        return hashlib.sha256(f"{super().digest()} {flags}".encode()).hexdigest()[:16]

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """As [`FeatureDrafter.forward`]: the states to be fed back, which [`scores`] scores."""
        output = super().forward(*args, **kwargs)
        if self.config.norm_output:
            output.last_hidden_state = self.norm(output.last_hidden_state)
        return output


# A `custom_generate` repository has a copy of this module, and may be loaded more than once.
AutoConfig.register(Eagle3DrafterConfig.model_type, Eagle3DrafterConfig, exist_ok=True)
AutoModel.register(Eagle3DrafterConfig, Eagle3Drafter, exist_ok=True)
