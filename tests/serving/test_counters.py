"""Counts that go from one process to another."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from taps_hf.serving import counters
from taps_hf.serving.counters import Count, Counters, counters_folder, read_counts


def test_counts_of_processes_and_engines_are_read_together(tmp_path):
    for engine, value in ((0, 1), (0, 10), (1, 100)):
        Counters(["math", "chät"], engine, tmp_path).counts[:] = [[value, 2], [3, 4]]
    assert set(read_counts(tmp_path)) == {
        Count("drafted", 0, "math", 11),
        Count("drafted", 0, "chät", 4),
        Count("accepted", 0, "math", 6),
        Count("accepted", 0, "chät", 8),
        Count("drafted", 1, "math", 100),
        Count("drafted", 1, "chät", 2),
        Count("accepted", 1, "math", 3),
        Count("accepted", 1, "chät", 4),
    }


def test_a_child_counts_where_its_parent_reads(monkeypatch):
    monkeypatch.setenv(counters.FOLDER, "")  # so that what is set here is taken back
    monkeypatch.delenv(counters.FOLDER)
    folder = counters_folder()
    assert counters_folder() == folder
    program = (
        "from taps_hf.serving.counters import Counters; Counters(['one']).counts[:] = [[5], [3]]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=dict(os.environ))
    found = read_counts(folder)
    assert {(count.kind, count.value) for count in found} == {("drafted", 5), ("accepted", 3)}


def test_the_folder_goes_with_who_made_it(tmp_path):
    """And not with a child, which has only inherited its name."""
    program = (
        "import os, sys, subprocess; from taps_hf.serving.counters import counters_folder\n"
        "print(counters_folder(), flush=True)\n"
        "again = 'from taps_hf.serving.counters import counters_folder; counters_folder()'\n"
        "subprocess.run([sys.executable, '-c', again], check=True)\n"
        "assert counters_folder().is_dir()"
    )
    env = {name: value for name, value in os.environ.items() if name != counters.FOLDER}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env
    )
    assert not os.path.exists(done.stdout.strip())


def test_names_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"names take \d+ bytes, expected less than 4096"):
        Counters(["x" * 5000], folder=tmp_path)
    assert not list(tmp_path.iterdir())
