"""Configuration of an EAGLE-style drafter, whose layer is one of the target's own family."""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .configuration_feature import FeatureDrafterConfig, text_config_of
from .layers import layer_config

BACKBONES = ("eagle2", "hass")


class EagleDrafterConfig(FeatureDrafterConfig):
    r"""Configuration of [`EagleDrafter`].

    Args:
        backbone (`"eagle2"` or `"hass"`): the method whose objective the drafter was trained with,
            EAGLE (the drafter of EAGLE-2, which is EAGLE's) or HASS: what papers call a drafter's
            backbone. For people and cards: drafting is the same for both. Other values are refused,
            as they may stand for drafters that are run in another way.
        fc_bias (`bool`): whether the projection of [embedding; feature] has a bias.
        input_norm (`bool`): whether the decoder layer normalises its input. The original EAGLE
            checkpoints leave that norm out.
        kwargs: the fields of [`FeatureDrafterConfig`]; `from_target` knows them.
    """

    model_type = "taps_eagle"
    own_types: ClassVar = {"fc_bias": (bool,), "input_norm": (bool,)}
    shape_fields: ClassVar = ("fc_bias", "input_norm")

    def __init__(
        self,
        backbone: str = "eagle2",
        fc_bias: bool = False,
        input_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        if backbone not in BACKBONES:
            raise ValueError(f"`backbone` is {backbone!r}, expected one of {BACKBONES}.")
        self.backbone = backbone
        self.fc_bias = fc_bias
        self.input_norm = input_norm
        super().__init__(**kwargs)

    @classmethod
    def from_target(
        cls, target_config: PretrainedConfig, dense: bool = True, **kwargs: Any
    ) -> EagleDrafterConfig:
        """The configuration of a drafter that fits a target.

        Args:
            target_config: the target's configuration (a composite one is reduced to its text part).
            dense: whether the drafter of a target with mixtures of experts has a dense layer: the
                family's own, or that of a family with nearly the same attention.
            **kwargs: fields of [`EagleDrafterConfig`] to set.

        Raises:
            ValueError: if the target has no decoder of its own kind (encoder-decoder models), or
                no dense layer is known for its family.
        """
        text_config = text_config_of(target_config)
        kwargs.setdefault("target_name_or_path", target_config.name_or_path or None)
        return cls(
            layer_config=layer_config(text_config, dense),
            hidden_size=text_config.hidden_size,
            vocab_size=text_config.vocab_size,
            **kwargs,
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of a tokenizer's vocabulary, to tell whether two have the same tokens and ids.

    Returns:
        16 hexadecimal digits of the SHA-256 over the sorted (token, id) pairs.
    """
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
