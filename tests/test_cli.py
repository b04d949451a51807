from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch

from taps_hf import EagleDrafter, average_drafters
from taps_hf.cli import main

from .saved import tree_of
from .tiny import tiny_drafters, tiny_target
from .training.chat import CHATML, chat_tokenizer

NEEDS_NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="refused only without CUDA")
DEEP = "[" * 100_000
ROW = {"instruction": "t5 t6", "output": "t7"}


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
        assert "which `out` would replace" in capsys.readouterr().err
    assert tree_of(tmp_path) == before
    EagleDrafter.from_pretrained(folders[0]).save_pretrained(tmp_path / "other")
    before = tree_of(tmp_path)
    assert main(["average", *folders, "--out", str(tmp_path / "other")]) == 2
    assert "holds other things" in capsys.readouterr().err
    assert tree_of(tmp_path) == before


def test_an_average_takes_the_place_of_an_average_alone(folders, tmp_path, capsys):
    out = tmp_path / "average"
    assert main(["average", *folders, "--out", str(out)]) == 0
    first = tree_of(out)
    assert main(["average", *folders, "--weights", "0.25", "0.75", "--out", str(out)]) == 0
    second = tree_of(out)
    assert second != first
    capsys.readouterr()
    assert main(["average", *folders, str(out), "--out", str(out)]) == 2
    assert f"`drafters` is {out}, in {out}, which `out` would replace" in capsys.readouterr().err
    assert tree_of(out) == second


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
    with pytest.raises(SystemExit) as info:
        main([*arguments, "--debug"])
    printed = capsys.readouterr().err
    assert info.value.code == 2
    assert printed.count("\n") == 1


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a tokenizer but no model: what loads the target fails otherwise than asked."""
    folder = tmp_path_factory.mktemp("files")
    chat_tokenizer(CHATML).save_pretrained(folder / "tokenizer")
    (folder / "good.jsonl").write_text(json.dumps(ROW) + "\n")
    (folder / "turns.jsonl").write_text('{"turns": ["t5"]}\n')
    rows = "".join(json.dumps({**ROW, "id": i}) + "\n" for i in range(2000))
    whole = gzip.compress(rows.encode())
    (folder / "short.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "flipped.jsonl.gz").write_bytes(whole[:40] + b"\xff" * 40 + whole[80:])
    (folder / "plain.jsonl.gz").write_text(rows)
    (folder / "latin.jsonl").write_bytes(b'{"turns": ["t5"]}\n{"turns": ["caf\xe9"]}\n')
    (folder / "deep.jsonl").write_text(f'{{"turns": ["t5"]}}\n{DEEP}\n')
    (folder / "half.jsonl").write_text('{"turns": ["t5"]}\n\n{"turns": ["\\ud800"]}\n')
    for name, text in {
        "tab.yaml": "data: [a.jsonl]\nout:\t[x\n",
        "list.yaml": "- a\n",
        "empty.yaml": "",
        "odd.yaml": "1: x\nnoises: 0\n",
        "nan.yaml": "noise: .nan\n",
        "deep.yaml": DEEP,
        "open.jinja": "{% for m in messages %}\n{{ m.content }}\n{% if %}{% endfor %}",
        "silent.jinja": "Good morning.",
        "fails.jinja": "{{ messages[0].content + 1 }}",
    }.items():
        (folder / name).write_text(text)
    (folder / "latin.jinja").write_bytes(b"caf\xe9")
    return folder


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", DEEP), ("config.json", "[]"), ("model.safetensors", "x")],
)
def test_drafters_with_broken_files_are_named(folders, tmp_path, capsys, file, content):
    (Path(folders[1]) / file).write_text(content)
    capsys.readouterr()
    assert main(["average", *folders, "--out", str(tmp_path / "out")]) == 2
    (*_, line) = capsys.readouterr().err.splitlines()  # libraries show progress before
    assert f"taps-hf: Drafter {folders[1]} cannot be loaded" in line


@pytest.mark.parametrize("content", ["{}", DEEP, "x"])
def test_targets_with_broken_tokenizers_are_named(files, tmp_path, capsys, content):
    target = tmp_path / "target"
    shutil.copytree(files / "tokenizer", target)
    (target / "tokenizer.json").write_text(content)
    command = [
        "regenerate",
        "--target",
        str(target),
        "--data",
        str(files / "good.jsonl"),
        "--out",
        "y",
    ]
    assert main([*command, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"taps-hf: The tokenizer of {target} cannot be loaded")
    assert said.count("\n") == 1


REGENERATE = "regenerate --target tokenizer --data good.jsonl --out out"
TRAIN = "train --target tokenizer --data good.jsonl --out out"
EVALUATE = "evaluate --target tokenizer --drafter a=b --benchmark sums=turns.jsonl --out out"


@pytest.mark.parametrize(
    ("command", "found", "expected"),
    [
        (f"{REGENERATE} --temperature nan", "`temperature` is nan", "at least 0"),
        (f"{REGENERATE} --temperature inf", "`temperature` is inf", "at least 0"),
        (f"{REGENERATE} --batch-size 0", "`batch_size` is 0", "at least 1"),
        (f"{REGENERATE} --seed {2**70}", f"`seed` is {2**70}", f"at most {2**32 - 1}"),
        (f"{REGENERATE} --threads -1", "`threads` is -1", "at least 1"),
        (f"{REGENERATE} --threads 0", "`threads` is 0", "at least 1"),
        (f"{REGENERATE} --threads {2**40}", "`threads` is", "at most 1024"),
        (f"{REGENERATE} --device nonsense", "`device` is 'nonsense'", "cpu"),
        (f"{REGENERATE} --device meta", "`device` is 'meta'", "cpu"),
        (f"{TRAIN} --data short.jsonl.gz", "short.jsonl.gz, line", "whole gzip file"),
        (f"{TRAIN} --data flipped.jsonl.gz", "flipped.jsonl.gz, line", "whole gzip file"),
        (f"{TRAIN} --data plain.jsonl.gz", "plain.jsonl.gz, line 1", "whole gzip file"),
        (f"{REGENERATE} --data good.jsonl:0", "'good.jsonl:0'", "more than none"),
        (f"{REGENERATE} --chat-template open.jinja", "open.jinja, line 3", "(Jinja)"),
        (f"{REGENERATE} --chat-template fails.jinja", "fails.jinja", "(Jinja)"),
        (f"{REGENERATE} --chat-template silent.jinja", "silent.jinja", "'Hello'"),
        (f"{REGENERATE} --chat-template latin.jinja", "latin.jinja", "utf-8"),
        (f"{TRAIN} --noise nan", "`noise` is nan", "at least 0"),
        (f"{TRAIN} --noise -1", "`noise` is -1", "at least 0"),
        (f"{TRAIN} --learning-rate inf", "`learning_rate` is inf", "above 0"),
        (f"{TRAIN} --weight-decay nan", "`weight_decay` is nan", "at least 0"),
        (f"{TRAIN} --beta2 1", "`beta2` is 1.0", "below 1"),
        (f"{TRAIN} --epochs nan", "`epochs` is nan", "above 0"),
        (f"{TRAIN} --max-steps -2", "`max_steps` is -2", "at least -1"),
        (f"{TRAIN} --warmup 1", "`warmup` is 1.0", "below 1"),
        (f"{TRAIN} --held-out nan", "`held_out` is nan", "above 0 and below 1"),
        (f"{TRAIN} --seed -1", "`seed` is -1", "at least 0"),
        (f"{TRAIN} --threads -1", "`threads` is -1", "at least 1"),
        (f"{TRAIN} --device nonsense", "`device` is 'nonsense'", "cpu or cuda"),
        (f"{TRAIN} --recipe tab.yaml", "tab.yaml", "expected YAML"),
        (f"{TRAIN} --recipe deep.yaml", "deep.yaml", "expected YAML"),
        (f"{TRAIN} --recipe list.yaml", "list.yaml has list", "expected fields"),
        (f"{TRAIN} --recipe empty.yaml", "empty.yaml has NoneType", "expected fields"),
        (f"{TRAIN} --recipe odd.yaml", "odd.yaml has [1, 'noises']", "expected fields"),
        (f"{TRAIN} --recipe nan.yaml", "`noise` is nan", "at least 0"),
        (f"{TRAIN} --recipe nowhere.yaml", "nowhere.yaml", "No such file"),
        (f"{EVALUATE} --temperature 0 nan", "`temperatures` is nan", "at least 0"),
        (f"{EVALUATE} --lambdas inf", "`lambdas` is inf", "finite number"),
        (f"{EVALUATE} --tree 0 1 1", "DynamicTree(depth=...) got 0", "positive"),
        (f"{EVALUATE} --limit 0", "`limit` is 0", "at least 1"),
        (f"{EVALUATE} --seed -1", "`seed` is -1", "at least 0"),
        (f"{EVALUATE} --threads -1", "`threads` is -1", "at least 1"),
        (f"{EVALUATE} --device nonsense", "`device` is 'nonsense'", "cpu"),
        (f"{EVALUATE} --drafter x", "`--drafter` is ['a=b', 'x']", "NAME=PATH"),
        (f"{EVALUATE} --drafter a=c", "`--drafter` is ['a=b', 'a=c']", "distinct names"),
        (f"{EVALUATE} --benchmark x=latin.jsonl", "latin.jsonl, line 2", "not JSON"),
        (f"{EVALUATE} --benchmark x=deep.jsonl", "deep.jsonl, line 2", "nested too deeply"),
        (f"{EVALUATE} --benchmark x=half.jsonl", "half.jsonl, line 3", "expected text"),
        (f"{EVALUATE} --others .", ". is no folder of results", "No such file"),
        pytest.param(
            f"{REGENERATE} --device cuda", "`device` is 'cuda'", "cpu", marks=NEEDS_NO_CUDA
        ),
        pytest.param(f"{TRAIN} --device cuda", "`device` is 'cuda'", "cpu", marks=NEEDS_NO_CUDA),
        pytest.param(f"{EVALUATE} --device cuda", "`device` is 'cuda'", "cpu", marks=NEEDS_NO_CUDA),
    ],
)
def test_bad_input_is_refused_in_one_line(files, monkeypatch, capsys, command, found, expected):
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    assert main(command.split()) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("taps-hf: ")
    assert printed.count("\n") == 1
    assert found in printed
    assert expected in printed
    assert sorted(files.iterdir()) == before


def test_rows_that_cannot_be_read_are_counted_and_the_run_goes_on(files, tmp_path, capsys):
    target = tmp_path / "target"
    shutil.copytree(files / "tokenizer", target)
    tiny_target().save_pretrained(target)
    lines = [
        json.dumps(ROW),
        DEEP,
        '{"messages": [{"role": ["user"], "content": "t5"}]}',
        '{"messages": [{"role": {}, "content": "t5"}]}',
        '{"instruction": "\\ud800", "output": "t5"}',
        "",
    ]
    data = tmp_path / "mixed.jsonl"
    data.write_bytes("\n".join(lines).encode() + b'{"instruction": "caf\xe9", "output": "t5"}\n')
    out = tmp_path / "answers.jsonl"
    command = ["regenerate", "--target", str(target), "--data", str(data), "--out", str(out)]
    assert main([*command, "--device", "cpu", "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr().out
    assert "1 rows used" in said
    assert "2 rows: not a JSON object (first: mixed.jsonl:2)" in said
    assert "1 rows: unknown role ['user'] (first: mixed.jsonl:3)" in said
    assert "1 rows: unknown role {} (first: mixed.jsonl:4)" in said
    assert "1 rows: a text with half of a surrogate pair" in said
    assert "(first: mixed.jsonl:5)" in said
    assert out.read_text().count("\n") == 1


@pytest.mark.parametrize("place", [0, 1])
def test_tracebacks_are_shown_for_debug_only(tmp_path, capsys, place):
    arguments = ["average", "a", "b", "--out", str(tmp_path / "out")]
    Path(arguments[-1]).touch()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    arguments[place:place] = ["--debug"]
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith(said)
