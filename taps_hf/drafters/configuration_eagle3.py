"""Configuration of an EAGLE-3 drafter: a layer of its own over several of the target's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import PretrainedConfig

from .configuration_feature import FeatureDrafterConfig, text_config_of
from .layers import ACTIVE_EXPERTS

# Families whose attention an EAGLE-3 layer can have: those that others train and serve.
LAYER_FAMILIES = ("llama", "qwen3")
# Scalings of rotary positions that do not change within a text, and that engines know.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class Eagle3DrafterConfig(FeatureDrafterConfig):
    r"""Configuration of [`Eagle3Drafter`].

    The flags tell the dialects apart in which EAGLE-3 heads were trained. Left as they are, they
    give the original's (arXiv 2503.01840).

    Args:
        layer_ids (`list[int]`): which of the target's hidden states are read, in this order.
            Numbers count as in transformers' `hidden_states`: L is what decoder layer L reads and
            layer L - 1 gives, from 1 to the number of layers (there: before the final norm). Some
            engines write the layer that gives it, one less.
        norm_before_residual (`bool`): whether the layer's residual is the normalised feature.
        norm_before_fc (`bool`): whether one norm over all features stands before the projection.
        fc_norm (`bool`): whether each feature has a norm of its own before the projection.
        norm_output (`bool`): whether what is fed back as the next feature is the normalised state.
        kwargs: the fields of [`FeatureDrafterConfig`]. `layer_config` is of the family `llama` or
            `qwen3`; draft token ids are in ascending order.
    """

    model_type = "taps_eagle3"
    backbone = "eagle3"
    own_types: ClassVar = {
        "layer_ids": (list,),
        "norm_before_residual": (bool,),
        "norm_before_fc": (bool,),
        "fc_norm": (bool,),
        "norm_output": (bool,),
    }
    shape_fields: ClassVar = tuple(own_types)

    def __init__(
        self,
        layer_ids: Sequence[int] = (1,),
        norm_before_residual: bool = False,
        norm_before_fc: bool = False,
        fc_norm: bool = False,
        norm_output: bool = False,
        **kwargs: Any,
    ) -> None:
        self.layer_ids = list(layer_ids) if isinstance(layer_ids, tuple) else layer_ids
        self.norm_before_residual = norm_before_residual
        self.norm_before_fc = norm_before_fc
        self.fc_norm = fc_norm
        self.norm_output = norm_output
        super().__init__(**kwargs)

    def _check(self) -> None:
        super()._check()
        ids = self.layer_ids
        if not ids or any(type(layer) is not int or layer < 1 for layer in ids):
            raise ValueError(
                f"`layer_ids` is {ids!r}, expected one or more numbers from 1: which of the "
                "target's `hidden_states` are read (0 is the embedding)."
            )
        if self.norm_before_fc and self.fc_norm:
            raise ValueError(
                "`norm_before_fc` and `fc_norm` are both true, expected one norm of the features "
                "before the projection at most."
            )

    def build_layer_config(self) -> PretrainedConfig:
        """As [`FeatureDrafterConfig.build_layer_config`], for the families of EAGLE-3 layers."""
        family = self.layer_config.get("model_type")
        if family is not None and family not in LAYER_FAMILIES:
            raise ValueError(
                f"`layer_config` has `model_type` {family!r}, expected one of {LAYER_FAMILIES}."
            )
        return super().build_layer_config()

    @classmethod
    def from_target(
        cls,
        target_config: PretrainedConfig,
        layer_ids: Sequence[int] | None = None,
        family: str = "llama",
        **kwargs: Any,
    ) -> Eagle3DrafterConfig:
        """The configuration of a drafter that fits a target.

        Args:
            target_config: the target's configuration (a composite one is reduced to its text part).
            layer_ids: see [`Eagle3DrafterConfig`]; by default the inputs of an early, a middle and
                a late layer, those of the original: 2, n // 2 and n - 3 of n layers.
            family: of the drafter's layer, `llama` or `qwen3`, whatever the target's is: it is
                dense, and what engines can serve.
            **kwargs: fields of [`Eagle3DrafterConfig`] to set.

        Raises:
            ValueError: if the target has no decoder of its own kind (encoder-decoder models), or
                not so many layers.
        """
        text_config = text_config_of(target_config)
        count = text_config.num_hidden_layers
        if layer_ids is None:
            layer_ids = default_layer_ids(count)
        ids = [int(layer) for layer in layer_ids]
        if any(layer > count for layer in ids):
            raise ValueError(f"`layer_ids` is {ids}, expected numbers from 1 to {count}.")
        kwargs.setdefault("target_name_or_path", target_config.name_or_path or None)
        return cls(
            layer_config=_layer_config(text_config, family),
            hidden_size=text_config.hidden_size,
            vocab_size=text_config.vocab_size,
            layer_ids=ids,
            **kwargs,
        )


def default_layer_ids(num_layers: int) -> list[int]:
    """Which hidden states of a target EAGLE-3 reads unless it is told: 2, n // 2 and n - 3.

    Raises:
        ValueError: for targets of so few layers that these are not three in ascending order.
    """
    found = [2, num_layers // 2, num_layers - 3]
    if sorted(set(found)) != found:
        raise ValueError(
            f"The target has {num_layers} layers, too few for EAGLE-3's usual choice ({found}); "
            "expected `layer_ids`."
        )
    return found


def _layer_config(config: PretrainedConfig, family: str) -> dict[str, Any]:
    """The fields of a one-layer model of a family, as wide as the target and with its heads."""
    every = config.to_dict()
    heads = config.num_attention_heads
    return {
        "model_type": family,
        "hidden_size": config.hidden_size,
        "intermediate_size": _active_width(every),
        "num_attention_heads": heads,
        "num_key_value_heads": every.get("num_key_value_heads") or heads,
        "head_dim": every.get("head_dim") or config.hidden_size // heads,
        "hidden_act": "silu",
        "rms_norm_eps": every.get("rms_norm_eps") or 1e-6,
        "rope_parameters": _rope_parameters(every),
        "max_position_embeddings": every.get("max_position_embeddings") or 2048,
        "initializer_range": every.get("initializer_range") or 0.02,
        "num_hidden_layers": 1,
        # The embedding is built only to be dropped: make it as small as can be, with ids within.
        "vocab_size": 1,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "sliding_window": None,
    }


def _active_width(fields: Mapping[str, Any]) -> int:
    """Width of the MLP: as wide as what the target activates for a token."""
    active = next((fields[name] for name in ACTIVE_EXPERTS if fields.get(name)), None)
    width = fields.get("intermediate_size")
    if active is not None:
        expert = fields.get("moe_intermediate_size") or width
        width = expert * (max(active) if isinstance(active, list) else active)
    if isinstance(width, list):
        width = max(width)
    return width or 4 * fields["hidden_size"]


def _rope_parameters(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The target's rotary positions where a Llama has such, else unscaled ones of its base."""
    rope = fields.get("rope_parameters") or {}
    rope = rope.get("full_attention") or rope  # some families have one for each type of layer
    theta = float(rope.get("rope_theta") or fields.get("rope_theta") or 10000.0)
    if rope.get("rope_type") not in _ROPE_TYPES:
        return {"rope_type": "default", "rope_theta": theta}
    kept = {name: value for name, value in rope.items() if name != "partial_rotary_factor"}
    return {**kept, "rope_theta": theta}
