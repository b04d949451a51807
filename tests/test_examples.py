from __future__ import annotations

import copy
import re

import _common
import averaging
import conversation
import custom_strategy
import pipeline
import pytest
import quickstart
import streaming
import torch

from taps_hf import CycleOutcome, EmittedToken, GenerationContext

from .saved import save_tiny_models


@pytest.fixture(scope="module")
def tiny_arguments(tmp_path_factory) -> list[str]:
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def real_target(real_folder):
    return _common.load_target(str(real_folder))


@pytest.fixture(params=["tiny", pytest.param("real", marks=pytest.mark.real)])
def arguments(request, monkeypatch) -> list[str]:
    """Command-line arguments; the real target is loaded once for all examples."""
    if request.param == "tiny":
        return [*request.getfixturevalue("tiny_arguments"), "--max-new-tokens", "12"]
    model, tokenizer = request.getfixturevalue("real_target")

    def load_target(name, dtype=torch.float32):
        assert name is None
        return (model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)), tokenizer

    for example in (averaging, custom_strategy, pipeline, quickstart, streaming):
        monkeypatch.setattr(example, "load_target", load_target)
    return ["--max-new-tokens", "8"]


def target_of(arguments: list[str], example):
    name = arguments[1] if arguments[0] == "--target" else None
    return example.load_target(name)


def test_quickstart(arguments, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert quickstart.main(arguments) == 0
    shown = re.sub(r"\033\[\d+m", "", capsys.readouterr().out)  # without the colours
    model, tokenizer = target_of(arguments, quickstart)
    in_float32, in_bfloat16 = shown.split("=== bfloat16")
    for kind in quickstart.KINDS:
        for prompt in _common.prompts(kind):
            assert f"[{kind}] {prompt}" in in_float32
            inputs = _common.encode(tokenizer, prompt)
            plain = model.generate(**inputs, do_sample=False, max_new_tokens=int(arguments[-1]))
            answer = tokenizer.decode(
                _common.answer_tokens(inputs, plain), skip_special_tokens=True
            )
            assert answer in in_float32
    assert in_float32.count("  equal to plain generate; tau ") == 6
    assert len(re.findall(r"(equal to|DIFFERS from) ", in_bfloat16)) == 6
    summary = shown.split("=== Summary")[1]
    assert re.search(r"float32 +all +6/6 +\d\.\d\d ", summary)
    assert re.search(r"bfloat16 +all +\d/6 +\d\.\d\d ", summary)


def test_quickstart_fails_where_float32_differs(tiny_arguments, monkeypatch, capsys):
    compare = quickstart.compare

    def broken(*args):
        found = compare(*args)
        found.drafted[-1] = (found.drafted[-1] + 1) % 16
        return found

    monkeypatch.setattr(quickstart, "compare", broken)
    assert quickstart.main([*tiny_arguments, "--max-new-tokens", "6"]) == 1
    shown = capsys.readouterr()
    assert "DIFFERS from token 6 on: after 't" in shown.out
    assert "6 answers differ in float32" in shown.err


def test_colours_and_their_absence(monkeypatch):
    names = ("math", "chat")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    ways = {quickstart.coloured("x", origin, names) for origin in [(0,), (1,), (0, 1), ()]}
    assert len(ways) == 4
    assert quickstart.coloured("x", (0,), names) == "\033[36mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert quickstart.coloured("x", (1,), names) == "[chat:x]"
    assert quickstart.coloured("x", (0, 1), names) == "[several:x]"
    assert quickstart.coloured("x", (), names) == "x"


def test_pieces_of_characters_of_several_tokens():
    class Bytes:
        def decode(self, tokens, skip_special_tokens):
            return bytes(tokens).decode("utf-8", errors="replace")

    tokens = list("a\u20acb".encode())
    assert list(quickstart.text_pieces(Bytes(), tokens)) == ["a", "", "", "\u20ac", "b"]
    assert list(quickstart.text_pieces(Bytes(), tokens[:2])) == ["a", "\ufffd"]


def test_streaming_prints_the_plain_answer(arguments, capsys):
    assert streaming.main(arguments) == 0
    shown = capsys.readouterr().out
    model, tokenizer = target_of(arguments, streaming)
    prompt = _common.prompts("chat")[0]
    inputs = _common.encode(tokenizer, prompt)
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=int(arguments[-1]))
    answer = tokenizer.decode(_common.answer_tokens(inputs, plain), skip_special_tokens=True)
    assert shown.startswith(f"> {prompt}\n\n{answer}\n")
    assert re.search(r"\(\d+ tokens in \d+ passes .*: tau \d\.\d\d\)", shown)


def test_pipeline_answers_as_without_drafters(arguments, capsys):
    assert pipeline.main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.out.count("> ") == 2
    assert "Without drafters" not in shown.err


def test_a_conversation_goes_on(arguments, capsys):
    assert conversation.main(arguments) == 0
    shown = capsys.readouterr().out
    known = re.findall(r"\((\d+) of (\d+) tokens were known; tau \d", shown)
    assert len(known) == len(conversation.TURNS)
    assert int(known[0][0]) == 0
    assert all(int(kept) > 0 for kept, _ in known[1:])


def test_custom_strategy_gives_the_plain_answer(arguments, capsys):
    assert custom_strategy.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.endswith("equal to plain generate") for line in lines)
    for line in lines[::2]:
        assert re.search(r": merged .* drafted math (\d+), chat \1;", line)


def test_staying_with_the_drafter_accepted_most():
    stay = custom_strategy.Stay().begin(GenerationContext(2, torch.device("cpu"), costs=None))
    assert stay.ask((0, 1)) == (0, 1)
    for accepted, then in ((((0, 1), (1,)), (1,)), ((), (0, 1)), (((0, 1),), (0,))):
        emitted = tuple(EmittedToken(5, 1, by, (1.0,) * len(by), ()) for by in accepted)
        stay.observe(CycleOutcome((0, 1), 4, tuple(range(1, len(emitted) + 1)), emitted))
        assert stay.ask((0, 1)) == then


def test_averaging_compares_tau(arguments, capsys):
    assert averaging.main(arguments) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["tau", "math", "chat"]
    taus = {line.split()[0]: line.split()[1:] for line in lines}
    assert list(taus) == ["math", "chat", "average", "merged"]
    model, tokenizer = target_of(arguments, averaging)
    at = arguments.index("--drafters") if "--drafters" in arguments else None
    drafters = _common.load_drafters(None if at is None else arguments[at + 1 : at + 3])
    ways = {"math": [drafters["math"]], "merged": list(drafters.values())}
    for name, assistants in ways.items():
        for kind, tau in zip(("math", "chat"), taus[name]):
            emitted = _tokens_a_cycle(model, tokenizer, assistants, kind, int(arguments[-1]))
            assert tau == f"{sum(emitted) / len(emitted):.2f}", (name, kind)


def _tokens_a_cycle(model, tokenizer, assistants, kind: str, limit: int) -> list[int]:
    """Counted while the same answers are written."""
    emitted: list[int] = []
    for text in _common.prompts(kind)[:2]:
        model.generate(
            **_common.encode(tokenizer, text),
            do_sample=False,
            max_new_tokens=limit,
            assistant_models=assistants,
            strategy="merged",
            on_cycle=lambda cycle: emitted.append(len(cycle.emitted)),
        )
    return emitted


def test_drafters_score_what_was_asked_for():
    ours = _common.load_drafters()
    saved = _common.load_drafters([f"{name}={path}" for name, path in _common.DRAFTERS.items()])
    for name, drafter in ours.items():
        assert drafter.draft_token_ids.tolist() == saved[name].draft_token_ids[:4096].tolist()
        assert len(saved[name].draft_token_ids) == 16384
    (fewer,) = _common.load_drafters([f"math={_common.DRAFTERS['math']}"], 7).values()
    assert fewer.config.draft_vocab_size == 7


def test_drafters_are_named_once():
    with pytest.raises(ValueError, match="expected NAME=PATH with distinct names"):
        _common.load_drafters(["a=x", "a=y"])
    with pytest.raises(ValueError, match="expected NAME=PATH"):
        _common.load_drafters(["x"])
