"""What can be asked of compilation, and what cannot be compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from .memory import rounded_capacity

_NARROWEST = 8  # rows of a pass over a tree


def rounded_width(rows: int) -> int:
    """The rows of the graph that runs so many: 1, 8, 16, 32, 64, ..."""
    return 1 if rows == 1 else max(_NARROWEST, 1 << (rows - 1).bit_length())


def rounded_widths(most: int) -> tuple[int, ...]:
    """All of them up to that of `most` rows."""
    widths = [1]
    while widths[-1] < most:
        widths.append(rounded_width(widths[-1] + 1))
    return tuple(widths)


@dataclass(frozen=True)
class Compilation:
    """How the passes of one generation are compiled.

    Args:
        config: what torch.compile is told.
        capacity: tokens that there is memory for.
        width: rows of a pass over one drafter's tree.
    """

    config: CompileConfig
    capacity: int
    width: int

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal settings."""
        return self.capacity, key_of(self.config)


def compilation_for(
    config: CompileConfig, model: PreTrainedModel, max_length: int, nodes: int, drafters: int
) -> Compilation:
    """For a text of at most `max_length` tokens, and trees of several drafters.

    Args:
        config: what torch.compile is told.
        model: the target: no text is longer than its positions.
        max_length: of the text.
        nodes: of each drafter's tree, its root not counted.
        drafters: how many there are.
    """
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = min(max_length, positions or max_length)
    widest = rounded_width(nodes * drafters + 1)
    return Compilation(config, rounded_capacity(longest + widest), rounded_width(nodes + 1))


def resolve(compile: bool | CompileConfig, generation_config: GenerationConfig) -> CompileConfig:
    """What `compile=` means: a configuration, or True for `generate`'s, or for ours."""
    if isinstance(compile, CompileConfig):
        return compile
    given = getattr(generation_config, "compile_config", None)
    return CompileConfig(fullgraph=True) if given is None else given


def check_config(compile: object) -> None:
    """Check what `compile=` was given.

    Raises:
        ValueError: for anything but True, False, and a `CompileConfig` that fits.
    """
    if isinstance(compile, bool):
        return
    if not isinstance(compile, CompileConfig):
        raise ValueError(
            f"`compile` is {compile!r}, expected True, False, or a transformers.CompileConfig."
        )
    if compile.dynamic:
        raise ValueError(
            "`compile` has dynamic=True, expected None or False: graphs are made for a few fixed "
            "widths, so that none is made in the middle of an answer."
        )
    if compile.options is not None and compile.mode is not None:
        raise ValueError(
            f"`compile` has options and the mode {compile.mode!r}, of which torch.compile takes "
            "one; expected mode=None beside options."
        )


def check_compilable(model: PreTrainedModel) -> None:
    """Check that a target's passes can be compiled, as far as can be told without trying.

    Raises:
        ValueError: for quantised weights that cannot be, and models spread over devices.
    """
    kind = type(model).__name__
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        raise ValueError(
            f"`compile` is set, but the target's weights ({kind}) are quantised in a way that "
            f"cannot be compiled ({type(quantizer).__name__}); expected compile=False."
        )
    if any("_hf_hook" in vars(module) for module in model.modules()):
        raise ValueError(
            f"`compile` is set, but accelerate moves the target's ({kind}) inputs or weights "
            "between devices; expected a target that lies on one device whole, or compile=False."
        )


def key_of(config: CompileConfig) -> str:
    """Equal for equal configurations."""
    return repr(sorted(config.to_dict().items()))


def compile_arguments(config: CompileConfig) -> dict[str, Any]:
    """What `torch.compile` is given: shapes are fixed on purpose."""
    return {**config.to_dict(), "dynamic": False}
