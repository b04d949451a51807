from __future__ import annotations

import pytest
import torch

from taps_hf import DraftTree
from taps_hf.strategies.calibration import Calibration


def tree(confidence: list[list[float]], parents: list[int], depths: list[int]) -> DraftTree:
    known = torch.tensor(confidence)
    size = len(parents)
    return DraftTree(
        torch.arange(size), torch.tensor(parents), torch.tensor(depths), known, known.clone()
    )


NAN = float("nan")
#      root
#      1 2      proposed by drafter 0 (1) and by both (2)
#      3        under 1
BOTH = tree([[1, 0.4, 0.3, 0.9], [1, NAN, 0.6, NAN]], [-1, 0, 0, 1], [0, 1, 1, 2])


def test_at_first_a_path_is_as_likely_as_its_confidences_say():
    found = Calibration(2).acceptance(BOTH)
    assert found.tolist() == pytest.approx([1.0, 0.4, 0.6, 0.36])


def test_a_child_is_never_likelier_than_its_parent():
    calibration = Calibration(1)
    chain = tree([[1, 0.3, 0.3, 0.3]], [-1, 0, 1, 2], [0, 1, 2, 3])
    for _ in range(50):
        calibration.observe(chain, [0, 1, 2], [1, 2, 3])
    found = calibration.acceptance(chain)
    assert (found[1:] <= found[:-1]).all()
    assert found[1] > 0.8  # an underconfident drafter is found out


def test_drafters_sure_of_different_tokens_cannot_all_be_right():
    #      root -> 1 (0.9, drafter 0), 2 (0.8, drafter 1), 3 (0.3, both); 4 under 2
    apart = tree(
        [[1, 0.9, NAN, 0.3, NAN], [1, NAN, 0.8, 0.1, 0.5]], [-1, 0, 0, 0, 2], [0, 1, 1, 1, 2]
    )
    found = Calibration(2).acceptance(apart)
    assert found[1:4].tolist() == pytest.approx([0.9 / 2, 0.8 / 2, 0.3 / 2])
    assert float(found[4]) == pytest.approx(0.5 * 0.8 / 2)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_it_learns_the_rate_at_which_a_confidence_is_right(rate):
    """Against the plain frequency, by coins that fall deterministically."""
    calibration = Calibration(2)
    sure = tree([[1, 0.6], [1, NAN]], [-1, 0], [0, 1])
    for i in range(400):
        hit = int((i + 1) * rate) > int(i * rate)
        calibration.observe(sure, [0], [1] if hit else [])
    assert float(calibration.acceptance(sure)[1]) == pytest.approx(rate, abs=0.12)
    # Other confidences and other drafters are as they were.
    other = tree([[1, 0.2], [1, NAN]], [-1, 0], [0, 1])
    assert float(calibration.acceptance(other)[1]) == pytest.approx(0.2)
    theirs = tree([[1, NAN], [1, 0.6]], [-1, 0], [0, 1])
    assert float(calibration.acceptance(theirs)[1]) == pytest.approx(0.6)


def test_nodes_that_were_not_reached_say_nothing():
    calibration = Calibration(2)
    calibration.observe(BOTH, [0], [2])  # 3 hangs under 1, which was not accepted
    lone = tree([[1, 0.9], [1, NAN]], [-1, 0], [0, 1])
    assert float(calibration.acceptance(lone)[1]) == pytest.approx(0.9)
