from __future__ import annotations

import copy
import json
import re
import statistics

import conversations
import decode
import gpu
import launches
import parts
import pytest
import settings
import torch
import windows
from prompts import Prompt, read_prompts
from results import HINDSIGHT, Figures, Results, Row, faster, interval, markdown, overall
from transformers import AutoTokenizer
from variants import variants

import taps_hf
from taps_hf.drafters.causal import CausalDrafter

from .saved import save_tiny_models
from .tiny import prompt, tiny_drafters, tiny_target


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def questions(tmp_path):
    rows = [{"turns": [f"t5 t{i}", "later"]} for i in range(2)] + [{"instruction": "t6"}]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def row(**changed) -> Row:
    fields = {
        "prompt": "g:1:0",
        "group": "g",
        "variant": "merged 3,8,8",
        "tokens": 30,
        "seconds": 1.0,
        "plain_tokens": 30,
        "plain_seconds": 1.5,
        "cycles": 10,
        "accepted": 20,
        "nodes": 80,
        "drafters": 10,
        "seconds_draft": 0.2,
        "seconds_target": 0.7,
        "seconds_rest": 0.1,
        "differs_at": None,
    }
    return Row(**{**fields, **changed})


def test_variants_are_compared_as_if_timed_together():
    ours = [row(seconds=1.0), row(seconds=2.0)]
    theirs = [row(seconds=2.0), row(seconds=4.0)]
    assert faster(list(zip(ours, theirs))) == pytest.approx(2.0)
    # The same on a day on which everything took three times as long.
    later = [row(seconds=3 * r.seconds, plain_seconds=3 * r.plain_seconds) for r in theirs]
    assert faster(list(zip(ours, later))) == pytest.approx(2.0)


def test_a_single_drafter_runs_without_the_others():
    """Drafters that run as one would read along, at a cost that is not its own."""
    drafters = dict(zip(("math", "chat"), tiny_drafters(2)))
    given = {way.name: way.arguments(drafters) for way in variants([*drafters], [(2, 3, 6)])}
    for name, drafter in drafters.items():
        assert given[f"single {name} 2,3,6"]["assistant_models"] == [drafter]
    assert given["merged 2,3,6"]["assistant_models"] == drafters
    model = tiny_target()
    out = model.generate(prompt(6), max_new_tokens=4, **given["single chat 2,3,6"])
    assert out.equal(model.generate(prompt(6), max_new_tokens=4))


def test_figures_from_known_rows():
    rows = [
        row(),
        row(tokens=10, seconds=0.5, plain_seconds=3.0, accepted=0, nodes=40, differs_at=4),
        row(plain_seconds=1.0, seconds_draft=0.6, seconds_target=0.3),
    ]
    # Tokens per second against plain's: 30 / 20; 20 / 10; 30 / 30.
    assert [r.ratio for r in rows] == pytest.approx([1.5, 2.0, 1.0])
    figures = Figures.of(rows)
    assert figures.ratio == pytest.approx(1.5)
    assert 1.0 <= figures.interval[0] <= 1.5 <= figures.interval[1] <= 2.0
    # All together 70 tokens in 2.5 s; plain 90 in 5.5 s.
    assert figures.overall == pytest.approx((70 / 2.5) / (90 / 5.5))
    assert figures.overall_interval == interval(rows, overall)
    assert figures.tau == pytest.approx(70 / 30)
    assert figures.accepted == pytest.approx(40 / 30)
    assert figures.nodes == pytest.approx(200 / 30)
    shares = (figures.draft, figures.target, figures.rest)
    assert shares == pytest.approx((1.0 / 3, 1.7 / 3, 0.3 / 3))
    assert figures.differing == 1
    assert "| merged 3,8,8 | 1.50 [" in markdown(rows)
    assert "| 33%/57%/10% | 1/3 |" in markdown(rows)


def test_what_is_not_known_is_not_shown():
    unknown = dict.fromkeys(
        ["accepted", "nodes", "drafters", "seconds_draft", "seconds_target", "seconds_rest"]
    )
    found = Figures.of([row(**unknown), row(**unknown)])
    assert found.accepted is None
    assert found.tau == pytest.approx(3.0)
    assert "| 3.00 | - | - | - | - | 0/1 |" in markdown([row(**unknown)])


def test_several_groups_are_also_shown_together():
    table = markdown([row(), row(group="h", prompt="h:1:0", seconds=3.0, plain_seconds=1.5)])
    assert [line for line in table.splitlines() if line.startswith("**")] == [
        f"**{name}**, {count}; plain: 20.0 tokens/s (median)"
        for name, count in [("g", "1 prompt"), ("h", "1 prompt"), ("all prompts", "2 prompts")]
    ]
    assert "| merged 3,8,8 | 1.00 [" in table  # the median of 1.5 and 0.5


def test_auto_is_compared_with_the_others_and_with_hindsight():
    def answers(variant: str, *seconds: float) -> list[Row]:
        return [row(variant=variant, prompt=str(i), seconds=s) for i, s in enumerate(seconds)]

    rows = answers("auto", 1.0, 1.0)
    rows += answers("single math 3,8,8", 0.5, 3.0) + answers("single chat 3,8,8", 2.5, 0.5)
    table = markdown(rows)
    # The singles take 3.5 and 3 s for what auto does in 2; the faster of each prompt takes 1 s.
    assert "| single math 3,8,8 | 1.75 [0.50, 3.00] |" in table
    assert "| single chat 3,8,8 | 1.50 [0.50, 2.50] |" in table
    assert f"| {HINDSIGHT} | 0.50 [0.50, 0.50] |" in table
    assert "auto's speed" not in markdown(answers("auto", 1.0))
    assert HINDSIGHT not in markdown(rows[:4])


def test_interval_of_a_median_narrows_and_repeats():
    few, many = list(range(10)), [i / 10 for i in range(100)]
    assert interval(few) == interval(few)
    (low, high), (lower, upper) = interval(few), interval(many)
    assert low < statistics.median(few) < high
    assert upper - lower < high - low
    assert interval([2.0]) == (2.0, 2.0)


def test_variants():
    ways = variants(["math", "chat"], [(3, 8, 8), (5, 8, 24)])
    assert [way.name for way in ways][:13] == [
        "auto",
        "auto-all",
        "auto-learned",
        "lookup",
        "prompt-lookup",
        "single math 3,8,8",
        "single chat 3,8,8",
        "confidence 3,8,8",
        "confidence-per-prompt 3,8,8",
        "merged 3,8,8",
        "merged-equal-budget 3,8,8",
        "concatenated 3,8,8",
        "merged-with-lookup 3,8,8",
    ]
    assert len(ways) == 21
    assert ways[18].strategy.num_nodes == ways[20].strategy.num_nodes == 24
    assert [way.name for way in ways if way.lookup] == [
        "auto",
        "auto-all",
        "lookup",
        "merged-with-lookup 3,8,8",
        "merged-with-lookup 5,8,24",
    ]
    found = variants(["only"], [(2, 4, 4)], ["auto", "prompt-lookup", "single", "confidence"])
    assert [way.name for way in found] == ["auto", "prompt-lookup", "single only 2,4,4"]


def test_a_small_language_model_beside_assisted_decoding():
    target, small = tiny_target(), CausalDrafter.of(copy.deepcopy(tiny_target()))
    ways = variants(["small"], [(3, 1, 3)], ["auto", "assistant-model", "single"])
    generate = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 99}
    rows = decode.measure(target, {"small": small}, ways, Prompt("g", 1, "x"), prompt(), generate)
    assert [row.variant for row in rows] == ["auto", "assistant-model", "single small 3,1,3"]
    assert all(row.differs_at is None and row.tokens == 8 for row in rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--strategies", "assistant-model"], "needs --small-model"),
        (["--context-window", "0"], "expected a positive number"),
        (["--small-model", "x", "--draft-vocab", "8"], "which a small language model does not"),
        (["--filler", "x"], "no --context to fill"),
    ],
)
def test_what_does_not_go_together(capsys, given, message):
    with pytest.raises(SystemExit):
        decode.main(given)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_measured_rows_match_the_generations(temperature):
    drafters = dict(zip(("math", "chat"), tiny_drafters()))
    ways = variants(list(drafters), [(3, 4, 8)])
    # An end that never comes: prompt lookup of early 5.x versions cannot do without one.
    generate = {"max_new_tokens": 12, "do_sample": temperature is not None, "eos_token_id": 99}
    if temperature:
        generate["temperature"] = temperature
    for rotation in (0, 3):
        rows = decode.measure(
            tiny_target(), drafters, ways, Prompt("g", 1, "x"), prompt(), generate, rotation, seed=5
        )
        assert [r.variant for r in rows] == [way.name for way in ways]
        for r in rows:
            assert r.tokens == r.plain_tokens == 12
            if r.variant == "prompt-lookup":  # sampled, it is exact in distribution only
                assert r.accepted is None
                assert 1 <= r.cycles <= 12
                assert temperature or r.differs_at is None
                continue
            assert r.differs_at is None
            assert r.seconds > r.seconds_draft + r.seconds_target + r.seconds_rest > 0
            assert r.tokens - r.cycles <= r.accepted <= r.tokens
        assert len({r.plain_seconds for r in rows}) == 1
    nodes = {r.variant: r.nodes / r.cycles for r in rows if r.nodes is not None}
    assert nodes["merged-equal-budget 3,4,8"] <= 8 < nodes["concatenated 3,4,8"]


def test_main_writes_a_table_and_resumes(models, questions, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out" / "results.json"
    command = [*models, "--max-new-tokens", "6", "--trees", "2,4,4", "--out", str(out)]
    first = ["--strategies", "single", "merged", "--prompts", f"{questions}:2"]
    assert decode.main([*command, *first]) == 0
    table = capsys.readouterr().out
    assert "**questions**, 2 prompts" in table
    assert "| single math 2,4,4 |" in table
    assert "0 of 6 answers differ" in table
    assert "drafters auto, greedy" in table
    assert str(tmp_path) not in table  # commands are shown without this machine's folders
    before = json.loads(out.read_text())["rows"]
    assert len(before) == 6

    calls = []
    measure = decode.measure
    monkeypatch.setattr(
        decode, "measure", lambda *a, **k: calls.append((a[3].line, len(a[2]))) or measure(*a, **k)
    )
    # One more prompt and one more strategy: only what is new is measured.
    more = ["--strategies", "single", "merged", "concatenated", "--prompts", str(questions)]
    assert decode.main([*command, *more]) == 0
    assert calls[1:] == [(1, 1), (2, 1), (3, 4)]  # the first is the warm-up
    after = json.loads(out.read_text())["rows"]
    assert after[:6] == before
    assert len(after) == 12
    calls.clear()
    assert decode.main([*command, *more]) == 0
    assert not calls
    assert json.loads(out.read_text())["rows"] == after

    for option, value, message in [
        ("--max-new-tokens", "7", "max_new_tokens 6, this is 7"),
        ("--draft-vocab", "5", "draft_vocab None, this is 5"),
    ]:
        with pytest.raises(ValueError, match=f"was measured with .*{message}"):
            decode.main([*command, *more, option, value])


def test_every_way_compiled(models, questions, capsys):
    """Graphs are made once: figures would be those of making them."""
    command = [*models, "--max-new-tokens", "6", "--trees", "2,4,4", "--prompts", f"{questions}:2"]
    ways = ["--strategies", "single", "--compile", "eager"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert decode.main([*command, *ways]) == 0
    table = capsys.readouterr().out
    for name in ("single math 2,4,4", "single math 2,4,4, compiled", "plain, compiled"):
        assert f"| {name} | " in table
    assert "0 of 10 answers differ" in table


def test_main_with_a_small_language_model(models, questions, capsys):
    target = models[models.index("--target") + 1]
    command = ["--target", target, "--small-model", target, "--max-new-tokens", "6"]
    ways = ["--strategies", "single", "assistant-model", "--trees", "2,4,4"]
    assert decode.main([*command, *ways, "--prompts", f"{questions}:2"]) == 0
    table = capsys.readouterr().out
    assert "| single small 2,4,4 | " in table
    assert "| assistant-model | " in table
    assert "0 of 4 answers differ" in table


def test_contexts_are_filled_from_files_and_seen_through_windows(
    models, questions, tmp_path, monkeypatch, capsys
):
    filler = tmp_path / "filler.jsonl"
    filler.write_text(json.dumps({"instruction": "t7 t8 t9"}))
    asked, windows = [], []
    measure = decode.measure
    monkeypatch.setattr(
        decode,
        "measure",
        lambda *a, **k: (
            (
                asked.append(a[4]),
                windows.extend(drafter.config.context_window for drafter in a[1].values()),
            )
            and measure(*a, **k)
        ),
    )
    command = [*models, "--max-new-tokens", "4", "--trees", "2,4,4", "--strategies", "single"]
    context = ["--context", "40", "--filler", str(filler), "--context-window", "5"]
    assert decode.main([*command, *context, "--prompts", f"{questions}:1"]) == 0
    assert "after at least 40, drafters seeing 5 slots" in capsys.readouterr().out
    assert set(windows) == {5}
    assert asked[0].shape[1] >= 40
    tokenizer = AutoTokenizer.from_pretrained(models[models.index("--target") + 1])
    words = tokenizer("t7 t8 t9", add_special_tokens=False)["input_ids"]
    assert all(asked[0][0].tolist().count(word) > 3 for word in words)  # they had to be repeated


def test_windows_say_what_generation_accepts(models, questions, tmp_path, capsys):
    """The same tau as that of answers that drafters with such a window wrote."""
    contexts, sizes = (30, 60), (None, 7)
    command = [*models, "--prompts", str(questions), "--max-new-tokens", "12"]
    options = ["--context", *map(str, contexts), "--windows", "7", "--tree", "2", "4", "4"]
    records = ["--records", str(tmp_path / "records")]
    assert windows.main([*command, *options, *records]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    found = {(row[0], row[1]): row[3:] for row in lines if row[0] in ("| 30", "| 60")}
    assert len(found) == 4
    for column, size in enumerate(sizes):
        for context in contexts:
            seen = [] if size is None else ["--context-window", str(size)]
            out = tmp_path / f"{context}-{size}.json"
            given = ["--trees", "2,4,4", "--strategies", "single", "--out", str(out), *seen]
            assert decode.main([*command, *given, "--context", str(context)]) == 0
            rows = json.loads(out.read_text())["rows"]
            for name in ("math", "chat"):
                of = [row for row in rows if f" {name} " in row["variant"]]
                tau = sum(row["tokens"] for row in of) / sum(row["cycles"] for row in of)
                said = float(found[f"| {context}", name][column].rstrip(" |"))
                assert said == pytest.approx(tau, abs=0.0051), (context, size, name)


def test_drafters_may_score_fewer_tokens(models, questions, monkeypatch, capsys):
    sizes = []
    measure = decode.measure
    monkeypatch.setattr(
        decode,
        "measure",
        lambda *a: sizes.extend(len(d.draft_token_ids) for d in a[1].values()) or measure(*a),
    )
    command = [*models, "--max-new-tokens", "4", "--strategies", "auto", "--draft-vocab", "5"]
    assert decode.main([*command, "--prompts", f"{questions}:1"]) == 0
    assert {*sizes} == {5}
    assert "drafters auto scoring 5 tokens, greedy" in capsys.readouterr().out


def test_main_fails_where_float32_differs(models, questions, monkeypatch, capsys):
    monkeypatch.setattr(decode, "first_difference", lambda a, b: 3)
    command = [*models, "--max-new-tokens", "4", "--trees", "2,4,4", "--strategies", "single"]
    assert decode.main([*command, "--prompts", str(questions)]) == 1
    assert "6 of 6 answers differ" in capsys.readouterr().out


def test_parts_are_timed(models, capsys):
    assert parts.main([*models, "--rounds", "2", "--context", "20", "--tree", "2", "3", "6"]) == 0
    table = capsys.readouterr().out
    found = dict(re.findall(r"\| (.+?) \| ([\d.]+) \|", table))
    assert float(found["target, 1 row"]) > 0
    assert {"draft, 2 drafters one by one", "draft, 2 drafters as one", "merge"} <= set(found)
    assert {"prompt, plain generate's pass", "prompt, all drafters' pass"} <= set(found)
    assert str(models[1]) not in table


def test_memory_is_that_of_weights_head_rows_and_cache():
    target, (drafter,) = tiny_target(), tiny_drafters(1, draft_vocab=6)
    held, per_token = parts.memory_of(drafter, target)
    weights = sum(p.numel() for p in drafter.parameters())
    assert held == 4 * (weights + 6 * 32)
    config = drafter.trunk.config
    assert per_token == 2 * 4 * config.num_key_value_heads * config.head_dim
    halves = [copy.deepcopy(model).bfloat16() for model in (drafter, target)]
    assert parts.memory_of(*halves) == (held // 2, per_token // 2)


def test_the_drafter_that_scores_everything_drafts_alike():
    (drafter,) = tiny_drafters(1, draft_vocab=6)
    whole = parts.scoring(drafter, None)
    assert whole.draft_token_ids is None
    x = torch.randn(2, 1, 4, 32)
    with torch.no_grad():
        assert torch.equal(whole(*x).last_hidden_state, drafter(*x).last_hidden_state)


def test_prompts_are_spread_over_the_file(questions):
    assert [p.text for p in read_prompts(str(questions))] == ["t5 t0", "t5 t1", "t6"]
    assert [p.line for p in read_prompts(f"{questions}:2")] == [1, 2]
    assert read_prompts(f"{questions}:1")[0].key.startswith("questions:1:")
    with pytest.raises(ValueError, match=r"4 prompts were asked of questions\.jsonl, which has 3"):
        read_prompts(f"{questions}:4")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("not json", "not JSON"),
        ("[1]", "expected an object"),
        ('{"turns": []}', "expected an object"),
        ('{"turns": [3]}', "expected an object"),
        ('{"instruction": " "}', "expected an object"),
    ],
)
def test_bad_prompts_are_refused_by_file_and_line(questions, bad, message):
    questions.write_text(questions.read_text() + bad + "\n")
    with pytest.raises(ValueError, match=rf"questions\.jsonl, line 4: {message}"):
        read_prompts(str(questions))


def test_other_files_are_no_results(tmp_path):
    file = tmp_path / "results.json"
    for content in ("{", "[]", '{"settings": {}, "rows": [{"prompt": 1}]}'):
        file.write_text(content)
        with pytest.raises(ValueError, match="is no file of results"):
            Results(file, {})


def test_results_are_never_half_written(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    results = Results(file, {"dtype": "float32"})
    results.add([row()])
    written = file.read_text()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("taps_hf.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results.add([row(prompt="g:2:0")])
    assert file.read_text() == written
    assert Results(file, {"dtype": "float32"}).rows == [row()]


def test_a_file_that_another_run_has_changed_stays(tmp_path):
    file = tmp_path / "results.json"
    results, other = Results(file, {}), Results(file, {})
    other.add([row()])
    with pytest.raises(ValueError, match="was changed meanwhile"):
        results.add([row(prompt="g:2:0")])
    assert Results(file, {}).rows == [row()]
    other.add([row(prompt="g:2:0")])
    assert len(Results(file, {}).rows) == 2


def test_files_of_anything_else_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "load_models", None)
    (tmp_path / "file").write_text("mine")
    for out, message in [
        (tmp_path / "file", "is no file of results"),
        (tmp_path, "is no file of results"),
        (tmp_path / "file" / "a", "file is no folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode.main(["--out", str(out)])
    assert (tmp_path / "file").read_text() == "mine"


def test_commands_hide_folders_outside():
    shown = settings.command(["--prompts", "../data/a.jsonl:3", "--drafters", "m=/x/y", "n=here/z"])
    assert shown == ("python benchmarks/decode.py --prompts a.jsonl:3 --drafters m=y n=here/z")


def test_second_turns_are_plain_generates(models, questions, capsys):
    arguments = [*models, "--max-new-tokens", "8", "--strategies", "merged", "single"]
    with pytest.raises(SystemExit):
        conversations.main([*arguments, "--prompts", str(questions)])
    assert "has one turn, expected two or more" in capsys.readouterr().err
    two = questions.read_text().splitlines(keepends=True)[:2]
    questions.write_text("".join(two))
    assert conversations.main([*arguments, "--prompts", str(questions)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith(("| merged", "| single"))]
    ways = [conversations.GOES_ON, conversations.ANEW, conversations.AT_ONCE]
    assert [row[1] for row in rows] == 2 * ways
    assert all(float(row[2]) >= 1 for row in rows)
    assert all(row[-1] == "0 |" for row in rows)


def test_operations_are_counted_without_those_that_do_nothing():
    x = torch.ones(4, 4)
    with launches.WorkCounter(torch.device("cpu")) as counter:
        y = x.view(2, 8).T[:1] + 1  # only the sum does anything
        y.add_(torch.empty_like(y))
    assert counter.counts == {"add": 1, "add_": 1}


def test_a_cycle_with_drafters_is_counted_by_its_parts(monkeypatch):
    monkeypatch.setattr(launches, "LAYERS", 2)
    target = launches.tiny_target(torch.device("cpu"))
    drafter = taps_hf.EagleDrafter.from_target(target).eval()
    plain, waits = launches.per_cycle(target, {})
    assert waits is None
    shallow, deep = (
        launches.per_cycle(
            target, {"assistant_models": [drafter], "tree": taps_hf.DynamicTree(depth, 2, 8)}
        )[0]
        for depth in (1, 4)
    )
    assert plain < shallow < deep


def test_everything_measured_on_a_gpu_can_be_tried_without(monkeypatch, capsys, models):
    monkeypatch.setattr(launches, "LAYERS", 1)
    monkeypatch.setattr(gpu, "TREES", gpu.TREES[:1])
    monkeypatch.setattr(gpu, "LONG", 10)
    monkeypatch.setitem(gpu.SHAPES["tiny"], "num_hidden_layers", 1)
    monkeypatch.setattr(gpu.decode, "main", lambda arguments: print(" ".join(arguments)))
    compiled = ["--compile", "eager"]
    gpu.main(["--device", "cpu", "--shape", "tiny", "--rounds", "1", *compiled])
    shown = capsys.readouterr().out
    for part in ("What is launched", "one drafter", "end to end", "| hass |"):
        assert part in shown
    assert "| plain `generate`, compiled | " in shown
    assert "nodes verified, compiled | " in shown
    assert "--compile eager" in shown  # handed on
