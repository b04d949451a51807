"""A drafter's folder with something broken in it: refused at loading, or it drafts losslessly."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from taps_hf import EagleDrafter

from ..tiny import FAMILIES, prompt, tiny_drafters, tiny_target

REFUSALS = (ValueError, OSError, SafetensorError)
_VALUES = [None, True, -1, 0, 1, 3, 10**9, 2**70, 0.5, float("nan"), "", "x", [], [1], {}, {"a": 1}]
_IDS = [-1, 0, 1, 15, 16, 2**40]


def case(seed: int) -> None:
    """One change, or a few; nothing but refusals at loading, and none but fitting errors later."""
    choose = random.Random(seed)
    family = choose.choice(sorted(FAMILIES))
    drafter = tiny_drafters(1, family, draft_vocab=choose.choice([None, 6]))[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drafter.save_pretrained(folder)
        for _ in range(choose.choice([1, 1, 1, 2, 3])):
            print(_mutate(folder, choose))
        try:
            loaded = EagleDrafter.from_pretrained(folder, dtype=choose.choice([None, "float32"]))
        except REFUSALS as error:
            print(f"{type(error).__name__}: {error}")
            return
    loaded.check_runs()
    target = tiny_target(family)
    plain = target.generate(prompt(), max_new_tokens=12, do_sample=False)
    partners = [loaded, *tiny_drafters(1, family)]
    for drafters in (partners[:1], partners):
        try:
            ours = target.generate(
                prompt(),
                max_new_tokens=12,
                do_sample=False,
                assistant_models=drafters,
                strategy="merged",
            )
        except ValueError as error:
            if "drafter" not in str(error).lower():  # sound, but for another target
                raise
        else:
            assert torch.equal(ours, plain)


def _mutate(folder: Path, choose: random.Random) -> str:
    """Break one thing and say what."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    kind = choose.choice(["field", "field", "layer", "layer", "layer", "tensor", "bytes", "cut"])
    try:
        if kind in ("field", "layer"):
            return _mutate_field(config, kind == "layer", choose)
        if kind == "tensor":
            return _mutate_tensor(weights, choose)
    except (ValueError, KeyError, TypeError, SafetensorError):
        return f"no {kind} is left to change"  # what was there is broken already
    file = choose.choice([config, weights])
    content = bytearray(file.read_bytes())
    at = choose.randrange(max(min(len(content), choose.choice([400, 10**6])), 1))
    if kind == "cut":
        del content[at:]
    elif content:
        content[at] = choose.randrange(256)
    file.write_bytes(content)
    return f"{kind} {file.name} at {at}"


def _mutate_field(config: Path, in_layer: bool, choose: random.Random) -> str:
    content = json.loads(config.read_text())
    part = content["layer_config"] if in_layer else content
    extra = ["sliding_window", "layer_types", "dtype", "head_dim", "auto_map", "rope_parameters"]
    name = choose.choice([*sorted(part), *extra])
    if choose.random() < 0.1:
        part.pop(name, None)
    else:
        part[name] = choose.choice(_VALUES)
    config.write_text(json.dumps(content))
    return f"{'layer_config: ' * in_layer}{name} = {part.get(name)!r}"


def _mutate_tensor(weights: Path, choose: random.Random) -> str:
    tensors = load_file(weights)
    name = choose.choice(sorted(tensors))
    change = choose.choice(["lose", "flatten", "int8", "rename", "transpose", "fill", "ids"])
    if change == "ids":
        name = "draft_token_ids"
    tensor = tensors.pop(name)
    if change == "flatten":
        tensors[name] = tensor.reshape(-1, 1)
    elif change == "int8":
        tensors[name] = tensor.to(torch.int8)
    elif change == "rename":
        tensors[name + "x"] = tensor
    elif change == "transpose":
        tensors[name] = tensor.t().contiguous()
    elif change == "fill" and tensor.is_floating_point():
        value = choose.choice([0.0, 1e30, float("inf"), float("nan")])
        tensors[name] = torch.full_like(tensor, value)
        change = f"fill {value}"
    elif change in ("fill", "ids"):
        at, value = choose.randrange(len(tensor)), choose.choice(_IDS)
        tensors[name] = tensor.index_fill(0, torch.tensor([at]), value)
        change = f"{value} at {at} of"
    save_file(tensors, weights, metadata={"format": "pt"})
    return f"{change} {name}"
