"""A page that shows which drafter's tokens are accepted while an answer is written.

Needs the optional dependencies `taps-hf[demo]`. What it shows comes from the package's public API
and the trace of a generation (docs/demo.md).
"""
