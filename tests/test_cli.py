from __future__ import annotations

import pytest
import torch

from taps_hf import EagleDrafter, average_drafters
from taps_hf.cli import main

from .saved import tree_of
from .tiny import tiny_drafters, tiny_target


@pytest.fixture
def folders(tmp_path) -> list[str]:
    found = []
    for i, drafter in enumerate(tiny_drafters(2)):
        found.append(str(tmp_path / f"drafter-{i}"))
        drafter.save_pretrained(found[-1])
    return found


@pytest.mark.parametrize("weights", [None, ["0.25", "0.75"]])
def test_average_writes_a_drafter(folders, tmp_path, capsys, weights):
    out = str(tmp_path / "average")
    options = [] if weights is None else ["--weights", *weights]
    assert main(["average", *folders, *options, "--out", out]) == 0
    assert out in capsys.readouterr().out
    found = EagleDrafter.from_pretrained(out).state_dict()
    numbers = None if weights is None else [float(x) for x in weights]
    expected = average_drafters(tiny_drafters(2), numbers).state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_an_average_never_takes_the_place_of_a_drafter(folders, tmp_path, capsys):
    before = tree_of(tmp_path)
    for out in (folders[0], str(tmp_path)):
        assert main(["average", *folders, "--out", out]) == 2
        assert "holds other things" in capsys.readouterr().err
    assert tree_of(tmp_path) == before


def test_bad_input_is_reported_without_a_traceback(folders, tmp_path, capsys):
    other = str(tmp_path / "other")
    EagleDrafter.from_target(tiny_target(), fc_bias=True).save_pretrained(other)
    out = tmp_path / "average"
    for arguments, message in [
        ([folders[0]], "1 drafters were given"),
        ([*folders, "--weights", "0.5", "0.6"], "numbers that sum to 1"),
        ([*folders, "--weights", "1"], "expected 2 numbers"),
        ([folders[0], other], "differ in fc_bias"),
        ([folders[0], str(tmp_path / "nowhere")], "nowhere"),
    ]:
        capsys.readouterr()
        assert main(["average", *arguments, "--out", str(out)]) == 2
        printed = capsys.readouterr()
        # Libraries may warn or show progress before; the last line is ours.
        assert message in printed.err[printed.err.rindex("taps-hf: ") :]
        assert "Traceback" not in printed.err
        assert not printed.out
        assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["blend"], "invalid choice"),
        (["average", "a", "b"], "--out"),
        (["average", "--out", "c"], "drafters"),
        (["average", "a", "b", "--weights", "half", "--out", "c"], "invalid float"),
    ],
)
def test_wrong_usage_is_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as info:
        main(arguments)
    assert info.value.code == 2
    assert message in capsys.readouterr().err
