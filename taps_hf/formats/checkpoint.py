"""A checkpoint of somebody else's, as data: its configuration, and its tensors one at a time.

Headers are read first, so that what is wrong is said before weights are. Pickles are read only
where that was asked for, and then as tensors and nothing else.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..drafters.checkpoints import find_file, read_object, safetensors_files, shards_of

PICKLE = "pytorch_model.bin"
# What trainers and frameworks put before a drafter's names.
_PREFIXES = ("model.", "module.", "draft_model.", "eagle_module.", "drafter.")
# Buffers that are computed from the configuration.
_COMPUTED = "rotary_emb."
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Header:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # torch's, or what the file calls one that drafters never have
    file: Path
    name: str  # in the file

    def __str__(self) -> str:
        kind = self.dtype if isinstance(self.dtype, str) else str(self.dtype).removeprefix("torch.")
        return f"{kind} {list(self.shape)}"

    @property
    def is_floating(self) -> bool:
        return isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point


@dataclass(frozen=True)
class Checkpoint:
    """A folder or a repository of the Hub.

    Args:
        source: what the user called it.
        config_file: its `config.json`.
        config: the content.
        headers: of its tensors, by names without prefixes; without computed buffers.
        pickled: those that were read from a pickle, by the names there.
    """

    source: str
    config_file: Path
    config: Mapping[str, Any]
    headers: Mapping[str, Header]
    pickled: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, on the CPU, as it was saved."""
        header = self.headers[name]
        if header.name in self.pickled:
            return self.pickled[header.name]
        with safe_open(header.file, framework="pt") as opened:
            return opened.get_tensor(header.name)

    def rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Some rows of a matrix that may be too large to be read as a whole."""
        header = self.headers[name]
        if header.name in self.pickled:
            return self.pickled[header.name][start:end]
        with safe_open(header.file, framework="pt") as opened:
            return opened.get_slice(header.name)[start:end]

    def where(self, name: str) -> str:
        """For messages: the file and the tensor."""
        header = self.headers.get(name)
        return f"{self.config_file.parent if header is None else header.file}: {name}"


def open_checkpoint(
    source: str | Path, kwargs: Mapping[str, Any] | None = None, pickles: bool = False
) -> Checkpoint:
    """Read the configuration and the headers.

    Args:
        source: folder, or name of a repository of the Hub.
        kwargs: of `from_pretrained`; those about finding files are used.
        pickles: whether weights may be read from `pytorch_model.bin` where there are no
            safetensors. They are read by torch's loader of plain tensors, which runs no code.

    Raises:
        OSError: if files are missing.
        ValueError: if they are broken, or would have to be unpickled and may not be.
    """
    kwargs = {} if kwargs is None else kwargs
    config_file = find_file(source, "config.json", kwargs, required=True)
    config = read_object(config_file)
    pickled: dict[str, torch.Tensor] = {}
    try:
        files: Sequence[Path] = safetensors_files(source, kwargs)
    except OSError as error:
        pickled_files = _pickles(source, kwargs)
        if not pickled_files:
            raise OSError(
                f"{source} has no weights that can be read, expected model.safetensors or "
                f"{PICKLE}, or an index of either."
            ) from error
        if not pickles:
            raise ValueError(
                f"{pickled_files[0]} is a pickle, expected safetensors: `taps-hf convert {source} "
                "--target … --out …` makes some, once."
            ) from error
        found = {}
        for file in pickled_files:
            pickled |= (state := _unpickle(file))
            found |= {
                name: Header(tuple(x.shape), x.dtype, file, name) for name, x in state.items()
            }
    else:
        found = {}
        for file in files:
            found |= _headers(file)
    return Checkpoint(str(source), config_file, config, _plain_names(found), pickled)


def _pickles(source: str | Path, kwargs: Mapping[str, Any]) -> list[Path]:
    """The files of pickled weights: none, one, or those that an index names."""
    whole = find_file(source, PICKLE, kwargs, required=False)
    if whole is not None:
        return [whole]
    index = find_file(source, f"{PICKLE}.index.json", kwargs, required=False)
    if index is None:
        return []
    return [find_file(source, name, kwargs, required=True) for name in shards_of(index, ".bin")]


def _headers(file: Path) -> dict[str, Header]:
    try:
        with safe_open(file, framework="pt") as opened:
            found = {}
            for name in list(opened.keys()):
                part = opened.get_slice(name)
                kind = part.get_dtype()
                found[name] = Header(tuple(part.get_shape()), _DTYPES.get(kind, kind), file, name)
            return found
    except SafetensorError as error:
        raise ValueError(f"{file} is broken: {error}.") from error


def _unpickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, of which nothing else is made.

    Raises:
        ValueError: if it holds anything else, or more than its own size says.
    """
    size = file.stat().st_size
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is not what torch.save writes (or is cut off).")
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > size:
        raise ValueError(
            f"{file} has {size} bytes and would unpack to {unpacked}, expected no more: torch "
            "writes without compression."
        )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as plain tensors: {error}") from error
    odd = not isinstance(state, Mapping) or [
        name
        for name, x in state.items()
        if not isinstance(name, str) or not isinstance(x, torch.Tensor)
    ]
    if odd:
        raise ValueError(f"{file} does not hold named tensors only, expected a state dictionary.")
    for name, x in state.items():
        if x.layout != torch.strided or x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise ValueError(f"{file}: {name} is larger than what is stored of it.")
    return dict(state)


def _plain_names(found: Mapping[str, Header]) -> dict[str, Header]:
    """Names without the prefixes that others put before them, without computed buffers.

    Raises:
        ValueError: if two names become the same.
    """
    plain: dict[str, Header] = {}
    for name, header in found.items():
        short = name
        while prefix := next((p for p in _PREFIXES if short.startswith(p)), None):
            short = short[len(prefix) :]
        if _COMPUTED in short:
            continue
        if short in plain:
            raise ValueError(
                f"{header.file} has {name} and {plain[short].name}, expected one of them: two "
                "checkpoints in one folder?"
            )
        plain[short] = header
    return plain
