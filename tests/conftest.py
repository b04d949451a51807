from __future__ import annotations

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
