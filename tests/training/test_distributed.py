"""Leaving a process group, with two processes that are at different places."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import distributed

from taps_hf.training.distributed import parting

# The main process is late: it still writes when the other one has nothing left to do.
_PROGRAM = """
import sys, time
from pathlib import Path
from torch import distributed
from taps_hf.training.distributed import parting

folder, ends = Path(sys.argv[1]), sys.argv[2]
with parting():
    distributed.init_process_group("gloo")
    distributed.barrier()
    rank = distributed.get_rank()
    if ends == "badly" and rank == 1:
        raise ValueError("no more")
    if rank == 0:
        time.sleep(1)
        (folder / "written").touch()
assert not distributed.is_initialized()
assert (folder / "written").exists()  # whoever goes on knows that all is done
(folder / f"left-{rank}").touch()
"""


def run(folder, ends: str) -> subprocess.CompletedProcess:
    program = folder / "program.py"
    program.write_text(_PROGRAM)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [sys.executable, *launch, str(program), str(folder), ends],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_nobody_leaves_before_all_is_done(tmp_path):
    done = run(tmp_path, "well")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"left-0", "left-1", "written"} <= {file.name for file in tmp_path.iterdir()}


def test_who_fails_waits_for_nobody(tmp_path):
    done = run(tmp_path, "badly")
    assert done.returncode == 1
    assert "ValueError: no more" in done.stderr
    assert "exitcode  : 1" in done.stderr  # of the process itself, not a signal's
    assert not (tmp_path / "left-1").exists()


def test_a_process_alone_has_nothing_to_leave():
    with parting():
        pass
    with pytest.raises(KeyError), parting():
        raise KeyError
    assert not distributed.is_initialized()
