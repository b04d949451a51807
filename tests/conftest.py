from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import taps_hf
from taps_hf.embedded import EMBEDDED_TARGET, load_embedded_target, load_embedded_tokenizer

from .saved import letter_tokenizer


@pytest.fixture(autouse=True, scope="session")
def _threads(request):
    # Tiny models gain nothing from threads, and tests run side by side (pytest-xdist).
    torch.set_num_threads(request.config.getoption("--torch-threads"))


@pytest.fixture(autouse=True)
def _extension_is_on():
    yield
    taps_hf.enable()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One letter a token."""
    return letter_tokenizer()


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory) -> Path:
    """The embedded target and its tokenizer as safetensors, written once for all processes.

    Out of the package's own file they take half a minute, each time.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers of this test run
    folder = root / "real"
    with FileLock(root / "real.lock"):
        if not folder.exists():
            new = root / "real.new"
            load_embedded_target(torch.float32).save_pretrained(new)
            load_embedded_tokenizer().save_pretrained(new)
            new.rename(folder)
    return folder


@pytest.fixture(scope="session")
def load_real(real_folder) -> Callable[..., PreTrainedModel]:
    """As `load_embedded_target`, in a second."""

    def load(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(real_folder, dtype=dtype)
        model.config.name_or_path = EMBEDDED_TARGET
        return model.eval()

    return load


@pytest.fixture(scope="module")
def real_at_folder(load_real, real_folder) -> PreTrainedModel:
    """The embedded target, named after its folder, where other engines find it."""
    model = load_real()
    model.config.name_or_path = str(real_folder)
    return model


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
