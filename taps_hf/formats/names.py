"""Drafters that are given by name, loaded once for a target."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from ..drafters.modeling_feature import FeatureDrafter
from .load import read_drafter, warn_of

_loaded: WeakKeyDictionary[PreTrainedModel, dict[str, FeatureDrafter]] = WeakKeyDictionary()
_lock = threading.Lock()


def with_loaded(assistant_models: Any, target: PreTrainedModel) -> Any:
    """What `assistant_models` says, with drafters in the place of folders and names of the Hub.

    Each is loaded when it is first named and kept for as long as the target lives.

    Args:
        assistant_models: as `generate` got it.
        target: the model that is accelerated.

    Raises:
        ValueError: if a drafter's files are broken, pickles, in no known format, or not for this
            target.
        OSError: if there are none of that name.
    """
    if _is_name(assistant_models):
        return _named(assistant_models, target)
    if isinstance(assistant_models, Mapping):
        return {
            name: _named(each, target) if _is_name(each) else each
            for name, each in assistant_models.items()
        }
    if isinstance(assistant_models, Sequence):
        return [_named(each, target) if _is_name(each) else each for each in assistant_models]
    return assistant_models


def _is_name(each: object) -> bool:
    return isinstance(each, (str, os.PathLike))


def _named(name: str | os.PathLike[str], target: PreTrainedModel) -> FeatureDrafter:
    path = os.fspath(name)
    if not path:
        raise ValueError("`assistant_models` has an empty name, expected a folder or Hub name.")
    with _lock:  # two threads that name the same drafter read it once
        known = _loaded.setdefault(target, {})
        drafter = known.get(path)
        if drafter is None or drafter.device != target.device:
            drafter, notes = read_drafter(path, target)
            warn_of(notes, path)
            known[path] = drafter = drafter.to(target.device)
        return drafter
