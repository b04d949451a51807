"""A page served to a real browser, and requests for the tests that need none."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator

import pytest

from taps_hf import DynamicTree
from taps_hf.demo import decoding
from taps_hf.demo.models import ModelSpec
from taps_hf.demo.settings import Request

from ..saved import save_tiny_models


@pytest.fixture(scope="session")
def tiny_spec(tmp_path_factory) -> ModelSpec:
    arguments = save_tiny_models(tmp_path_factory.mktemp("demo-models"))
    return ModelSpec.parse(arguments[1], arguments[3:])


@pytest.fixture
def request_of(tiny_spec):
    """Makes requests to the tiny models: `request_of(temperature=1.0)`."""

    def make(**changes) -> Request:
        values = {
            "models": tiny_spec,
            "prompt": "t5 t6 t7 t8",
            "temperature": 0.0,
            "seed": 0,
            "max_new_tokens": 24,
            "tree": DynamicTree(4, 6, 20),
            "seconds": 60.0,
        }
        return Request(**{**values, **changes})

    return make


@pytest.fixture
def going_on(monkeypatch) -> Iterator[threading.Event]:
    """Answers pause after ten tokens until this is set, or until they are stopped.

    So whoever does something in mid-answer is not too late, however slow the machine makes them.
    """
    event, stops = threading.Event(), decoding._Stop.__call__

    def pausing(self, *args, **kwargs):
        self.tokens = getattr(self, "tokens", 0) + 1
        while self.tokens > 10 and not event.is_set() and not self.event.wait(0.02):
            pass
        return stops(self, *args, **kwargs)

    monkeypatch.setattr(decoding._Stop, "__call__", pausing)
    yield event
    event.set()


@pytest.fixture(scope="module")
def browser():
    """Chromium, from the system: Playwright's own builds are not needed.

    While it runs no test of the same process can run an event loop of its own.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as running:
        # Its sandbox does not work for root, as whom containers mostly run.
        started = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()
