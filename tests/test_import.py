from __future__ import annotations

import subprocess
import sys

import taps_hf

PROGRAM = """
import sys
import taps_hf
heavy = {"datasets", "evaluate", "gguf", "gradio", "prometheus_client", "vllm"} & set(sys.modules)
assert taps_hf.is_enabled()
print(sorted(heavy))
"""


def test_import_loads_nothing_optional():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_everything_public_is_there():
    assert len(set(taps_hf.__all__)) == len(taps_hf.__all__)
    assert [name for name in taps_hf.__all__ if not hasattr(taps_hf, name)] == []
