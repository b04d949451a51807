"""What the figures in a folder belong to: written once, compared by every later run."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from ..files import read_json, write_json
from ..version import __version__
from .options import EvaluateOptions

_FILE = "settings.json"


def check_settings(options: EvaluateOptions, weights: Mapping[str, str], device: str) -> None:
    """Write what the figures belong to; refuse a folder that holds figures of something else.

    Args:
        options: of this run.
        weights: digest of each drafter's weights, by name.
        device: that it runs on, in words.

    Raises:
        ValueError: if the folder was measured with other settings.
    """
    digests = {name: weights[name] for name in options.drafters}
    settings = {
        "target": options.target,
        "drafters": {
            name: {"path": str(path), "weights": digests[name]}
            for name, path in options.drafters.items()
        },
        "tree": list(options.tree),
        "max_new_tokens": options.max_new_tokens,
        "record_batch": options.record_batch,
        "record_features": options.record_features,
        "dtype": options.dtype,
        "seed": options.seed,
    }
    found = measured_with(options.out)
    if found is not None:
        # Drafters may be added; those that are there must be what they were.
        known = {**found.pop("drafters")}
        then = {**found, **{name: known[name]["weights"] for name in known if name in digests}}
        now = {**settings, **digests}
        changed = {name: (then[name], now[name]) for name in then if then[name] != now[name]}
        if changed:
            raise ValueError(
                f"{options.out} was measured with other settings, (then, now): {changed}; expected "
                "the same, or another `out`."
            )
        settings["drafters"] = {**known, **settings["drafters"]}
    content = {"measured": settings, "provenance": _provenance(device)}
    write_json(options.out / _FILE, content)


def _provenance(device: str) -> dict[str, object]:
    """On what was measured."""
    return {
        "machine": platform.processor() or platform.machine(),
        "device": device,
        "threads": torch.get_num_threads(),
        "taps_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def measured_with(folder: Path) -> dict[str, Any] | None:
    """The settings that the figures in a folder belong to, if there are any.

    Raises:
        ValueError: if its settings are not those of an evaluation.
    """
    file = folder / _FILE
    if not file.is_file():
        return None
    found = read_json(file, "the settings of an evaluation").get("measured")
    if not isinstance(found, dict) or "drafters" not in found:
        raise ValueError(f"{file} is not of an evaluation; expected another `out`.")
    return found
