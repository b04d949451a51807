"""Configuration of an EAGLE-style drafter.

A drafter is described by the family and width of the target it was trained for, not by a
target's weights: `layer_config` holds the (one-layer) configuration of the target's own family,
so that the drafter's decoder layer is built from that family's transformers modules.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

BACKBONES = ("eagle2", "hass")

# Keys of a target's configuration that say nothing about the shape of one decoder layer.
_NOT_OF_THE_LAYER = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


class EagleDrafterConfig(PretrainedConfig):
    r"""Configuration of [`EagleDrafter`].

    Args:
        layer_config (`dict`): configuration of a one-layer model of the target's family, with its
            `model_type`. Use [`EagleDrafterConfig.from_target`] to derive it.
        hidden_size (`int`): width of the target's features and of the drafter.
        vocab_size (`int`): size of the target's vocabulary (rows of its LM head).
        backbone (`"eagle2"` or `"hass"`): the objective the drafter was trained with. Drafting is
            the same for both.
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
        if draft_vocab_size is not None and not 0 < draft_vocab_size <= vocab_size:
            raise ValueError(
                f"`draft_vocab_size` is {draft_vocab_size}, expected None or a number from 1 to "
                f"the target's vocabulary size ({vocab_size})."
            )
        self.layer_config = layer_config or {}
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.backbone = backbone
        self.fc_bias = fc_bias
        self.input_norm = input_norm
        self.draft_vocab_size = draft_vocab_size
        self.target_name_or_path = target_name_or_path
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.training_data = training_data or []
        # The drafter owns neither an embedding nor a head, so there is nothing to tie.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    @classmethod
    def from_target(cls, target_config: PretrainedConfig, **kwargs: Any) -> EagleDrafterConfig:
        """The configuration of a drafter that fits a target.

        Args:
            target_config: the target's configuration (a composite one is reduced to its text part).
            **kwargs: fields of [`EagleDrafterConfig`] to set.

        Raises:
            ValueError: if the target has no decoder of its own kind (encoder-decoder models).
        """
        text_config = target_config.get_text_config(decoder=True)
        if target_config.is_encoder_decoder:
            raise ValueError(
                f"The target is an encoder-decoder model ({target_config.model_type}), "
                "expected a decoder-only one."
            )
        layer = {k: v for k, v in text_config.to_diff_dict().items() if k not in _NOT_OF_THE_LAYER}
        layer.update(
            model_type=text_config.model_type,
            num_hidden_layers=1,
            # The embedding is built only to be dropped: make it as small as can be.
            vocab_size=1,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            tie_word_embeddings=False,
        )
        # A drafter always attends to everything: its one layer is cheap, and its cache small.
        window = getattr(text_config, "sliding_window", None)
        if getattr(text_config, "layer_types", None) is not None:
            layer["layer_types"] = ["full_attention"]
            # Some families with layer types insist on a window even where no layer slides.
            window = window and text_config.max_position_embeddings
        else:
            window = None
        layer["sliding_window"] = window
        for name in ("use_sliding_window", "max_window_layers"):
            layer.pop(name, None)
        kwargs.setdefault("target_name_or_path", target_config.name_or_path or None)
        return cls(
            layer_config=layer,
            hidden_size=text_config.hidden_size,
            vocab_size=text_config.vocab_size,
            **kwargs,
        )

    def build_layer_config(self) -> PretrainedConfig:
        """The transformers configuration of the drafter's one-layer trunk."""
        fields = copy.deepcopy(self.layer_config)  # some families change nested fields in place
        try:
            model_type = fields.pop("model_type")
        except KeyError:
            raise ValueError(
                "`layer_config` has no `model_type`; build the configuration with "
                "EagleDrafterConfig.from_target(target.config)."
            ) from None
        return AutoConfig.for_model(model_type, **fields)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of a tokenizer's vocabulary, to tell whether two have the same tokens and ids.

    Returns:
        16 hexadecimal digits of the SHA-256 over the sorted (token, id) pairs.
    """
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
