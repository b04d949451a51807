from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from taps_hf.checks import (
    FINITE,
    NOT_NEGATIVE,
    Range,
    check_device,
    check_numbers,
    named_paths,
    parse_json,
    set_threads,
)


@pytest.mark.parametrize(
    ("expected", "inside", "outside"),
    [
        (FINITE, [-1e308, 0, 10**400], [math.nan, math.inf, -math.inf, True, "1", None]),
        (NOT_NEGATIVE, [0, 0.5], [-1e-9, math.inf]),
        (Range(above=0, below=1), [1e-9, 0.5], [0, 1, math.nan]),
        (Range(at_least=1, at_most=3), [1, 3], [0, 4]),
    ],
)
def test_ranges_hold_what_they_say(expected, inside, outside):
    assert all(value in expected for value in inside)
    assert not any(value in expected for value in outside)


def test_ranges_say_their_bounds():
    assert str(FINITE) == "a finite number"
    assert str(Range(above=0, below=1)) == "above 0 and below 1"


def test_numbers_that_are_out_of_range_are_named():
    options = SimpleNamespace(one=1, none=None, many=[0, math.nan])
    check_numbers(options, {"one": NOT_NEGATIVE, "none": NOT_NEGATIVE})
    with pytest.raises(ValueError, match="`many` is nan, expected at least 0"):
        check_numbers(options, {"many": NOT_NEGATIVE})


@pytest.mark.parametrize("device", ["", "abacus", "meta", "cpu:x", "cuda:99"])
def test_devices_that_are_not_here_are_refused(device):
    check_device("cpu")
    check_device("cpu:1")
    with pytest.raises(ValueError, match=rf"`device` is '{device}', expected .*cpu"):
        check_device(device)


def test_threads_are_set_or_left():
    before = torch.get_num_threads()
    set_threads(None)
    assert torch.get_num_threads() == before
    set_threads(before + 1)
    assert torch.get_num_threads() == before + 1
    set_threads(before)
    with pytest.raises(ValueError, match="`threads` is 0"):
        set_threads(0)


def test_paths_by_name():
    assert named_paths(["a=x", " b = y=z "], "--p") == {"a": "x", "b": "y=z"}
    for wrong in ([], ["a"], ["=x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(ValueError, match=r"`--p` is .*expected NAME=PATH with distinct names"):
            named_paths(wrong, "--p")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 10_000])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):  # noqa: PT011
        parse_json(text)
    assert parse_json(b' {"a": 1} ') == {"a": 1}
