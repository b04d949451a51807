"""Several drafters in one folder, for vLLM with our plugin: what is in it, written and checked.

`config.json` looks like a Llama's, since vLLM reads sizes there, with what only our plugin knows
under the key `taps_hf`: see [`Composition`]. `model.safetensors` holds the drafters' tensors, those
of drafter k under `drafters.k.`, by the names of our own format without `trunk.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..drafters.modeling_eagle import EagleDrafter
from ..drafters.modeling_feature import FeatureDrafter
from .reading import EXTRA
from .written import LAYER, Written, common_reasons, layer_of

ARCHITECTURE = "EagleTapsForCausalLM"
"""Of the folder. vLLM puts "Eagle" before names that do not begin with it, and looks that up."""

FAMILIES = ("llama", "mistral", "qwen2")
Routing = Literal["token", "request"]
_FORMAT = 1
# What one computation for all of them needs to be equal, of `layer_of`.
_SHAPE = (
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
)


@dataclass(frozen=True)
class Composition:
    """What `config.json` says under `taps_hf`.

    Args:
        names: of the drafters, in the order of their tensors.
        hidden_size: of the target and of each drafter; the folder's own is as many times that as
            there are drafters, because vLLM passes their states side by side.
        draft_vocab_sizes: how many tokens each of them scores; None where all score all.
        fc_biases: whether each one's projection has a bias.
        input_norm: whether their layers normalise their input.
        qkv_bias: whether their attention has biases on its inputs.
        routing: "token" takes each token from the drafter that is surest of its own best one;
            "request" from the one that has been surest on average in this request so far.
        target: the name of the target, for messages; None if it has none.
        format: of the folder; others are refused.
    """

    names: tuple[str, ...]
    hidden_size: int
    draft_vocab_sizes: tuple[int, ...] | None
    fc_biases: tuple[bool, ...]
    input_norm: bool
    qkv_bias: bool
    routing: Routing = "token"
    target: str | None = None
    format: int = _FORMAT

    def __post_init__(self) -> None:
        if self.routing not in get_args(Routing):
            raise ValueError(f"`routing` is {self.routing!r}, expected 'token' or 'request'.")

    @classmethod
    def of(cls, fields: object) -> Composition:
        """From the fields of a file, as [`fields`] gives them.

        Raises:
            ValueError: if they are not those of a composition that is known here.
        """
        if not isinstance(fields, Mapping) or fields.get("format") != _FORMAT:
            raise ValueError(
                f"`{EXTRA}` of config.json is {fields!r:.80}, expected a composition of format "
                f"{_FORMAT}, as `taps-hf export --to vllm --compose` writes it."
            )
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        except TypeError as error:
            raise ValueError(f"`{EXTRA}` of config.json: {error}.") from None

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}


def compose(
    drafters: Mapping[str, FeatureDrafter],
    target: PreTrainedModel,
    routing: Routing = "token",
    dtype: torch.dtype | None = None,
) -> Written:
    """What the folder holds of some drafters.

    Args:
        drafters: by name; one or more, each of which fits the target.
        target: that they draft for.
        routing: see [`Composition`].
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
    composition = Composition(
        names=tuple(drafters),
        hidden_size=width,
        draft_vocab_sizes=None if scored[0] is None else tuple(len(ids) for ids in scored),
        fc_biases=tuple(drafter.config.fc_bias for drafter in each),
        input_norm=first.config.input_norm,
        qkv_bias=_qkv_bias(first),
        routing=routing,
        target=first.config.target_name_or_path,
    )
    config = {
        "architectures": [ARCHITECTURE],
        **layers[next(iter(drafters))],
        "hidden_size": len(each) * width,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
        EXTRA: composition.fields(),
    }
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


def _tensors(drafter: EagleDrafter, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("trunk."): (x.to(dtype) if x.is_floating_point() else x)
        .detach()
        .cpu()
        .contiguous()
        .clone()
        for name, x in drafter.state_dict().items()
    }


def _check_one(name: str, drafter: FeatureDrafter) -> None:
    if not isinstance(drafter, EagleDrafter):
        raise ValueError(
            f"Drafter {name!r} is of the kind {type(drafter).__name__}, and the plugin composes "
            "EAGLE-2 and HASS drafters; vLLM serves an EAGLE-3 head alone (`taps-hf export "
            "DRAFTER --to vllm`, without `--compose`)."
        )
    output_bias = f"{LAYER}self_attn.o_proj.bias" in drafter.state_dict()
    reasons = {
        **common_reasons(drafter, FAMILIES),
        "output": "its attention has a bias on the output" if output_bias else None,
    }
    for reason in reasons.values():
        if reason is not None:
            raise ValueError(f"Drafter {name!r} cannot be served by the plugin: {reason}.")


def _check_alike(
    drafters: Mapping[str, EagleDrafter], layers: Mapping[str, Mapping[str, Any]]
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
        _check_targets(names[0], first, name, other)
        found: dict[str, list[Any]] = {
            key: [layers[n][key] for n in (names[0], name)] for key in _SHAPE
        }
        both = (first, other)
        found["input_norm"] = [one.config.input_norm for one in both]
        found["qkv_bias"] = [_qkv_bias(one) for one in both]
        found["a draft vocabulary"] = [one.draft_token_ids is not None for one in both]
        for key, (here, there) in found.items():
            if here != there:
                raise ValueError(
                    f"Drafters {names[0]!r} and {name!r} differ in {key} ({here} and {there}), "
                    "expected drafters of one shape, which run as one computation."
                )


def _check_targets(name: str, drafter: EagleDrafter, other_name: str, other: EagleDrafter) -> None:
    """Raise `ValueError` if what two drafters say of their targets contradicts each other."""
    for field in ("tokenizer_fingerprint", "target_name_or_path"):
        here, there = getattr(drafter.config, field), getattr(other.config, field)
        # A target may lie in a folder here and on the Hub there, under the same last name.
        if here and there and Path(here).name != Path(there).name:
            raise ValueError(
                f"Drafters {name!r} and {other_name!r} were made for two targets (`{field}` "
                f"{here!r} and {there!r}), expected drafters of one."
            )


def _qkv_bias(drafter: EagleDrafter) -> bool:
    return f"{LAYER}self_attn.q_proj.bias" in drafter.state_dict()


def _notes(drafters: Mapping[str, EagleDrafter]) -> list[str]:
    notes = []
    if all(drafter.draft_token_ids is None for drafter in drafters.values()):
        notes.append(
            "all tokens of the target are scored, by each drafter: fewer (`--draft-vocab 4096`) "
            "take much less time where the target is small"
        )
    windows = [name for name, one in drafters.items() if one.config.context_window is not None]
    if windows:
        notes.append(
            f"the context windows of {', '.join(windows)} have no place there: the whole context "
            "is looked at"
        )
    return notes
