"""What a long run says of a failure."""

from __future__ import annotations

from .kinds import KINDS, Kind
from .run import Run, attempt


def _fails(seed: int) -> None:
    print(f"tried {seed}")
    raise ValueError("odd")


def test_a_failure_can_be_repeated(monkeypatch, capsys):
    monkeypatch.setitem(KINDS, "odd", Kind(_fails, 1.0, (), _fails))
    seconds, report = attempt("odd", 17)
    run = Run(["odd"], seconds=1.0, jobs=1)
    run.take("odd", 16, 0.1, None)
    run.take("odd", 17, seconds, report)
    said = capsys.readouterr().out
    assert "make fuzz FUZZ_KIND=odd FUZZ_SEED=17" in said
    assert "tried 17" in said
    assert "ValueError: odd" in said
    assert str(run).startswith("passed: odd 1 (")
    assert str(run).endswith("failed: odd 17")
