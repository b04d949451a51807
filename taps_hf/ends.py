"""The two ends of a target alone: its embedding and its LM head.

Drafters in other formats are converted by the target's configuration and these two matrices, of a
model of 8 billion weights by 2 GB out of 16. So these are read out of its files, and between them
stand modules without memory (on the meta device), which cannot be run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .checks import loading
from .drafters.checkpoints import find_file, read_object, shards_of
from .loading import EMBEDDED, load_model

_ADAPTER = "adapter_config.json"


def load_ends(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A target that has its configuration, embedding and LM head, on the CPU, and no other weight.

    That is read from safetensors, in one file or in several. Where they do not hold these tensors
    as they are (other formats, quantised or merged weights, adapters, a head beside an embedding
    that is said to be the head, the embedded GGUF) the whole target is loaded, with a warning but
    for the embedded one.

    Args:
        name: folder, Hub name (of which only the files that hold the two are fetched), or
            `embedded`.
        dtype: of the weights.

    Raises:
        ValueError: if files are broken.
        OSError: if there is no such target.
    """
    if name == EMBEDDED:
        return load_model(name, dtype, "cpu")
    with loading(f"The target {name}"):
        config = AutoConfig.from_pretrained(name, dtype=dtype)  # as early 5.x leaves it
        # On the meta device nothing is drawn, and no memory taken.
        with torch.device("meta"):
            target = AutoModelForCausalLM.from_config(config, dtype=dtype)
        target.tie_weights()
        unusual = _fill(target, name, dtype)
    if unusual is not None:
        warnings.warn(f"{name}: {unusual}, so all of the target is loaded.", stacklevel=2)
        return load_model(name, dtype, "cpu")
    return target.eval().requires_grad_(False)


def _fill(target: PreTrainedModel, name: str, dtype: torch.dtype) -> str | None:
    """Give a target without memory its two ends; or say why they cannot be read alone.

    Nothing is given if so.
    """
    if find_file(name, _ADAPTER, {}, required=False) is not None:
        return f"it has an {_ADAPTER}"
    if getattr(target.config, "quantization_config", None) is not None:
        return "it is quantised"
    ends = [target.get_input_embeddings(), target.get_output_embeddings()]
    if None in ends:
        return f"{type(target).__name__} has no embedding or LM head of its own"
    names = {module: path for path, module in target.named_modules() if module in ends}
    files = _files(name)
    if files is None:
        return "it has no safetensors"
    tied = ends[1].weight is ends[0].weight
    if tied and f"{names[ends[1]]}.weight" in files:
        return "its embedding is said to be its LM head, and there is one beside it"
    found: list[tuple[nn.Module, str, torch.Tensor]] = []
    for module in ends:
        for own, parameter in module.named_parameters():
            if tied and (module, own) == (ends[1], "weight"):
                continue
            path = f"{names[module]}.{own}"
            if path not in files:
                return f"its safetensors have no {path}"
            file = find_file(name, files[path], {}, required=True)
            with safe_open(file, framework="pt") as opened:
                part = opened.get_slice(path)
                if part.get_shape() != list(parameter.shape):
                    return f"{path} has the shape {part.get_shape()}, not {list(parameter.shape)}"
                tensor = opened.get_tensor(path)
            if not tensor.is_floating_point():
                return f"{path} is {tensor.dtype}"
            found.append((module, own, tensor.to(dtype)))
    for module, own, tensor in found:
        setattr(module, own, nn.Parameter(tensor, requires_grad=False))
    if tied:
        ends[1].weight = ends[0].weight
    return None


def _files(name: str) -> Mapping[str, str] | None:
    """By tensor the name of the file it is in; None if there are no safetensors."""
    whole = find_file(name, SAFE_WEIGHTS_NAME, {}, required=False)
    if whole is not None:
        with safe_open(whole, framework="pt") as opened:
            return dict.fromkeys(list(opened.keys()), SAFE_WEIGHTS_NAME)
    index = find_file(name, SAFE_WEIGHTS_INDEX_NAME, {}, required=False)
    if index is None:
        return None
    shards_of(index, ".safetensors")  # refuses what is no index, and files elsewhere
    return read_object(index)["weight_map"]
