"""The target's features: computed in batches, or kept in a store on disk.

Features are the states of one layer of the target or of several, side by side. A layer is an index
into the decoder's layers, whose outputs are meant, or [`target.LAST`]: the last hidden states,
after the final norm, which the LM head reads. Of the tuple that transformers returns for
`output_hidden_states` layer i is entry i + 1.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..files import check_begun, hold, read_json, write_json
from ..target import LAST, check_layers, recording_decoder

_BYTES = 2  # of a bfloat16


class FeatureStore:
    """Features on disk, found by the token ids they belong to.

    Rows are appended and never changed. A row is there once its length has been written, which
    happens last, so an interrupted write leaves nothing but bytes that the next one overwrites.

    Args:
        folder: made if it does not exist. It holds `meta.json`, `features.bin` (bfloat16, row after
            row, (tokens, layers x hidden)), `tokens.bin` (int32) and `lengths.bin` (int32).
        target: name of the model whose features these are.
        hidden_size: width of one layer's states.
        layers: whose states a new store is to hold. One that exists holds these or more, and goes
            on with what it holds (see `layers`).

    Raises:
        ValueError: if the folder holds features of another target or width, lacks one of the
            layers, or holds other things, or its files are shorter than they were.
    """

    MARKER = "meta.json"

    layers: tuple[int, ...]
    """Whose states it holds of every token, in the order in which they lie side by side."""

    def __init__(
        self, folder: str | Path, target: str, hidden_size: int, layers: Sequence[int] = (LAST,)
    ) -> None:
        self.folder = Path(folder)
        self.hidden_size = hidden_size
        check_begun(self.folder, self.MARKER)
        meta = {"target": target, "hidden_size": hidden_size, "dtype": "bfloat16"}
        file = self.folder / self.MARKER
        if not file.exists():
            write_json(file, {**meta, "layers": list(layers)})
        found = read_json(file, "what a store of features holds")
        held = found.pop("layers", [LAST])  # earlier versions kept these alone, and said nothing
        if found != meta or not isinstance(held, list) or not set(layers) <= set(held):
            raise ValueError(
                f"{self.folder} holds features of {found}, layers {held}, expected {meta}, layers "
                f"{list(layers)} among them (-1 is what the LM head reads)."
            )
        self.layers = tuple(held)
        for name in ("features", "tokens", "lengths"):
            self._file(name).touch()
        self._lock: IO[bytes] | None = None
        self._index()

    def __contains__(self, input_ids: Sequence[int]) -> bool:
        return _digest(input_ids) in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def width(self) -> int:
        """Of what is kept of a token: layers x hidden."""
        return len(self.layers) * self.hidden_size

    def read(self, input_ids: Sequence[int], layers: Sequence[int] | None = None) -> torch.Tensor:
        """The features of a row: (len(input_ids), layers x hidden) bfloat16.

        Args:
            layers: whose states, in this order; by default all that the store holds.

        Raises:
            KeyError: if the row is not in the store.
            ValueError: if one of the layers is not.
        """
        offset = self._offsets[_digest(input_ids)]
        count = len(input_ids) * self.width
        with self._file("features").open("rb") as file:
            file.seek(offset * self.width * _BYTES)
            flat = torch.frombuffer(bytearray(file.read(count * _BYTES)), dtype=torch.bfloat16)
        found = flat.view(len(input_ids), self.width)
        if layers is None or tuple(layers) == self.layers:
            return found
        parts = found.split(self.hidden_size, dim=1)
        return torch.cat([parts[self.layers.index(layer)] for layer in layers], dim=1)

    def append(self, rows: Iterable[tuple[Sequence[int], torch.Tensor]]) -> None:
        """Add rows of (input ids, features of shape (len(input ids), layers x hidden)).

        Raises:
            ValueError: for features of another shape, or if another process is appending.
        """
        self._hold()
        rows = [(ids, features) for ids, features in rows if ids not in self]
        if not rows:
            return
        for ids, features in rows:
            if features.shape != (len(ids), self.width):
                raise ValueError(
                    f"Features of shape {tuple(features.shape)} were given, expected "
                    f"{(len(ids), self.width)}."
                )
        parts = {
            "features": torch.cat([x.to("cpu", torch.bfloat16) for _, x in rows]).view(torch.int16),
            "tokens": torch.tensor([token for ids, _ in rows for token in ids], dtype=torch.int32),
            "lengths": torch.tensor([len(ids) for ids, _ in rows], dtype=torch.int32),
        }
        ends = {
            "features": self.num_tokens * self.width * _BYTES,
            "tokens": self.num_tokens * 4,
            "lengths": self._num_rows * 4,
        }
        for name, values in parts.items():
            with self._file(name).open("r+b") as file:
                file.seek(ends[name])
                file.write(values.contiguous().numpy().tobytes())
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
        for ids, _ in rows:
            self._offsets[_digest(ids)] = self.num_tokens
            self.num_tokens += len(ids)
        self._num_rows += len(rows)

    def check_room(self, num_tokens: int) -> int:
        """Bytes that so many more tokens take.

        Raises:
            ValueError: if the disk has less room than that.
        """
        needed = num_tokens * (self.width * _BYTES + 4)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"The features of {num_tokens} tokens take {needed / 1e9:.1f} GB, but "
                f"{self.folder} has room for {free / 1e9:.1f} GB; train without a feature store."
            )
        return needed

    def _hold(self) -> None:
        """Be the only one that appends, until this process ends."""
        if self._lock is None:
            self._lock = hold(self.folder / "lock")
            self._index()  # another process may have written since

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _index(self) -> None:
        self._offsets: dict[bytes, int] = {}
        self.num_tokens = 0
        lengths = self._file("lengths").read_bytes()  # first, as it is written last
        tokens = self._file("tokens").read_bytes()
        lengths = lengths[: len(lengths) // 4 * 4]
        self._num_rows = len(lengths) // 4
        for length in memoryview(lengths).cast("i") if lengths else ():
            start, end = self.num_tokens * 4, (self.num_tokens + length) * 4
            self._offsets[hashlib.sha256(tokens[start:end]).digest()] = self.num_tokens
            self.num_tokens += length
        for name, width in (("features", self.width * _BYTES), ("tokens", 4)):
            size, expected = self._file(name).stat().st_size, self.num_tokens * width
            if size < expected:
                raise ValueError(
                    f"{self._file(name)} has {size} bytes, expected {expected} at least: those of "
                    "the rows in lengths.bin."
                )


def _digest(input_ids: Sequence[int]) -> bytes:
    return hashlib.sha256(torch.tensor(input_ids, dtype=torch.int32).numpy().tobytes()).digest()


class LayerStates:
    """A target's decoder that answers with the states of several layers, side by side.

    It keeps no other layers' states, and changes nothing on the target.

    Args:
        target: the model.
        layers: whose states, in this order.

    Raises:
        ValueError: if the target has no such layers.
    """

    def __init__(self, target: PreTrainedModel, layers: Sequence[int]) -> None:
        check_layers(target, layers)
        self.layers = tuple(layers)
        self._decoder, self._recorder = recording_decoder(target, layers)

    def __call__(self, **inputs: Any) -> torch.Tensor:
        """(batch, n, layers x hidden) of one pass over the decoder's inputs."""
        self._decoder(**inputs)
        states, self._recorder.states = self._recorder.states, {}
        device = states[LAST].device  # a `device_map` may have spread the layers
        parts = [states[layer].to(device) for layer in self.layers]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@torch.no_grad()
def features_of(
    target: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    layers: Sequence[int] = (LAST,),
) -> torch.Tensor:
    """The target's states of some layers; by default the last ones, what its LM head reads.

    Args:
        input_ids: (batch, length) int64, padded on the right.
        attention_mask: (batch, length), 0 at padding; None where nothing is padded. Causal
            attention already keeps padding on the right out of every real token's sight.
        layers: whose states, in this order.

    Returns:
        (batch, length, layers x hidden) in the target's dtype.

    Raises:
        ValueError: if the target has no such layers.
    """
    return LayerStates(target, layers)(
        input_ids=input_ids.to(target.device),
        attention_mask=None if attention_mask is None else attention_mask.to(target.device),
        use_cache=False,
    )


def fill_store(
    store: FeatureStore,
    target: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    batch_tokens: int = 8192,
    leave: bool = True,
) -> None:
    """Compute and keep the features of those rows that the store lacks, with a progress bar.

    Args:
        rows: token ids of each row.
        batch_tokens: about how many tokens, padding included, one pass of the target takes.
        leave: whether the progress bar stays when it is full.

    Raises:
        ValueError: before the first pass, if the disk is too small.
    """
    missing = sorted({tuple(ids) for ids in rows if ids not in store}, key=lambda ids: -len(ids))
    total = sum(map(len, missing))
    needed = store.check_room(total)
    if not missing:
        return
    title = f"features ({needed / 1e9:.2f} GB)"
    with tqdm(total=total, unit="token", desc=title, leave=leave) as progress:
        while missing:
            count = max(1, batch_tokens // len(missing[0]))
            batch, missing = missing[:count], missing[count:]
            longest = len(batch[0])
            padded = torch.tensor([list(ids) + [0] * (longest - len(ids)) for ids in batch])
            found = features_of(target, padded, layers=store.layers)
            store.append((ids, row[: len(ids)]) for ids, row in zip(batch, found))
            progress.update(sum(map(len, batch)))


def filled_stores(
    folders: Sequence[str],
    target: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int] = (LAST,),
) -> list[FeatureStore]:
    """Stores that have the features of all rows; the first gets those that none had.

    Args:
        folders: of the stores.
        rows: token ids of each row.
        layers: whose states are wanted of each store; a new one holds these.

    Raises:
        ValueError: as [`FeatureStore`] and [`fill_store`].
    """
    width = target.config.get_text_config(decoder=True).hidden_size
    name = target.config.name_or_path
    stores = [FeatureStore(folder, name, width, layers) for folder in folders]
    missing = [ids for ids in rows if not any(ids in store for store in stores)]
    fill_store(stores[0], target, missing)
    return stores


def known_features(
    target: PreTrainedModel,
    stores: Sequence[FeatureStore],
    input_ids: Sequence[int],
    layers: Sequence[int] = (LAST,),
) -> torch.Tensor:
    """The features of a row, (len(input_ids), layers x hidden): out of a store, or computed."""
    for store in stores:
        if input_ids in store:
            return store.read(input_ids, layers)
    given = torch.tensor([input_ids], device=target.device)
    return features_of(target, given, layers=layers)[0]
