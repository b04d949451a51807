"""Several drafters in one folder, for vLLM with our plugin: what is in it, written and checked.

`config.json` looks like a Llama's, since vLLM reads sizes there, with what only our plugin knows
under the key `taps_hf`: see [`Composition`]. `model.safetensors` holds the drafters' tensors, those
of drafter k under `drafters.k.`, by the names of our own format without `trunk.`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..drafters.modeling_eagle import EagleDrafter
from ..drafters.modeling_eagle3 import Eagle3Drafter
from ..drafters.modeling_feature import FeatureDrafter
from .composition import ARCHITECTURES, PER_TOKEN, Composition, Dialect, Drafting
from .reading import EXTRA
from .written import LAYER, Written, common_reasons, layer_of, window_notes

_FAMILIES = {EagleDrafter: ("llama", "mistral", "qwen2"), Eagle3Drafter: ("llama", "qwen3")}
# What one computation for all of them needs to be equal, of `layer_of`.
_SHAPE = (
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
)
_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def compose(
    drafters: Mapping[str, FeatureDrafter],
    target: PreTrainedModel,
    drafting: Drafting = PER_TOKEN,
    dtype: torch.dtype | None = None,
) -> Written:
    """What the folder holds of some drafters.

    Args:
        drafters: by name; one or more, each of which fits the target.
        target: that they draft for.
        drafting: how they draft together.
        dtype: of the weights, by default the first drafter's.

    Raises:
        ValueError: if they cannot be served together, saying which, and why.
    """
    if not drafters:
        raise ValueError("There are no drafters to compose, expected one or more.")
    for name, drafter in drafters.items():
        _check_one(name, drafter)
    layers = {name: layer_of(drafter, target) for name, drafter in drafters.items()}
    _check_alike(drafters, layers)
    each = list(drafters.values())
    width, first = each[0].config.hidden_size, each[0]
    dtype = first.dtype if dtype is None else dtype
    scored = [drafter.draft_token_ids for drafter in each]
    new = isinstance(first, Eagle3Drafter)
    composition = Composition(
        names=tuple(drafters),
        hidden_size=width,
        draft_vocab_sizes=None if scored[0] is None else tuple(len(ids) for ids in scored),
        fc_biases=tuple(drafter.fc.bias is not None for drafter in each),
        input_norm=new or first.config.input_norm,
        qkv_bias=_has(first, "q_proj.bias"),
        drafting=drafting,
        target=first.config.target_name_or_path,
        eagle3=_dialect(each) if new else None,
    )
    config = {
        "architectures": [ARCHITECTURES[composition.method]],
        **layers[next(iter(drafters))],
        "hidden_size": len(each) * width,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
        EXTRA: composition.fields(),
    }
    if composition.eagle3 is not None:
        config["eagle_aux_hidden_state_layer_ids"] = list(composition.eagle3.read)
    tensors = {
        f"drafters.{k}.{name}": x
        for k, drafter in enumerate(each)
        for name, x in _tensors(drafter, dtype).items()
    }
    return Written(config, tensors, notes=_notes(drafters))


def check_composed(folder: Path, drafters: Mapping[str, FeatureDrafter]) -> None:
    """Read the weights that were written, and compare them with the drafters'.

    Raises:
        RuntimeError: if one is missing or differs: then the folder must not be used.
    """
    found = load_file(folder / "model.safetensors")
    dtype = next(x.dtype for x in found.values() if x.is_floating_point())
    expected = {
        f"drafters.{k}.{name}": x
        for k, drafter in enumerate(drafters.values())
        for name, x in _tensors(drafter, dtype).items()
    }
    wrong = found.keys() ^ expected.keys()
    wrong |= {name for name in found.keys() - wrong if not found[name].equal(expected[name])}
    if wrong:
        raise RuntimeError(f"{folder} was written and reads back otherwise: {sorted(wrong)}.")


def _tensors(drafter: FeatureDrafter, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("trunk."): (x.to(dtype) if x.is_floating_point() else x)
        .detach()
        .cpu()
        .contiguous()
        .clone()
        for name, x in drafter.state_dict().items()
    }


def _check_one(name: str, drafter: FeatureDrafter) -> None:
    families = _FAMILIES.get(type(drafter))
    if families is None:
        raise ValueError(
            f"Drafter {name!r} is of the kind {type(drafter).__name__}, and the plugin composes "
            f"{' or '.join(kind.__name__ for kind in _FAMILIES)}."
        )
    reasons = {
        **common_reasons(drafter, families),
        "output": "its attention has a bias on the output"
        if _has(drafter, "o_proj.bias")
        else None,
    }
    for reason in reasons.values():
        if reason is not None:
            raise ValueError(f"Drafter {name!r} cannot be served by the plugin: {reason}.")


def _check_alike(
    drafters: Mapping[str, FeatureDrafter], layers: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise `ValueError` for drafters of two targets, or that cannot be one computation."""
    names = list(drafters)
    first = drafters[names[0]]
    for name in names[1:]:
        other = drafters[name]
        if other is first or other.digest() == first.digest():
            raise ValueError(
                f"Drafters {names[0]!r} and {name!r} have the same weights, expected different "
                "drafters: a drafter cannot route to itself."
            )
        if type(other) is not type(first):
            raise ValueError(
                f"Drafters {names[0]!r} and {name!r} are of the kinds {type(first).__name__} and "
                f"{type(other).__name__}, expected one kind: vLLM gives drafters either the "
                "target's last states or those of other layers, and all run as one computation."
            )
        _check_targets(names[0], first, name, other)
        found: dict[str, list[Any]] = {
            key: [layers[n][key] for n in (names[0], name)] for key in _SHAPE
        }
        for key, of in _MORE_SHAPE[type(first)].items():
            found[key] = [of(one) for one in (first, other)]
        for key, (here, there) in found.items():
            if here != there:
                raise ValueError(
                    f"Drafters {names[0]!r} and {name!r} differ in {key} ({here} and {there}), "
                    "expected drafters of one shape, which run as one computation."
                )


def _check_targets(
    name: str, drafter: FeatureDrafter, other_name: str, other: FeatureDrafter
) -> None:
    """Raise `ValueError` if what two drafters say of their targets contradicts each other."""
    for field in ("tokenizer_fingerprint", "target_name_or_path"):
        here, there = getattr(drafter.config, field), getattr(other.config, field)
        # A target may lie in a folder here and on the Hub there, under the same last name.
        if here and there and Path(here).name != Path(there).name:
            raise ValueError(
                f"Drafters {name!r} and {other_name!r} were made for two targets (`{field}` "
                f"{here!r} and {there!r}), expected drafters of one."
            )


def _has(drafter: FeatureDrafter, name: str) -> bool:
    """Whether its attention has a tensor."""
    return f"{LAYER}self_attn.{name}" in drafter.state_dict()


def _dialect(drafters: Sequence[Eagle3Drafter]) -> Dialect:
    flags = {name: getattr(drafters[0].config, name) for name in _FLAGS}
    ids = tuple(tuple(drafter.config.layer_ids) for drafter in drafters)
    return Dialect(ids, **flags, qk_norm=_has(drafters[0], "q_norm.weight"))


# What else must be equal, of drafters of one kind.
_EVERY_SHAPE: dict[str, Callable[[Any], Any]] = {
    "qkv_bias": lambda drafter: _has(drafter, "q_proj.bias"),
    "a draft vocabulary": lambda drafter: drafter.draft_token_ids is not None,
}
_MORE_SHAPE = {
    EagleDrafter: {**_EVERY_SHAPE, "input_norm": lambda drafter: drafter.config.input_norm},
    Eagle3Drafter: {
        **_EVERY_SHAPE,
        **{name: attrgetter(f"config.{name}") for name in _FLAGS},
        "qk_norm": lambda drafter: _has(drafter, "q_norm.weight"),
        "the number of layers they read": lambda drafter: len(drafter.config.layer_ids),
    },
}


def _notes(drafters: Mapping[str, FeatureDrafter]) -> list[str]:
    notes = []
    if all(one.draft_token_ids is None and not one.has_own_head for one in drafters.values()):
        notes.append(
            "all tokens of the target are scored, by each drafter: fewer (`--draft-vocab 4096`) "
            "take much less time where the target is small"
        )
    return notes + window_notes(drafters)
