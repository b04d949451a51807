from __future__ import annotations

import pytest

from taps_hf import list_strategies
from taps_hf.demo.settings import (
    PLAIN,
    Limits,
    Variant,
    check_request,
    check_variant,
    compared_variants,
)

LIMITS = Limits(prompt_tokens=20, new_tokens=50, depth=6, num_nodes=30)
GOOD = {
    "prompt": "t5 t6",
    "temperature": 0.5,
    "seed": 7,
    "max_new_tokens": 10,
    "depth": 3,
    "num_nodes": 12,
}


def test_a_request_within_its_limits(tiny_spec):
    request = check_request(tiny_spec, LIMITS, **GOOD)
    assert (request.prompt, request.temperature, request.seed) == ("t5 t6", 0.5, 7)
    assert (request.tree.depth, request.tree.top_k, request.tree.num_nodes) == (3, 8, 12)
    assert check_request(tiny_spec, LIMITS, **{**GOOD, "num_nodes": 3}).tree.top_k == 3
    # Whole numbers come from sliders as floats.
    assert check_request(tiny_spec, LIMITS, **{**GOOD, "seed": 7.0}).seed == 7


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": None}, "The prompt is empty. Write one"),
        ({"prompt": " \n"}, "The prompt is empty. Write one"),
        ({"prompt": "t5 " * 30}, r"The prompt has 32 tokens .* Shorten it to 20"),
        ({"prompt": "x" * 400}, r"The prompt has 400 characters. Shorten it to 20 tokens"),
        ({"temperature": None}, "Temperature is None"),
        ({"temperature": float("nan")}, "Temperature is nan. Choose a number from 0"),
        ({"temperature": -0.1}, "Temperature is -0.1"),
        ({"temperature": 2.1}, "Temperature is 2.1"),
        ({"seed": None}, "Seed is None. Choose a whole number from 0 to 4294967295"),
        ({"seed": 0.5}, "Seed is 0.5"),
        ({"seed": -1}, "Seed is -1"),
        ({"seed": float("inf")}, "Seed is inf"),
        ({"seed": float("nan")}, "Seed is nan"),
        ({"max_new_tokens": 51}, "Length is 51. Choose a whole number from 1 to 50"),
        ({"depth": 7}, "Tree depth is 7. Choose a whole number from 1 to 6"),
        ({"num_nodes": 0}, "Tree nodes is 0. Choose a whole number from 1 to 30"),
    ],
)
def test_what_is_out_of_its_limits_is_named(tiny_spec, changed, message):
    with pytest.raises(ValueError, match=message):
        check_request(tiny_spec, LIMITS, **{**GOOD, **changed})


def test_prompt_and_answer_must_fit_the_target(tiny_spec):
    """The tiny target has 256 positions."""
    wide = Limits(prompt_tokens=400, new_tokens=400)
    assert check_request(tiny_spec, wide, **{**GOOD, "prompt": "t5 " * 240})
    with pytest.raises(ValueError, match=r"has 252 tokens .* Shorten it to 246"):
        check_request(tiny_spec, wide, **{**GOOD, "prompt": "t5 " * 250})
    with pytest.raises(ValueError, match=r"room for 256 tokens in all. Choose a length below"):
        check_request(tiny_spec, wide, **{**GOOD, "max_new_tokens": 256})


def test_variants(tiny_spec):
    # In the order of the models, not of the clicks.
    both = check_variant(tiny_spec, ["chat", "math"], "merged")
    assert both == Variant("merged", ("math", "chat"), "merged")
    for drafters in ([], None, ["nobody"], ["math", "nobody"]):
        with pytest.raises(ValueError, match="Tick at least one of: math, chat"):
            check_variant(tiny_spec, drafters, "merged")
    for strategy in (None, "best"):
        with pytest.raises(ValueError, match=r"Choose one of: .*merged"):
            check_variant(tiny_spec, ["math"], strategy)


def test_what_is_compared(tiny_spec):
    plain, *rest = compared_variants(check_variant(tiny_spec, ["math", "chat"], "merged"))
    assert plain == PLAIN
    alone, together = rest[:2], rest[2:]
    assert [(v.drafters, v.strategy) for v in alone] == [
        (("math",), "single"),
        (("chat",), "single"),
    ]
    assert {v.strategy for v in together} == set(list_strategies()) - {"single"}
    assert all(v.drafters == ("math", "chat") for v in together)
    one = check_variant(tiny_spec, ["chat"], "merged")
    assert [v.drafters for v in compared_variants(one)] == [(), ("chat",)]
