"""What a foreign checkpoint must hold, and what of it is the target's."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from .checkpoint import Checkpoint

# A vendor may pad a vocabulary for the sake of matrix units; the same model has both sizes.
_PADDING = 1024
_ROWS = 8192  # of a matrix that are compared at a time
_SCALES = ("scale", "qweight", "qzeros", "zero_point", "absmax", "g_idx")


def check_tensors(
    checkpoint: Checkpoint,
    expected: Mapping[str, tuple[int, ...]],
    optional: Collection[str] = (),
) -> None:
    """Compare headers with what a format has.

    Args:
        checkpoint: what was found.
        expected: shapes by name.
        optional: others that are looked at elsewhere, or that do not matter.

    Raises:
        ValueError: naming file, tensor, found and expected, for all that is wrong.
    """
    headers = checkpoint.headers
    check_not_quantised(checkpoint)
    wrong = [
        f"{checkpoint.where(name)} is missing, expected {list(expected[name])}"
        for name in sorted(expected.keys() - headers.keys())
    ]
    wrong += [
        f"{checkpoint.where(name)} ({headers[name]}) is not part of this format"
        for name in sorted(headers.keys() - expected.keys() - set(optional))
    ]
    for name in sorted(expected.keys() & headers.keys()):
        if headers[name].shape != tuple(expected[name]):
            wrong.append(
                f"{checkpoint.where(name)} is {headers[name]}, expected {list(expected[name])}"
            )
        elif not headers[name].is_floating:
            wrong.append(f"{checkpoint.where(name)} is {headers[name]}, expected numbers")
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}.")


def check_not_quantised(checkpoint: Checkpoint) -> None:
    """Raise `ValueError` for weights that are stored as something else than themselves."""
    if checkpoint.config.get("quantization_config") is not None:
        raise ValueError(
            f"{checkpoint.config_file} has a `quantization_config`: quantised drafters are not "
            "supported, expected floating-point weights."
        )
    scales = [name for name in checkpoint.headers if name.rpartition(".")[2].endswith(_SCALES)]
    if scales:
        raise ValueError(
            f"{checkpoint.where(scales[0])} is a scale: quantised drafters are not supported, "
            "expected floating-point weights."
        )


def check_vocabulary(checkpoint: Checkpoint, found: object, target_rows: int, what: str) -> None:
    """Raise `ValueError` if a vocabulary cannot be the target's, but for rows of padding."""
    if type(found) is not int or abs(found - target_rows) >= _PADDING:
        raise ValueError(
            f"{checkpoint.config_file.parent}: {what} has {found!r} tokens, but the target has "
            f"{target_rows}: it was made for another vocabulary."
        )


def check_copy(checkpoint: Checkpoint, name: str, module: nn.Module, whose: str) -> None:
    """Check that a matrix is a copy of the target's, but for rounding and rows of padding.

    Args:
        checkpoint: where it is from.
        name: of the tensor, [rows, width].
        module: of the target, with a `weight` of that width.
        whose: what messages call it.

    Raises:
        ValueError: if it is another one.
    """
    weight, header = module.weight.detach(), checkpoint.headers[name]
    if len(header.shape) != 2 or header.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{checkpoint.where(name)} is {header}, expected [{weight.shape[0]}, "
            f"{weight.shape[1]}], the target's {whose}."
        )
    check_vocabulary(checkpoint, header.shape[0], len(weight), f"the tensor {name}")
    # One of both may have been rounded to bfloat16 (8 bits) or float16 (no small numbers), and rows
    # of padding are anything.
    shared, odd, first = min(header.shape[0], len(weight)), 0, -1
    for start in range(0, shared, _ROWS):
        end = min(start + _ROWS, shared)
        mine = checkpoint.rows(name, start, end).float()
        theirs = weight[start:end].float().cpu()
        differ = ((mine - theirs).abs() > theirs.abs() * 2**-7 + 2**-14).any(dim=1)
        if differ.any() and first < 0:
            first = start + int(differ.nonzero()[0])
        odd += int(differ.sum())
    if odd > min(_PADDING, shared // 100):
        raise ValueError(
            f"{checkpoint.where(name)} is not the target's {whose} ({odd} of {shared} rows differ, "
            f"the first is {first}): the drafter was made for another target, or has one of its "
            "own, which is not supported."
        )
