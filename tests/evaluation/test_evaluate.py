from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from taps_hf import EagleDrafter
from taps_hf.cli import main
from taps_hf.evaluation.tables import Table

from ..saved import tree_of
from ..tiny import tiny_drafters, tiny_target
from ..training.chat import CHATML, chat_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_target().save_pretrained(folder / "target")
    chat_tokenizer(CHATML).save_pretrained(folder / "target")
    for name, drafter in zip(("math", "chat"), tiny_drafters(2)):
        drafter.save_pretrained(folder / name)
    for name, turns in [("sums", ["t5 t6"]), ("talk", ["t7", "t8"])]:
        rows = [{"question_id": i, "turns": [f"{t} t{5 + i}" for t in turns]} for i in range(3)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(folder, out, *more) -> list[str]:
    return [
        "evaluate",
        *("--target", str(folder / "target"), "--out", str(out), "--max-new-tokens", "10"),
        *("--drafter", f"math={folder / 'math'}", "--drafter", f"chat={folder / 'chat'}"),
        *("--benchmark", f"sums={folder / 'sums.jsonl'}"),
        *("--benchmark", f"talk={folder / 'talk.jsonl'}"),
        *("--tree", "3", "3", "6", "--device", "cpu"),
        *more,
    ]


def test_one_command_writes_everything(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "results"
    more = ["--compose", "math", "chat", "--average", "math", "chat", "--lambdas", "0.3", "0.5"]
    more += ["--temperature", "0", "1", "--live", "1", "--lookup"]
    assert main(arguments(folder, out, *more)) == 0
    results = json.loads((out / "results.json").read_text())
    table = {row["variant"]: row for row in results["acceptance-t1"]}
    assert {"math", "chat", "averaged 0.3", "averaged 0.5", "merged", "concatenated"} <= set(table)
    assert {"lookup", "merged-with-lookup", "merged-equal-budget-with-lookup"} <= set(table)
    for row in table.values():
        for name in ("sums", "talk"):
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
    live = {row["variant"]: row for row in results["live-acceptance-t0"]}
    assert live["merged"]["speed-up sums"] > 0
    for name in ("routing", "entropy", "depth", "overlap", "difference"):
        assert (out / "tables" / f"{name}-t0.csv").read_text().count("\n") > 1
    drawn = sorted(file.name for file in (out / "figures").iterdir())
    for name in ("heatmap", "depth", "entropy", "lambda"):
        assert {f"{name}-t0.png", f"{name}-t1.png"} <= set(drawn)
    summary = (out / "summary.md").read_text()
    assert all(f"figures/{name}" in summary for name in drawn)

    # Nothing is measured twice, and other settings are refused.
    before = (out / "replay.jsonl").read_bytes(), (out / "live.jsonl").read_bytes()
    assert main(arguments(folder, out, *more)) == 0
    assert ((out / "replay.jsonl").read_bytes(), (out / "live.jsonl").read_bytes()) == before
    assert main(arguments(folder, out, *more, "--tree", "2", "2", "4")) == 2
    assert "measured with other settings" in capsys.readouterr().err

    other = tmp_path / "other"
    settings = out / "settings.json"
    settings.write_text(settings.read_text().replace(str(folder / "target"), "elsewhere"))
    assert main(arguments(folder, other, "--others", str(out))) == 0
    scaling = json.loads((other / "results.json").read_text())["scaling"]
    alone = next(row for row in scaling if row["variant"] == "math")
    assert alone["elsewhere"] == pytest.approx(alone[str(folder / "target")])


def test_what_others_wrote_is_not_touched(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")

    def refused(out: Path, message: str, *arguments_: str) -> None:
        before = tree_of(out)
        assert main(arguments(folder, out, *arguments_)) == 2
        assert message in capsys.readouterr().err
        assert tree_of(out) == before

    thesis, out = tmp_path / "thesis", tmp_path / "out"
    thesis.mkdir()
    (thesis / "summary.md").write_text("mine")
    refused(thesis, "no settings.json")
    refused(out, "no settings.json", "--records", str(thesis))
    (thesis / "settings.json").write_text('{"editor.fontSize": 12}')
    refused(thesis, "is not of an evaluation")
    assert main(arguments(folder, out)) == 0
    for content in (b"a letter of mine", b"a letter\n", b'{"record": 1}\n'):
        (out / "live.jsonl").write_bytes(content)
        assert main(arguments(folder, out)) == 2
        assert "live.jsonl" in capsys.readouterr().err
        assert (out / "live.jsonl").read_bytes() == content


def test_what_is_added_does_not_pass_for_what_was_there(folder, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "results"

    def merged(*more) -> dict:
        assert main(arguments(folder, out, *more)) == 0
        results = json.loads((out / "results.json").read_text())["acceptance-t0"]
        return next(row for row in results if row["variant"] == "merged")

    two = merged("--compose", "math", "chat", "--live", "1")
    third = tmp_path / "code"
    tiny_drafters(3)[2].save_pretrained(third)
    more = ["--drafter", f"code={third}", "--live", "1"]
    three = merged("--compose", "math", "chat", "code", *more)
    assert three["nodes a cycle"] > two["nodes a cycle"]
    assert merged("--compose", "math", "chat", "--live", "1") == two
    live = [json.loads(line) for line in (out / "live.jsonl").open()]
    pairs = [(row["record"], row["variant_key"]) for row in live]
    assert len(pairs) == len(set(pairs))

    # Another text under the same question ids.
    lines = (folder / "sums.jsonl").read_text()
    changed = tmp_path / "sums.jsonl"
    changed.write_text(lines.replace("t5 t6", "t9 t9 t9"))
    swapped = arguments(folder, out, "--compose", "math", "chat")
    swapped[swapped.index(f"sums={folder / 'sums.jsonl'}")] = f"sums={changed}"
    assert main(swapped) == 0
    results = json.loads((out / "results.json").read_text())["acceptance-t0"]
    found = next(row for row in results if row["variant"] == "merged")
    assert found["talk"] == two["talk"]
    assert found["sums"] != two["sums"]


def test_the_same_weights_under_another_name_are_in_the_tables(folder, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "results"

    def shown(*more) -> dict[str, dict]:
        assert main(arguments(folder, out, *more)) == 0
        results = json.loads((out / "results.json").read_text())["acceptance-t0"]
        return {row["variant"]: row for row in results}

    average = ["--average", "math", "chat", "--lambdas"]
    assert {"averaged 0", "averaged 1"} & set(shown(*average, "0.5")) == set()
    found = shown(*average, "0", "0.5", "1", "--drafter", f"again={folder / 'math'}")
    assert found["averaged 1"]["sums"] == found["math"]["sums"] == found["again"]["sums"]
    assert found["averaged 0"]["sums"] == found["chat"]["sums"]


def test_shares_of_the_oracle(folder, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "results"

    def measured(*more) -> dict:
        assert main(arguments(folder, out, "--temperature", "0", "1", *more)) == 0
        return json.loads((out / "results.json").read_text())

    without = measured("--compose", "math", "chat")
    assert "share of the oracle" not in without["acceptance-t0"][0]
    assert not without["share-t0"]
    few = measured("--compose", "math", "chat", "--oracle", "--oracle-answers", "1", "--live", "1")
    assert sum('"variant": "oracle"' in line for line in (out / "replay.jsonl").open()) == 4
    assert "oracle" not in (out / "live.jsonl").read_text()
    lines = (out / "replay.jsonl").read_bytes()
    assert measured("--oracle", "--oracle-answers", "1")["acceptance-t0"][-1]["variant"] == "oracle"
    assert (out / "replay.jsonl").read_bytes() == lines

    every = measured("--compose", "math", "chat", "--oracle")
    for results in (few, every):
        for t in ("0", "1"):
            rows = {row["variant"]: row for row in results[f"acceptance-t{t}"]}
            assert rows["oracle"]["share of the oracle"] == pytest.approx(1)
            shares = {row["variant"]: row for row in results[f"share-t{t}"]}
            assert shares.keys() == rows.keys() - {"oracle"}
            for name, row in shares.items():
                mean = (row["sums"]["value"] + row["talk"]["value"]) / 2
                assert rows[name]["share of the oracle"] == pytest.approx(mean)
            assert "oracle" not in {row["variant"] for row in results[f"difference-t{t}"]}
            assert "oracle" in {row["variant"] for row in results[f"depth-t{t}"]}
    rows = {row["variant"]: row for row in every["acceptance-t0"]}
    for name in ("sums", "talk"):  # ten tokens in cycles of four, four and two
        assert rows["oracle"][name]["value"] == pytest.approx(10 / 3)
        share = next(r for r in every["share-t0"] if r["variant"] == "math")[name]["value"]
        assert share == pytest.approx(rows["math"][name]["value"] / (10 / 3))


def test_bad_input_is_refused_and_named(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")  # what is missing is named first

    def refused(message, *more):
        assert main(arguments(folder, tmp_path / "out", *more)) == 2
        assert message in capsys.readouterr().err

    wide = tmp_path / "wide"
    config = tiny_target().config
    config = type(config)(**{**config.to_dict(), "hidden_size": 16})
    with torch.random.fork_rng():
        other = type(tiny_target())(config)
    EagleDrafter.from_target(other).save_pretrained(wide)
    refused("`compose` names ['law']", "--compose", "math", "law")
    refused("distinct names", "--drafter", f"math={folder / 'chat'}")
    refused("NAME=PATH", "--drafter", "x")
    refused("does not exist", "--benchmark", "x=none.jsonl")
    refused("expected two different ones or more", "--compose", "math")
    refused("distinct names", "--benchmark", f"sums={folder / 'talk.jsonl'}")
    refused("`live` is -1", "--live", "-1")
    refused("`oracle_answers` is given without `oracle`", "--oracle-answers", "3")
    refused("`oracle_answers` is 0", "--oracle", "--oracle-answers", "0")
    refused("named 'oracle'", "--oracle", "--drafter", f"oracle={folder / 'math'}")
    refused("`temperatures` is -1.0", "--temperature", "-1")
    refused("is no folder of results", "--others", str(tmp_path / "none"))
    refused("hidden", "--drafter", f"wide={wide}")
    refused(
        "names two variants", "--drafter", f"merged={folder / 'math'}", "--compose", "math", "chat"
    )
    assert not (tmp_path / "out" / "replay.jsonl").exists()


def test_folders_of_other_kinds_are_refused_before_a_model_is_loaded(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("taps_hf.evaluation.evaluate.load_target", None)
    out = tmp_path / "out"
    out.mkdir()

    def refused(message: str, *more: str) -> None:
        before = tree_of(tmp_path)
        assert main(arguments(folder, out, *more)) == 2
        assert message in capsys.readouterr().err
        assert tree_of(tmp_path) == before

    refused("`records` and `out` are both", "--records", str(out))
    for text, message in [
        ("[]", "expected the settings of an evaluation"),
        ('{"target": "as records have it"}', "is not of an evaluation"),
    ]:
        (out / "settings.json").write_text(text)
        refused(message)


def test_tables_in_three_ways():
    from taps_hf.evaluation.metrics import Estimate

    table = Table(
        "t", "Caption.", ("a", "b"), [("x", Estimate(1.0, 0.5, 1.5)), ("y", float("nan"))]
    )
    assert table.markdown().splitlines()[2:] == [
        "| a | b |",
        "| --- | --- |",
        "| x | 1.00 (0.50-1.50) |",
        "| y | - |",
    ]
    assert table.csv() == "a,b,b low,b high\nx,1.0,0.5,1.5\ny,nan,,\n"
    assert table.json() == [
        {"a": "x", "b": {"value": 1.0, "low": 0.5, "high": 1.5}},
        {"a": "y", "b": None},
    ]
