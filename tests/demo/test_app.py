"""The command `python app.py`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("gradio")
pytest.importorskip("altair")

ROOT = Path(__file__).resolve().parents[2]


def load_app() -> ModuleType:
    specification = importlib.util.spec_from_file_location("app", ROOT / "app.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def app():
    return load_app()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "no/such/folder"], "The target could not be loaded from 'no/such/folder'"),
        (["--drafters", "math"], "`drafters` is ['math'], expected NAME=PATH"),
        (
            ["--drafters", "math=no/such/folder"],
            "Drafter 'math' could not be loaded",
        ),
        (["--device", "abacus"], "`device` is 'abacus', expected one that is here"),
        (["--max-seconds", "nan"], "`max_seconds` is nan, expected a finite number"),
        (["--port", "99999"], "`port` is 99999, expected at least 1 and at most 65535"),
        (["--concurrency", "0"], "The limit concurrency is 0"),
        (["--max-new-tokens", "-1"], "The limit new tokens is -1"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(app, tiny_spec, capsys, arguments, message):
    """Before anything is served."""
    models = [f"{name}={path}" for name, path in tiny_spec.drafters]
    assert app.main(["--target", tiny_spec.target, "--drafters", *models, *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "taps_hf.demo.page", raising=False)
    with pytest.raises(SystemExit, match=r'gradio.*pip install "\.\[demo\]"'):
        load_app()


def test_a_lookup_stands_beside_the_drafters_unless_it_is_not_wanted(app, tiny_spec, monkeypatch):
    served = []
    monkeypatch.setattr(app, "serve", lambda options, *_: served.append(options.models))
    given = ["--target", tiny_spec.target, "--drafters"]
    for names, more in (("ab", []), ("ab", ["--no-lookup"]), (["lookup"], [])):
        app.main([*given, *(f"{name}=somewhere" for name in names), *more])
    found = [[name for name, _ in models.drafters] for models in served]
    assert found == [["a", "b", "lookup"], ["a", "b"], ["lookup"]]
    assert served[0].drafters[-1] == ("lookup", "lookup")
    assert served[2].drafters[-1] == ("lookup", "somewhere")
