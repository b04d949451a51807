"""Which vLLM the plugin works with, said where it matters."""

from __future__ import annotations

SUPPORTED = "0.32."
"""What its version begins with. The plugin subclasses what vLLM does not promise to keep."""


def unsupported() -> str | None:
    """Why the vLLM that is installed cannot serve our drafters; None if it can."""
    import vllm

    if vllm.__version__.startswith(SUPPORTED):
        return None
    return (
        f"taps-hf serves drafters composed for vLLM {SUPPORTED}x, and this is vLLM "
        f'{vllm.__version__}: install another one, pip install "taps-hf[vllm]".'
    )


def check_version() -> None:
    """Raise `RuntimeError` on a vLLM that the plugin was not made for."""
    if (reason := unsupported()) is not None:
        raise RuntimeError(reason)
