"""What a folder of composed drafters says of itself: `config.json`, under the key `taps_hf`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from .reading import EXTRA

ARCHITECTURES = {"eagle": "EagleTapsForCausalLM", "eagle3": "Eagle3TapsForCausalLM"}
"""Of folders, by vLLM's method, which vLLM puts before names that do not begin with it."""

Routing = Literal["token", "draft", "request"]
LOOKUP = "lookup"
"""What the drafter is called that is not learned."""
_FORMAT = 2


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
class Drafting:
    """How composed drafters draft together.

    Args:
        routing: "token" takes each token from the drafter that is surest of its own best one;
            "draft" takes all tokens of a draft from the drafter that is surest of the first and has
            been right of late, so that the others need not read the rest; "request" takes each
            from the one that has been surest on average in this request so far.
        stop_below: drafts end when no request's draft is as likely as this to be right to its last
            token, by the drafters' own account; 0 for never. Where that is known without waiting,
            on CPUs.
        lookup: whether one more drafter proposes what followed in a request's own text where its
            last tokens stood before; no model runs for that. On CPUs. By default with routing per
            draft, which alone it goes with.
    """

    routing: Routing = "token"
    stop_below: float = 0.2
    lookup: bool | None = None

    def __post_init__(self) -> None:
        if self.routing not in get_args(Routing):
            raise ValueError(
                f"`routing` is {self.routing!r}, expected 'token', 'draft' or 'request'."
            )
        if not 0 <= self.stop_below < 1:
            raise ValueError(f"`stop_below` is {self.stop_below}, expected from 0 to below 1.")
        if self.lookup is None:
            object.__setattr__(self, "lookup", self.routing == "draft")
        if self.lookup and self.routing != "draft":
            raise ValueError(
                f"`lookup` goes with `routing` 'draft', not with {self.routing!r}: what is looked "
                "up is a whole draft."
            )


PER_TOKEN = Drafting()


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
        target: the name of the target, for messages; None if it has none.
        drafting: how they draft together.
        eagle3: of EAGLE-3 drafters; None for EAGLE-2 and HASS.
        format: of the folder; others are refused.
    """

    names: tuple[str, ...]
    hidden_size: int
    draft_vocab_sizes: tuple[int, ...] | None
    fc_biases: tuple[bool, ...]
    input_norm: bool
    qkv_bias: bool
    target: str | None = None
    drafting: Drafting = PER_TOKEN
    eagle3: Dialect | None = None
    format: int = _FORMAT

    def __post_init__(self) -> None:
        if self.drafting.lookup and LOOKUP in self.names:
            raise ValueError(
                f"A drafter is called {LOOKUP!r}, the name under which looked up tokens are "
                "counted; expected another name."
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
            if "drafting" in given:
                given["drafting"] = Drafting(**given["drafting"])
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
