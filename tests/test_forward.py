"""What plain `generate` runs is what verification runs, or it is refused."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.hooks import remove_hook_from_module
from transformers import LlamaForCausalLM

import taps_hf
from tests.tiny import prompt, refused, tiny_drafters, tiny_target

COMMON = {
    "max_new_tokens": 20,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}
OURS = {
    "assistant_models": tiny_drafters(2),
    "strategy": "merged",
    "tree": taps_hf.DynamicTree(depth=4, top_k=6, num_nodes=30),
}


def target() -> LlamaForCausalLM:
    return copy.deepcopy(tiny_target())


def other_positions(method):
    """Another forward: positions count twice, and token 3 is liked."""

    @functools.wraps(method)
    def forward(self, *args, position_ids, **kwargs):
        output = method(self, *args, position_ids=2 * position_ids, **kwargs)
        output.logits[..., 3] += 4.0
        return output

    return forward


def assert_same(model, length: int = 9) -> None:
    plain = model.generate(prompt(length), **COMMON)
    ours = model.generate(prompt(length), **COMMON, **OURS)
    assert torch.equal(plain.sequences, ours.sequences)
    for mine, theirs in zip(ours.logits, plain.logits):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    bare = tiny_target().generate(prompt(length), **COMMON)
    assert not torch.equal(plain.logits[0], bare.logits[0])


def test_a_method_set_on_the_object():
    model = target()
    model.forward = types.MethodType(other_positions(type(model).forward), model)
    before = vars(model)["forward"]
    assert_same(model)
    assert vars(model)["forward"] is before


def test_a_forward_of_a_subclass():
    class Liking(LlamaForCausalLM):
        forward = other_positions(LlamaForCausalLM.forward)

    model = target()
    model.__class__ = Liking
    assert_same(model)


def test_mixed_precision_by_accelerate():
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(target())
    common = {**COMMON, "max_new_tokens": 1}
    plain = model.generate(prompt(), **common).logits[0]
    ours = model.generate(prompt(), **common, **OURS).logits[0]
    exact = tiny_target().generate(prompt(), **common).logits[0]
    # In bfloat16 a pass over other rows rounds otherwise; float32 is much further away.
    assert (ours - plain).abs().max() < 0.5 * (ours - exact).abs().max()
    assert model.generate(prompt(), **COMMON, **OURS).sequences.shape == (1, 29)


def test_functions_set_on_the_object_are_refused():
    model = target()
    original = model.forward
    model.forward = functools.wraps(original)(lambda *args, **kwargs: original(*args, **kwargs))
    refused("`forward` of its own .*not a method bound to it", target=model)
    model.forward = target().forward
    refused("`forward` of its own .*not a method bound to it", target=model)


def test_a_method_that_runs_the_objects_own_modules_is_refused():
    model = target()
    original = model.forward
    model.forward = types.MethodType(lambda self, *a, **kw: original(*a, **kw), model)
    with pytest.raises(ValueError, match="did not run the modules of its `self` whose"):
        model.generate(prompt(), **COMMON, **OURS)


def test_a_forward_that_names_nothing_is_refused():
    class Opaque(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = target()
    model.__class__ = Opaque
    refused(
        r"forward \(Opaque\) names no `position_ids`.*it takes \(\*args, \*\*kwargs\)", target=model
    )


def test_accelerates_hooks_are_no_forward_of_its_own():
    model = dispatch_model(target(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert "forward" in vars(model)
    plain = tiny_target().generate(prompt(), **COMMON).sequences
    assert torch.equal(plain, model.generate(prompt(), **COMMON, **OURS).sequences)
    remove_hook_from_module(model, recurse=True)  # leaves the class's own on the object
    assert "forward" in vars(model)
    assert torch.equal(plain, model.generate(prompt(), **COMMON, **OURS).sequences)


def test_a_compiled_target():
    model = target()
    model.compile(backend="eager")
    plain = tiny_target().generate(prompt(), **COMMON).sequences
    assert torch.equal(plain, model.generate(prompt(), **COMMON, **OURS).sequences)
