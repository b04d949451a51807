from __future__ import annotations

from pathlib import Path

import pytest
import torch

import taps_hf


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Tiny models gain nothing from threads, and tests may share the machine.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _extension_is_on():
    yield
    taps_hf.enable()


def pytest_addoption(parser):
    parser.addoption(
        "--screenshots",
        metavar="FOLDER",
        type=Path,
        help="write pictures of the demo's views there (with tests/demo)",
    )
