from __future__ import annotations

import pytest
import torch

from taps_hf import EagleDrafter, average_drafters

from ..tiny import tiny_drafters, tiny_target


def drafter(seed: int = 0, dtype: torch.dtype = torch.float32, ids=None, **config) -> EagleDrafter:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EagleDrafter.from_target(tiny_target(dtype=dtype), ids, **config)


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3], [1.5, -0.5, 0.0]])
def test_the_average_is_the_mean_by_hand(weights):
    several = tiny_drafters(3)
    found = average_drafters(several, weights).state_dict()
    states = [each.state_dict() for each in several]
    assert set(found) == set(states[0])
    for name, tensor in found.items():
        parts = [w * s[name].double() for w, s in zip(weights or [1 / 3] * 3, states)]
        torch.testing.assert_close(tensor.double(), sum(parts), rtol=1e-5, atol=1e-6)


def test_one_end_of_the_line_is_the_first_drafter():
    first, second = tiny_drafters(2)
    for weights, expected in (([1.0, 0.0], first), ([0.0, 1.0], second)):
        found = average_drafters([first, second], weights).state_dict()
        assert all(torch.equal(found[k], v) for k, v in expected.state_dict().items())


def test_the_drafters_are_left_alone():
    several = tiny_drafters(2)
    before = [{k: v.clone() for k, v in each.state_dict().items()} for each in several]
    configs = [each.config.to_dict() for each in several]
    average = average_drafters(several)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.zero_()
    average.config.backbone = "hass"
    for each, state, config in zip(several, before, configs):
        assert all(torch.equal(each.state_dict()[k], v) for k, v in state.items())
        assert each.config.to_dict() == config


def test_low_precision_is_averaged_in_float32():
    # In bfloat16 these ten sums would round at every step.
    several = [drafter(seed, torch.bfloat16) for seed in range(10)]
    average = average_drafters(several)
    for name, tensor in average.state_dict().items():
        mean = torch.stack([each.state_dict()[name].double() for each in several]).mean(0)
        assert tensor.dtype == torch.bfloat16
        error = (tensor.double() - mean).abs()
        # Half a unit in bfloat16's last place, and what float32 leaves where terms cancel.
        assert (error <= mean.abs() * 2**-8 * 1.01 + 1e-6).all(), name


def test_dtypes_may_differ_and_the_first_decides():
    several = [drafter(0), drafter(1, torch.bfloat16)]
    assert average_drafters(several).dtype == torch.float32
    assert average_drafters(several[::-1]).dtype == torch.bfloat16


def test_backbone_and_training_data_may_differ_and_data_is_recorded():
    first = drafter(0, training_data=["gsm8k"])
    second = drafter(1, training_data=["mt-bench", "sharegpt"], backbone="hass")
    data = average_drafters([first, second], [0.75, 0.25]).config.training_data
    assert len(data) == 2
    assert "0.75" in data[0]
    assert "gsm8k" in data[0]
    assert "0.25" in data[1]
    assert "mt-bench" in data[1]
    assert "sharegpt" in data[1]


def test_saved_and_new_drafters_can_be_averaged(tmp_path):
    first, second = tiny_drafters(2)
    first.save_pretrained(tmp_path)
    loaded = EagleDrafter.from_pretrained(tmp_path)
    found, expected = average_drafters([loaded, second]), average_drafters([first, second])
    states = expected.state_dict()
    assert all(torch.equal(v, states[k]) for k, v in found.state_dict().items())
    # An average does not pass for the drafter that comes first.
    assert loaded.name_or_path == str(tmp_path)
    assert found.name_or_path == found.config.name_or_path == ""


@pytest.mark.parametrize(
    ("vocabularies", "expected"),
    [
        (([1, 4, 9], [1, 4, 9]), [1, 4, 9]),
        (([1, 4, 9], [0, 4]), [1, 0, 4, 9]),
        (([9, 4], [3, 9, 1]), [9, 3, 4, 1]),
        (([1, 4, 9], None), None),
        ((None, [1, 4, 9]), None),
    ],
)
def test_the_average_scores_what_any_of_them_scores(vocabularies, expected, tmp_path):
    several = [
        drafter(i, ids=None if ids is None else torch.tensor(ids))
        for i, ids in enumerate(vocabularies)
    ]
    average_drafters(several).save_pretrained(tmp_path)
    average = EagleDrafter.from_pretrained(tmp_path)
    found = average.draft_token_ids
    assert (None if found is None else found.tolist()) == expected
    for one in several:  # which are what they were
        ids = one.draft_token_ids
        assert one.config.draft_vocab_size == (None if ids is None else len(ids))


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_drafters_are_refused(count):
    with pytest.raises(ValueError, match=f"{count} drafters were given .* at least 2"):
        average_drafters(tiny_drafters(2)[:count])


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.4], [1 / 3] * 3, [], [float("nan"), 0.5]])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ValueError, match="expected 2 numbers that sum to 1"):
        average_drafters(tiny_drafters(2), weights)


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (lambda: drafter(1, fc_bias=True), "fc_bias"),
        (lambda: drafter(1, input_norm=True), "input_norm"),
        (lambda: drafter(1, tokenizer_fingerprint="0" * 16), "tokenizer_fingerprint"),
        (lambda: EagleDrafter.from_target(tiny_target("qwen3")), "layer_config"),
    ],
)
def test_drafters_of_different_kinds_are_refused(other, field):
    for pair in ([drafter(), other()], [other(), drafter()]):
        with pytest.raises(ValueError, match=f"differ in .*{field}"):
            average_drafters(pair)
