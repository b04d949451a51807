from __future__ import annotations

from pathlib import Path

import pytest
import torch

import taps_hf


@pytest.fixture(autouse=True, scope="session")
def _threads(request):
    # Tiny models gain nothing from threads, and tests run side by side (pytest-xdist).
    torch.set_num_threads(request.config.getoption("--torch-threads"))


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
    parser.addoption(
        "--torch-threads",
        type=int,
        default=1,
        metavar="N",
        help="threads of torch in each process; results may not depend on them",
    )
