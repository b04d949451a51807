from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, T5Config

from taps_hf import EagleDrafterConfig, tokenizer_fingerprint

from ..tiny import FAMILIES, VOCAB, tiny_target


@pytest.mark.parametrize("family", FAMILIES)
def test_from_target_describes_one_full_attention_layer(family):
    target = tiny_target(family).config
    config = EagleDrafterConfig.from_target(target, training_data=["gsm8k"], backbone="hass")
    assert (config.hidden_size, config.vocab_size) == (target.hidden_size, VOCAB)
    assert (config.backbone, config.training_data) == ("hass", ["gsm8k"])
    layer = config.build_layer_config()
    assert type(layer) is type(target)
    assert layer.num_hidden_layers == 1
    assert set(getattr(layer, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        assert getattr(layer, name) == getattr(target, name)
    assert layer.rms_norm_eps == target.rms_norm_eps


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(tmp_path, family):
    config = EagleDrafterConfig.from_target(
        tiny_target(family).config,
        draft_vocab_size=5,
        fc_bias=True,
        input_norm=True,
        target_name_or_path="someone/target",
        tokenizer_fingerprint="0123456789abcdef",
        training_data=["gsm8k", "mbpp"],
    )
    config.save_pretrained(tmp_path)
    expected = {**config.to_dict(), "_name_or_path": None}
    for load in (EagleDrafterConfig.from_pretrained, AutoConfig.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is EagleDrafterConfig
        assert loaded.build_layer_config().to_dict() == config.build_layer_config().to_dict()
        # Building a layer's configuration changes nothing here.
        assert {**loaded.to_dict(), "_name_or_path": None} == expected


def test_the_targets_name_is_recorded():
    target = AutoConfig.for_model("llama")
    assert EagleDrafterConfig.from_target(target).target_name_or_path is None
    target.name_or_path = "someone/target"
    assert EagleDrafterConfig.from_target(target).target_name_or_path == "someone/target"
    given_name = EagleDrafterConfig.from_target(target, target_name_or_path="other")
    assert given_name.target_name_or_path == "other"


def test_the_targets_configuration_is_left_alone():
    for family in FAMILIES:
        target = tiny_target(family).config
        before = target.to_dict()
        EagleDrafterConfig.from_target(target)
        assert target.to_dict() == before


def test_encoder_decoder_targets_are_refused():
    with pytest.raises(ValueError, match=r"encoder-decoder model \(t5\)"):
        EagleDrafterConfig.from_target(T5Config())


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="`backbone` is 'medusa', expected one of"):
        EagleDrafterConfig(backbone="medusa")
    for size in (0, -1, VOCAB + 1):
        with pytest.raises(ValueError, match=f"`draft_vocab_size` is {size}"):
            EagleDrafterConfig.from_target(tiny_target().config, draft_vocab_size=size)
    with pytest.raises(ValueError, match="`layer_config` has no `model_type`"):
        EagleDrafterConfig(hidden_size=8, vocab_size=4).build_layer_config()


class Vocabulary:
    """What a fingerprint reads of a tokenizer."""

    def __init__(self, tokens: dict[str, int]) -> None:
        self._tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return dict(self._tokens)


def fingerprint(tokens: dict[str, int]) -> str:
    return tokenizer_fingerprint(Vocabulary(tokens))


vocabularies = st.dictionaries(
    # Surrogates too: some byte-level vocabularies hold what is not valid UTF-8 alone.
    st.text(st.characters(exclude_categories=()), max_size=3),
    st.integers(0, 8),
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(vocabularies, vocabularies, st.randoms(use_true_random=False))
def test_fingerprints_are_equal_exactly_when_vocabularies_are(one, other, random):
    shuffled = dict(random.sample(list(one.items()), len(one)))
    assert fingerprint(shuffled) == fingerprint(one)
    assert (fingerprint(one) == fingerprint(other)) == (one == other)


def test_fingerprints_see_small_differences():
    base = {"a": 0, "b": 1, "c": 2}
    others = [
        {"a": 0, "b": 2, "c": 1},
        {"a": 0, "b": 1},
        {**base, "d": 3},
        {"a": 0, "b": 1, "C": 2},
        {"a": 0, "b": 1, "c": 3},
    ]
    found = [fingerprint(tokens) for tokens in (base, *others)]
    assert len(set(found)) == len(found)
    assert all(len(x) == 16 and int(x, 16) >= 0 for x in found)
