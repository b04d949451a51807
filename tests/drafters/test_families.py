from __future__ import annotations

import pytest

from benchmarks import families
from benchmarks.families import Outcome, outcome, table


@pytest.mark.parametrize(
    ("family", "reason"),
    [("bart", "encoder-decoder"), ("gemma3", "text"), ("gpt2", "embed_tokens")],
)
def test_what_is_refused_says_why(family, reason):
    found = outcome(family)
    assert found.verdict == "refused"
    assert reason in found.reason


def test_other_tokens_are_told(monkeypatch):
    answers = iter([[1, 2, 3], [1, 2, 3], [1, 2, 4]])
    monkeypatch.setattr(families, "_generate", lambda *args, **kwargs: next(answers))
    found = outcome("llama")
    assert (found.verdict, found.reason) == ("wrong", "with 2: 2 of 3 tokens are plain's")


def test_every_family_is_in_the_table_once():
    outcomes = [
        Outcome("one", "works", True, "llama"),
        Outcome("two", "works", False, "two"),
        Outcome("three", "refused", reason="of a reason"),
        Outcome("four", "not tried", reason="of another"),
    ]
    text = table(outcomes)
    for row in (
        "| one | llama | as one |",
        "| two | two | one after the other |",
        "| three | of a reason |",
        "| four | of another |",
    ):
        assert text.count(row) == 1
    assert "## Works: 2" in text
    assert "Wrong" not in text


def test_only_a_table_is_written_over(tmp_path):
    file = tmp_path / "families.md"
    families.check_output(file)
    file.write_text(table([]))
    families.check_output(file)
    file.write_text("# Families of mine\n")
    with pytest.raises(ValueError, match="holds something else"):
        families.main(["none", "--output", str(file)])
    assert file.read_text() == "# Families of mine\n"
