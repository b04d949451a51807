"""What a drafter's folder holds, read before anything is made of it.

Folders come from anyone. Only safetensors are read, and only inside the folder; their headers tell
the weights' shapes, so a configuration which asks for others is refused before memory is taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

_FINDING = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
_DTYPES = {torch.int64: "I64"}


def find_file(
    path: str | Path, name: str, kwargs: Mapping[str, Any], required: bool
) -> Path | None:
    """A file of a folder or of a repository of the Hub, as transformers finds it.

    Args:
        path: a folder, or the name of a repository of the Hub.
        name: of the file.
        kwargs: of `from_pretrained`; those about finding files are used.
        required: whether it must be there.

    Raises:
        OSError: if it must and is not.
    """
    found = cached_file(
        path,
        name,
        **{k: kwargs[k] for k in _FINDING if kwargs.get(k) is not None},
        _raise_exceptions_for_missing_entries=required,
    )
    if found is None and required:
        raise OSError(f"{path} has no file {name}.")
    return None if found is None else Path(found)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ValueError: if it holds none.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object.")
    return content


def read_config(path: str | Path, kwargs: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The content of a checkpoint's `config.json`.

    Args:
        path: a folder, or the name of a repository of the Hub.
        kwargs: of `from_pretrained`; those about finding files are used.
        model_type: of the kind of drafter that is wanted.

    Raises:
        OSError: if there is none.
        ValueError: if it is not a JSON object, or not such a drafter's.
    """
    file = find_file(path, "config.json", kwargs, required=True)
    content = read_object(file)
    if content.get("model_type") != model_type:
        raise ValueError(
            f"{file} has `model_type` {content.get('model_type')!r}, expected {model_type!r}: "
            "it is not such a drafter's."
        )
    return content


def safetensors_files(path: str | Path, kwargs: Mapping[str, Any]) -> list[Path]:
    """The files that a checkpoint's weights are in.

    Args:
        path: a folder, or the name of a repository of the Hub.
        kwargs: of `from_pretrained`; those about finding files are used.

    Raises:
        OSError: if there are none.
        ValueError: if the index is not one, or names a file that is not a safetensors file beside
            it, or if an adapter's configuration names other weights.
    """
    adapter = find_file(path, "adapter_config.json", kwargs, required=False)
    if adapter is not None:  # with peft installed, transformers would load the model it names
        raise ValueError(f"{adapter} is there, but drafters have no adapters.")
    variant = kwargs.get("variant")
    weights, index = (
        name if variant is None else f"{(parts := name.rsplit('.', 1))[0]}.{variant}.{parts[1]}"
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    whole = find_file(path, weights, kwargs, required=False)
    if whole is not None:
        return [whole]
    found = find_file(path, index, kwargs, required=False)
    if found is None:
        raise OSError(f"{path} has neither {weights} nor {index}: drafters are safetensors only.")
    names = shards_of(found, ".safetensors")
    return [find_file(path, name, kwargs, required=True) for name in names]


def shards_of(index: Path, suffix: str) -> list[str]:
    """The names of the files that an index spreads weights over, sorted.

    Args:
        index: the file.
        suffix: how their names must end.

    Raises:
        ValueError: if it is no index, or names a file of another kind or outside of its folder.
    """
    parts = read_object(index).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f"{index} has no `weight_map` from weights to files.")
    for weight, name in parts.items():
        # On any system: a backslash is a separator on some.
        plain = isinstance(name, str) and PurePosixPath(name).name == name and "\\" not in name
        if not plain or not name.endswith(suffix):
            raise ValueError(
                f"{index} has weight {weight!r} in {name!r}, expected a *{suffix} file of the "
                "same folder."
            )
    return sorted(set(parts.values()))


def check_shapes(files: Sequence[Path], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare headers with what a model's modules hold.

    Raises:
        ValueError: if a weight is missing, unknown, or of another shape, or a buffer of integers
            holds something else.
        SafetensorError: if a file is not safetensors.
    """
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in list(weights.keys()):
                part = weights.get_slice(name)
                found[name] = (list(part.get_shape()), part.get_dtype())
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(found.keys() & expected.keys()):
        (shape, dtype), tensor = found[name], expected[name]
        wanted = _DTYPES.get(tensor.dtype, dtype)
        if shape != list(tensor.shape) or dtype != wanted:
            wrong.append(f"{name} is {dtype} {shape}, expected {wanted} {list(tensor.shape)}")
    if wrong:
        raise ValueError(f"{files[0].parent} does not fit its configuration: {'; '.join(wrong)}.")
