"""What a folder of composed drafters says of itself: `config.json`, under the key `taps_hf`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from .reading import EXTRA

ARCHITECTURES = {"eagle": "EagleTapsForCausalLM", "eagle3": "Eagle3TapsForCausalLM"}
"""Of folders, by vLLM's method, which vLLM puts before names that do not begin with it."""

Routing = Literal["token", "draft", "request"]
_FORMAT = 1


@dataclass(frozen=True)
class Dialect:
    """What EAGLE-3 drafters read of their target, and how.

    Args:
        layer_ids: of each drafter, as [`Eagle3DrafterConfig`] counts them; equally many.
        norm_before_residual, norm_before_fc, fc_norm, norm_output: see [`Eagle3DrafterConfig`].
        qk_norm: whether queries and keys are normalised (Qwen3's layers).
    """

    layer_ids: tuple[tuple[int, ...], ...]
    norm_before_residual: bool
    norm_before_fc: bool
    fc_norm: bool
    norm_output: bool
    qk_norm: bool

    @property
    def read(self) -> tuple[int, ...]:
        """What any of them reads, each once, as vLLM gives it: in ascending order."""
        return tuple(sorted({layer for ids in self.layer_ids for layer in ids}))


@dataclass(frozen=True)
class Composition:
    """Several drafters as one.

    Args:
        names: of the drafters, in the order of their tensors.
        hidden_size: of the target and of each drafter; the folder's own is as many times that as
            there are drafters, because vLLM passes their states side by side.
        draft_vocab_sizes: how many tokens each of them scores; None where all score all.
        fc_biases: whether each one's projection has a bias.
        input_norm: whether their layers normalise their input.
        qkv_bias: whether their attention has biases on its inputs.
        routing: "token" takes each token from the drafter that is surest of its own best one;
            "draft" takes all tokens of a draft from the drafter that is surest of the first, so
            that the others need not read the rest; "request" takes each from the one that has
            been surest on average in this request so far.
        target: the name of the target, for messages; None if it has none.
        eagle3: of EAGLE-3 drafters; None for EAGLE-2 and HASS.
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
    eagle3: Dialect | None = None
    format: int = _FORMAT

    def __post_init__(self) -> None:
        if self.routing not in get_args(Routing):
            raise ValueError(
                f"`routing` is {self.routing!r}, expected 'token', 'draft' or 'request'."
            )

    @property
    def method(self) -> str:
        """What vLLM calls drafters that are fed as these are."""
        return "eagle" if self.eagle3 is None else "eagle3"

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
        given = {name: _tuples(value) for name, value in fields.items()}
        try:
            if given.get("eagle3") is not None:
                given["eagle3"] = Dialect(**given["eagle3"])
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"`{EXTRA}` of config.json: {error}.") from None

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _tuples(value: Any) -> Any:
    """Lists of a file as the tuples that they were, however deep."""
    if isinstance(value, Mapping):
        return {name: _tuples(one) for name, one in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
