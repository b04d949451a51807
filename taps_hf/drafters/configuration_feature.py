"""What the configurations of all feature drafters share.

A drafter is described by the family and width of the target it was trained for, not by a
target's weights: `layer_config` holds the (one-layer) configuration of a family of transformers,
so that the drafter's decoder layer is built from that family's modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig

from .layers import build_config
from .window import Window

# What the fields must be, beside being of these types, is checked below. A size beyond the bound is
# no model's, and would take memory or minutes before anything else could be seen to be wrong.
_TYPES: dict[str, tuple[type, ...]] = {
    "layer_config": (dict,),
    "hidden_size": (int,),
    "vocab_size": (int,),
    "draft_vocab_size": (int, NoneType),
    "target_name_or_path": (str, NoneType),
    "tokenizer_fingerprint": (str, NoneType),
    "training_data": (list,),
    "context_window": (int, NoneType),
}
# Fields by which transformers would load something else than a drafter's safetensors.
_FOREIGN = ("quantization_config", "transformers_weights")
_LARGEST_SIZE = 2**24


class FeatureDrafterConfig(PretrainedConfig):
    r"""Configuration of a [`FeatureDrafter`]; each kind of drafter has one of its own.

    Args:
        layer_config (`dict`): configuration of a one-layer model of some family, with its
            `model_type`.
        hidden_size (`int`): width of the target's features and of the drafter.
        vocab_size (`int`): size of the target's vocabulary (rows of its LM head).
        draft_vocab_size (`int`, *optional*): number of tokens the drafter scores; `None` means all.
            The token ids themselves are the buffer `draft_token_ids` of the checkpoint.
        target_name_or_path (`str`, *optional*): the target the drafter was trained for.
        tokenizer_fingerprint (`str`, *optional*): see [`tokenizer_fingerprint`].
        training_data (`list[str]`, *optional*): what it was trained on, for people and for cards.
        context_window (`int`, *optional*): slots of its context that the drafter sees, the last
            ones; `None` means all. See [`window.Window`].
    """

    own_types: ClassVar[Mapping[str, tuple[type, ...]]] = {}
    """Fields that the kind has beside those of this class, and of which types they are."""

    shape_fields: ClassVar[tuple[str, ...]] = ()
    """Those of them by which two drafters of the kind are built or run differently."""

    def __init__(
        self,
        layer_config: dict[str, Any] | None = None,
        hidden_size: int = 0,
        vocab_size: int = 0,
        draft_vocab_size: int | None = None,
        target_name_or_path: str | None = None,
        tokenizer_fingerprint: str | None = None,
        training_data: list[str] | None = None,
        context_window: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.layer_config = {} if layer_config is None else layer_config
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.draft_vocab_size = draft_vocab_size
        self.target_name_or_path = target_name_or_path
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.training_data = [] if training_data is None else training_data
        self.context_window = context_window
        self._check()
        for name in _FOREIGN:
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` is {kwargs[name]!r}, but drafters have none.")
        # No drafter owns an embedding, so there is nothing to tie.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PretrainedConfig.from_dict`.

        Raises:
            ValueError: for fields that are no drafter's, whatever transformers would raise.
        """
        dtype = config_dict.get("dtype", config_dict.get("torch_dtype"))
        known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not getattr(known, "is_floating_point", False):
            raise ValueError(f"`dtype` is {dtype!r}, expected a floating-point one of torch's.")
        try:
            return super().from_dict(config_dict, **kwargs)
        except ValueError:
            raise
        except Exception as error:  # the content of a file is data: any error refuses it
            raise ValueError(
                f"The fields are not a drafter's configuration: {type(error).__name__}: {error}"
            ) from error

    def build_layer_config(self) -> PretrainedConfig:
        """The transformers configuration of the drafter's one-layer trunk.

        Raises:
            ValueError: if `layer_config` is no configuration of its family, has several layers, or
                layers that do not attend to everything.
        """
        fields = self.layer_config
        config = build_config(fields)
        types = fields.get("layer_types")
        expected = {
            "num_hidden_layers": (fields.get("num_hidden_layers"), 1),
            "vocab_size": (fields.get("vocab_size"), 1),
            "hidden_size": (getattr(config, "hidden_size", None), self.hidden_size),
            "layer_types": (types, types and ["full_attention"]),
            "dtype": (fields.get("dtype"), None),
        }
        if types is None:
            expected["sliding_window"] = (fields.get("sliding_window"), None)
        for name, (found, wanted) in expected.items():
            if type(found) is not type(wanted) or found != wanted:
                raise ValueError(
                    f"`layer_config` has `{name}` {found!r}, expected {wanted!r}: a drafter has "
                    "one layer, of its own width, which attends to everything."
                )
        return config

    @property
    def window(self) -> Window:
        """How far back it looks."""
        return Window(self.context_window)

    def _check(self) -> None:
        """Refuse fields of other types or ranges than their class documents."""
        for name, types in {**_TYPES, **self.own_types}.items():
            value = getattr(self, name)
            # True and False are integers too, but no sizes.
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                expected = " or ".join("None" if t is NoneType else t.__name__ for t in types)
                raise ValueError(f"`{name}` is {value!r}, expected {expected}.")
        for name in ("hidden_size", "vocab_size"):
            if not 0 <= getattr(self, name) <= _LARGEST_SIZE:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, expected 0 to {_LARGEST_SIZE}."
                )
        if self.context_window is not None and self.context_window < 1:
            raise ValueError(
                f"`context_window` is {self.context_window}, expected None or a positive number."
            )
        size = self.draft_vocab_size
        if size is not None and not 0 < size <= self.vocab_size:
            raise ValueError(
                f"`draft_vocab_size` is {size}, expected None or a number from 1 to the target's "
                f"vocabulary size ({self.vocab_size})."
            )


def text_config_of(target_config: PretrainedConfig) -> PretrainedConfig:
    """The part of a target's configuration that is about its text decoder.

    Raises:
        ValueError: if it has no decoder of its own kind (encoder-decoder models), or is no causal
            language model's.
    """
    if target_config.is_encoder_decoder:
        raise ValueError(
            f"The target is an encoder-decoder model ({target_config.model_type}), "
            "expected a decoder-only one."
        )
    text_config = target_config.get_text_config(decoder=True)
    absent = [n for n in ("hidden_size", "vocab_size") if not hasattr(text_config, n)]
    if absent:
        raise ValueError(
            f"The configuration of the target ({target_config.model_type}) has no "
            f"`{absent[0]}`, expected that of a causal language model."
        )
    return text_config
