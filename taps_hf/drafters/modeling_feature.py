"""Drafters that read a target's features: what all kinds of them share.

At sequence index t such a drafter reads the embedding of the token at t + 1 and the target's
feature at t, and predicts the next feature. Which of the target's states are the feature, how the
two are joined, and which head turns predictions into token scores: that is the kind's own
(`modeling_eagle`, `modeling_eagle3`). The embedding is always the target's and never part of a
drafter or of its checkpoint.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..cache import CACHE
from .base import Drafter, DrafterSession
from .checkpoints import check_shapes, read_config, safetensors_files
from .layers import build_trunk
from .session import EagleSession
from .stacking import kept_stack, stacking_key


class FeatureDrafter(PreTrainedModel, Drafter):
    """A one-layer, feature-level draft model.

    It is stateless: the key-value cache of a running generation belongs to the caller.
    """

    base_model_prefix = "drafter"
    _supports_sdpa = True
    _supports_flash_attn = False
    samples = True
    has_own_head = False
    """Whether [`scores`] are its own, and not those of the target's LM head."""

    def make_trunk(self) -> None:
        """Make `trunk`, the one-layer model without embedding and norm, and `draft_token_ids`."""
        config = self.config
        config.build_layer_config()  # refuses what is no drafter's
        trunk = build_trunk(config.layer_config, attention=config._attn_implementation or "sdpa")
        trunk.embed_tokens = None
        trunk.norm = nn.Identity()
        self.trunk = trunk
        # (draft_vocab_size,) int64: the tokens that the drafter scores; None for all.
        size = config.draft_vocab_size
        self.register_buffer("draft_token_ids", None if size is None else torch.arange(size))

    @property
    def feature_size(self) -> int:
        """Width of the target's features that [`fuse`] takes."""
        return self.config.hidden_size

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """What `forward` takes of the target's true features; predictions it takes as they are.

        Args:
            features: (batch, length, feature_size): the states of the layers that the drafter
                reads, side by side, of its dtype.

        Returns:
            (batch, length, hidden).
        """
        return features

    @abstractmethod
    def join(self, inputs_embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """What the layer reads, (batch, length, any), of embeddings and features."""

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of the tokens in `draft_token_ids`, for drafters with heads of their own.

        Args:
            hidden: (batch, length, hidden): predictions, as `forward` returns them.

        Returns:
            (batch, length, scored): logits.
        """
        raise ValueError(f"{type(self).__name__} has no head, expected the target's LM head.")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, for complete safetensors checkpoints only.

        Raises:
            ValueError: if `use_safetensors=False` is asked for (a pickle can run code), if an index
                names files that are no safetensors of the same folder, if the configuration is no
                drafter's, or if the checkpoint lacks a weight, has one too many, or one of another
                shape. What can be told from the files' headers is, before any module is made.
            OSError: if a file is missing or unreadable.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors` is False, but drafters load from safetensors only.")
        path = kwargs.get("pretrained_model_name_or_path", args[0] if args else None)
        config = kwargs.get("config")
        if not isinstance(config, cls.config_class):
            config = read_config(
                path if config is None else config, kwargs, cls.config_class.model_type
            )
            config = cls.config_class.from_dict(config)
        with torch.device("meta"):
            expected = cls(config).state_dict()
        check_shapes(safetensors_files(path, kwargs), expected)
        kwargs["use_safetensors"] = True
        kwargs["ignore_mismatched_sizes"] = True  # they are refused below, like other misfits
        wants_info = kwargs.pop("output_loading_info", False)
        drafter, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = {k: sorted(map(str, info[k])) for k in info if k.endswith("_keys") and info[k]}
        if wrong:
            raise ValueError(f"The checkpoint {args[:1]} does not fit its configuration: {wrong}.")
        if drafter.draft_token_ids is not None:
            drafter.check_token_ids(drafter.draft_token_ids)
        drafter.check_runs()
        return (drafter, info) if wants_info else drafter

    def check_runs(self) -> None:
        """Run two slots and then one more, as drafting does.

        Raises:
            ValueError: if the layer's code fails or gives something else than a feature each.
        """
        cache = DynamicCache(config=self.trunk.config)
        shape = None
        try:
            for positions in (torch.arange(2), torch.arange(2, 3)):
                inputs, features = (
                    torch.ones(1, len(positions), width, dtype=self.dtype, device=self.device)
                    for width in (self.config.hidden_size, self.feature_size)
                )
                with torch.no_grad():
                    shape = self(
                        inputs,
                        self.fuse(features),
                        position_ids=positions[None].to(self.device),
                        past_key_values=cache,
                    ).last_hidden_state.shape
        except Exception as error:  # a family's code is not ours: whatever it raises refuses it
            raise ValueError(
                f"A layer of the family {self.config.layer_config['model_type']!r} with this "
                f"`layer_config` does not run as a drafter's: {type(error).__name__}: {error}"
            ) from error
        if shape != inputs.shape or cache.get_seq_length() != 3:
            raise ValueError(
                f"A layer of the family {self.config.layer_config['model_type']!r} keeps "
                f"{cache.get_seq_length()} slots of 3 and gives features of shape {tuple(shape)}, "
                f"expected all and {tuple(inputs.shape)}: it does not run as a drafter's."
            )

    @property
    def num_scored_tokens(self) -> int:
        return self.config.draft_vocab_size or self.config.vocab_size

    @property
    def tokenizer_fingerprint(self) -> str | None:
        return self.config.tokenizer_fingerprint

    def check_target(self, name: str, target: PreTrainedModel) -> None:
        """Raise `ValueError` unless the drafter fits a target and is ready to draft.

        That is if hidden size or vocabulary differ, the target's embedding or head cannot be read,
        or the drafter would draft at random.
        """
        config = target.config.get_text_config(decoder=True)
        trained_for = self.config.target_name_or_path or "another target"
        for field in ("hidden_size", "vocab_size"):
            found, expected = getattr(self.config, field), getattr(config, field)
            if found != expected:
                raise ValueError(
                    f"Drafter {name!r} has `{field}` {found}, but the target's is {expected}: it "
                    f"was made for {trained_for}."
                )
        for module in (target.get_input_embeddings(), target.get_output_embeddings()):
            if module.weight.device.type == "meta":
                raise ValueError(
                    "The target's embedding or LM head is offloaded, but drafters read both; "
                    "expected a `device_map` that keeps them on a device."
                )
        if self.training and getattr(self.trunk.config, "attention_dropout", 0.0):
            raise ValueError(f"Drafter {name!r} is in training mode with dropout; call its eval().")

    def run_key(self) -> Hashable:
        return stacking_key(self)

    @classmethod
    def runs_as_one(cls, drafters: Sequence[FeatureDrafter]) -> bool:
        return len(drafters) == 1 or kept_stack(drafters) is not None

    @classmethod
    def start(cls, drafters: Sequence[FeatureDrafter], target: PreTrainedModel) -> DrafterSession:
        return EagleSession(drafters, target)

    def digest(self) -> str:
        """16 hexadecimal digits that change with weights and window, not with the dtype alone."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.cpu().float().numpy().tobytes())
        if self.config.context_window is not None:
            digest.update(repr(self.config.window).encode())
        return digest.hexdigest()[:16]

    def resolve_token_ids(self, draft_token_ids: torch.Tensor | int | None) -> torch.Tensor | None:
        """Token ids as they were asked for, (draft_vocab_size,) int64; None for all.

        Args:
            draft_token_ids: these; or the first so many of those scored now (of all: the lowest, as
                tokenizers learn frequent tokens first).

        Raises:
            ValueError: as [`check_token_ids`], or if there are not so many.
        """
        if draft_token_ids is None:
            return None
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
        draft_token_ids = draft_token_ids.to(self.device)
        self.check_token_ids(draft_token_ids)
        return draft_token_ids

    def check_token_ids(self, draft_token_ids: torch.Tensor) -> None:
        """Raise `ValueError` unless these are different tokens of the target's vocabulary."""
        vocab_size = self.config.vocab_size
        ids = draft_token_ids.unique()
        known = (ids >= 0) & (ids < vocab_size)
        if not len(ids) or len(ids) < len(draft_token_ids) or not known.all():
            raise ValueError(
                f"`draft_token_ids` has {len(draft_token_ids)} entries, {len(ids)} of them "
                f"distinct and {int(known.sum())} of these token ids; expected one or more, all "
                f"distinct and from 0 to {vocab_size - 1}."
            )

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
            features: (batch, length, hidden): of the target, as [`fuse`] gives them, or, beyond the
                known prefix, the drafter's own predictions.
            attention_mask: None (causal), (batch, past + length), or a prepared 4-D mask of shape
                (batch, 1, length, past + length), boolean, True where a query may look.
            position_ids: (batch, length) int64.
            past_key_values: a cache with one layer, extended in place.

        Returns:
            `last_hidden_state` of shape (batch, length, hidden): predictions of the next features.
        """
        return self.trunk(
            inputs_embeds=self.join(inputs_embeds, features),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=past_key_values is not None if use_cache is None else use_cache,
            **{CACHE: past_key_values},
            **kwargs,
        )
