"""A drafter from wherever it was trained: its format is recognised, and read as ours."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ..drafters.checkpoints import find_file, read_object
from ..drafters.configuration_eagle import EagleDrafterConfig
from ..drafters.modeling_eagle import EagleDrafter
from ..drafters.modeling_eagle3 import Eagle3Drafter
from ..drafters.modeling_feature import FeatureDrafter
from .checkpoint import Checkpoint, Header, open_checkpoint
from .eagle import read as read_eagle
from .eagle3 import read as read_eagle3
from .reading import Found, Target

OURS: dict[str, type[FeatureDrafter]] = {
    kind.config_class.model_type: kind for kind in (EagleDrafter, Eagle3Drafter)
}
# Formats of the speculators project that say what they are.
_SPECULATORS = {"eagle": "eagle", "eagle3": "eagle3"}
_RENAMED = {"fusion_fc.": "fc.", "transformer.": "layers.0."}
# What else drafters are, by the names of their tensors.
_OTHERS = {
    "medusa_heads.": "Medusa heads",
    "0.0.linear.": "Medusa heads",
    "eagle_linear.": "Mistral's EAGLE heads",
    "mask_hidden": "P-EAGLE heads",
    "trunk.layers.": "weights of ours without our config.json",
}


def is_ours(source: str | Path, **finding: Any) -> str | None:
    """The `model_type` of a drafter in our own format; None if it is in another.

    Args:
        source: folder, or name of a repository of the Hub.
        **finding: of `from_pretrained`, about finding files.

    Raises:
        OSError: if there is no config.json.
        ValueError: if it is no JSON object.
    """
    kind = read_object(find_file(source, "config.json", finding, required=True)).get("model_type")
    return kind if isinstance(kind, str) and kind in OURS else None


def read_drafter(
    source: str | Path,
    target: PreTrainedModel,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    pickles: bool = False,
    layer_ids: Sequence[int] | None = None,
    norm_output: bool | None = None,
    **finding: Any,
) -> tuple[FeatureDrafter, list[str]]:
    """A drafter of ours or of others, on the CPU and in evaluation mode.

    Args:
        source: folder, or name of a repository of the Hub.
        target: that it will draft for: some files hold copies of its embedding and head, and
            leave unsaid what is the target's.
        dtype: of its weights, by default that in which they were saved.
        pickles: see [`open_checkpoint`].
        layer_ids, norm_output: of EAGLE-3 heads of others, instead of what their files say.
        **finding: of `from_pretrained`, about finding files.

    Returns:
        the drafter, and notes of what its files contradict or leave open.

    Raises:
        ValueError: if its files are broken, in no known format, or not for this target.
        OSError: if there are none.
    """
    with torch.random.fork_rng(devices=[]):  # making modules draws numbers; a seed is the user's
        return _read_drafter(source, target, dtype, pickles, layer_ids, norm_output, finding)


def _read_drafter(
    source: str | Path,
    target: PreTrainedModel,
    dtype: torch.dtype | Literal["auto"],
    pickles: bool,
    layer_ids: Sequence[int] | None,
    norm_output: bool | None,
    finding: Mapping[str, Any],
) -> tuple[FeatureDrafter, list[str]]:
    kind = is_ours(source, **finding)
    if kind is not None:
        if layer_ids is not None or norm_output is not None:
            raise ValueError(
                "`layer_ids` and `norm_output` were given, but the drafter is in our own format, "
                "whose config.json has no two meanings."
            )
        return OURS[kind].from_pretrained(source, dtype=dtype, **finding).eval(), []
    checkpoint = open_checkpoint(source, finding, pickles)
    found = _read(checkpoint, Target.of(target), layer_ids, norm_output)
    drafter = _made(found, dtype)
    drafter.name_or_path = drafter.config.name_or_path = str(source)
    return drafter, found.notes


def warn_of(notes: Sequence[str], source: str | Path) -> None:
    """Show notes of a drafter that was read, as warnings."""
    for note in notes:
        warnings.warn(f"{source}: {note}.", stacklevel=3)


def _read(
    checkpoint: Checkpoint,
    target: Target,
    layer_ids: Sequence[int] | None,
    norm_output: bool | None,
) -> Found:
    if recognise(checkpoint) == "eagle3":
        return read_eagle3(checkpoint, target, layer_ids, norm_output)
    if layer_ids is not None or norm_output is not None:
        raise ValueError(
            "`layer_ids` and `norm_output` were given, but the drafter is an EAGLE-2 or HASS head, "
            "which reads the target's last states."
        )
    return read_eagle(_renamed(checkpoint), target)


def _renamed(checkpoint: Checkpoint) -> Checkpoint:
    """With EAGLE's names instead of those that speculators once gave."""
    headers = {}
    for name, header in checkpoint.headers.items():
        start = next((old for old in _RENAMED if name.startswith(old)), "")
        headers[_RENAMED.get(start, "") + name[len(start) :]] = header
    return replace(checkpoint, headers=headers)


def recognise(checkpoint: Checkpoint) -> str:
    """`eagle` (EAGLE-1, EAGLE-2, HASS, TAPS) or `eagle3`: by tensors, whatever flags say.

    Raises:
        ValueError: for everything else, with what it is if that is known.
    """
    headers, folder = checkpoint.headers, checkpoint.config_file.parent
    said = checkpoint.config.get("speculators_model_type")
    if said is not None and (not isinstance(said, str) or said not in _SPECULATORS):
        raise ValueError(
            f"{checkpoint.config_file} has `speculators_model_type` {said!r}, expected one of "
            f"{', '.join(_SPECULATORS)}: other kinds are not supported."
        )
    for start, what in _OTHERS.items():
        if any(name.startswith(start) for name in headers):
            raise ValueError(f"{folder} holds {what}, expected an EAGLE-2, HASS or EAGLE-3 head.")
    if said is not None:
        return _SPECULATORS[said]
    if any(name.startswith("midlayer.") or ".hidden_norm." in name for name in headers):
        return "eagle3"
    fc = headers.get("fc.weight") or headers.get("fusion_fc.weight")
    if fc is None and _reads_two(headers):
        return "eagle3"  # one without a projection: its reader says what is wrong with it
    if fc is None or len(fc.shape) != 2:
        names = ", ".join(sorted(headers)[:3])
        raise ValueError(
            f"{folder} is no drafter in a known format: there is no matrix fc.weight among its "
            f"{len(headers)} tensors ({names}, …)."
        )
    return "eagle"


def _reads_two(headers: Mapping[str, Header]) -> bool:
    """Whether the first layer's attention reads twice as much as it gives."""
    query, output = (headers.get(f"layers.0.self_attn.{name}_proj.weight") for name in "qo")
    matrices = query is not None and output is not None and len(query.shape) == 2
    return matrices and output.shape[:1] == (query.shape[1] // 2,)


def _made(found: Found, dtype: torch.dtype | Literal["auto"]) -> FeatureDrafter:
    """The model. As any drafter that is loaded it runs some slots before it is given away."""
    kind = EagleDrafter if isinstance(found.config, EagleDrafterConfig) else Eagle3Drafter
    if dtype == "auto":
        dtype = found.state["fc.weight"].dtype
    drafter = kind._from_config(found.config, dtype=dtype)
    drafter.load_state_dict(found.state)
    if drafter.draft_token_ids is not None:
        drafter.check_token_ids(drafter.draft_token_ids)
    drafter.check_runs()
    return drafter.eval()
