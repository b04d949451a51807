from __future__ import annotations

import pytest
from safetensors import SafetensorError

from taps_hf.command import run_command


def failing(error: BaseException):
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("`x` is 1,\n  expected 2."), 2, "name: `x` is 1, expected 2."),
        (ValueError(), 2, "name: ValueError"),
        (FileNotFoundError(2, "No such file", "x"), 2, "name: [Errno 2] No such file: 'x'"),
        (SafetensorError("broken"), 2, "name: broken"),
        (KeyboardInterrupt(), 130, "name: interrupted"),
        (
            TypeError("odd\nthing"),
            1,
            "name: TypeError: odd thing (not foreseen; --debug shows the traceback)",
        ),
    ],
)
def test_every_error_is_one_line_and_a_status(capsys, error, status, line):
    assert run_command("name", failing(error)) == status
    assert capsys.readouterr().err == line + "\n"


def test_debug_adds_the_traceback(capsys):
    assert run_command("name", failing(TypeError("odd")), debug=True) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("\nname: TypeError: odd\n")


def test_without_errors_nothing_is_said(capsys):
    assert run_command("name", lambda: None) == 0
    assert capsys.readouterr() == ("", "")
