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
        layer_config (`dict`): configuration of a one-layer model of the target's family, with its
            `model_type`. Use [`EagleDrafterConfig.from_target`] to derive it.
        hidden_size (`int`): width of the target's features and of the drafter.
        vocab_size (`int`): size of the target's vocabulary (rows of its LM head).
        backbone (`"eagle2"` or `"hass"`): the method whose objective the drafter was trained with,
            EAGLE (the drafter of EAGLE-2, which is EAGLE's) or HASS: what papers call a drafter's
            backbone. For people and cards: drafting is the same for both. Other values are refused,
            as they may stand for drafters that are run in another way.
        fc_bias (`bool`): whether the projection of [embedding; feature] has a bias.
        input_norm (`bool`): whether the decoder layer normalises its input. The original EAGLE
            checkpoints leave that norm out.
        draft_vocab_size (`int`, *optional*): number of tokens the drafter scores; `None` means all.
            The token ids themselves are the buffer `draft_token_ids` of the checkpoint.
        target_name_or_path (`str`, *optional*): the target the drafter was trained for.
        tokenizer_fingerprint (`str`, *optional*): see [`tokenizer_fingerprint`].
        training_data (`list[str]`, *optional*): what it was trained on, for people and for cards.
    """

    model_type = "taps_eagle"
    own_types: ClassVar = {"fc_bias": (bool,), "input_norm": (bool,)}
    shape_fields: ClassVar = ("fc_bias", "input_norm")

    def __init__(
        self,
        layer_config: dict[str, Any] | None = None,
        hidden_size: int = 0,
        vocab_size: int = 0,
        backbone: str = "eagle2",
        fc_bias: bool = False,
        input_norm: bool = False,
        draft_vocab_size: int | None = None,
        target_name_or_path: str | None = None,
        tokenizer_fingerprint: str | None = None,
        training_data: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if backbone not in BACKBONES:
            raise ValueError(f"`backbone` is {backbone!r}, expected one of {BACKBONES}.")
        self.backbone = backbone
        self.fc_bias = fc_bias
        self.input_norm = input_norm
        super().__init__(
            layer_config=layer_config,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            draft_vocab_size=draft_vocab_size,
            target_name_or_path=target_name_or_path,
            tokenizer_fingerprint=tokenizer_fingerprint,
            training_data=training_data,
            **kwargs,
        )

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
