"""The page in a real browser."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from taps_hf import list_strategies
from taps_hf.demo import models as demo_models
from taps_hf.demo.models import ModelSpec, default_target, load_models
from taps_hf.embedded import EMBEDDED_DRAFTERS

pytest.importorskip("gradio")
pytest.importorskip("altair")
pytest.importorskip("playwright")

from taps_hf.demo.page import PageOptions, serve
from taps_hf.demo.settings import Limits

from ..phrases import Phrases
from ..saved import save_tiny_models
from .visitor import Visitor
from .written import hostile_tokenizer, plain_answer


@pytest.fixture(scope="module")
def url(tiny_spec):
    """The page with tiny models, for two answers at once."""
    page = serve(PageOptions(tiny_spec, Limits(prompt_tokens=40), concurrency=2), wait=False)
    yield page.local_url
    page.close()


@pytest.fixture
def open_page(browser):
    """Opens the page as visitors who know nothing of each other."""
    contexts = []

    def open_(url: str, width: int = 1280) -> Visitor:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        return Visitor(contexts[-1].new_page(), url)

    yield open_
    for context in contexts:
        context.close()


@pytest.fixture
def visitor(open_page, url) -> Visitor:
    someone = open_page(url)
    yield someone
    assert someone.errors == []


def generating() -> bool:
    return any(thread.name == "taps-generate" for thread in threading.enumerate())


def wait_until_idle() -> None:
    deadline = time.monotonic() + 30
    while generating() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not generating()


def test_every_strategy_writes_the_plain_answer(visitor, tiny_spec):
    expected = plain_answer(tiny_spec, "t5 t6", 20)
    for strategy in list_strategies():
        visitor.ask("t5 t6", strategy, Length=20)
        assert visitor.generate() == expected
        passes = int(re.search(r"(\d+) passes", visitor.page.inner_text("#figures"))[1])
        assert visitor.figure("target passes saved") == str(max(0, 20 - passes))
        assert visitor.figure("tokens") == "20"
        assert float(visitor.figure("tau")) >= 1


def test_sampled_answers_are_the_seeds(visitor, tiny_spec):
    for seed in (1, 2):
        visitor.ask("t5 t6", Length=20, Temperature=1, Seed=seed)
        assert visitor.generate() == plain_answer(tiny_spec, "t5 t6", 20, seed)


def test_what_is_typed_as_a_part_unfolds_stays(visitor):
    """Sooner than any person can: in the very moment in which the field is there."""
    at_once = """async () => {
        const length = () => document.querySelector("#length input[type=number]");
        [...document.querySelectorAll("input[type=checkbox]")]
            .find((box) => box.closest("label").innerText.includes("Temperature, length")).click();
        while (!length()?.checkVisibility()) await new Promise((resume) => setTimeout(resume));
        length().value = "20";
        length().dispatchEvent(new Event("input", {bubbles: true}));
        for (let i = 0; i < 10; i++) await new Promise(requestAnimationFrame);
        return length().value;
    }"""
    assert visitor.page.evaluate(at_once) == "20"
    visitor.generate()
    assert visitor.figure("tokens") == "20"


def test_what_is_typed_while_the_server_answers_stays(visitor, going_on):
    visitor.ask("t5 t6", Length=20)
    visitor.start("generate")
    visitor.ask("t7 t8", "confidence", Length=5, Seed=7)
    visitor.page.locator("#drafters input").first.uncheck()
    going_on.set()
    visitor.wait_for_the_end("generate")
    assert visitor.page.locator("#prompt textarea").input_value() == "t7 t8"
    assert visitor.page.locator("#strategy input").input_value() == "confidence"
    assert visitor.page.locator("#length input[type=number]").input_value() == "5"
    assert visitor.page.locator("#seed input").input_value() == "7"
    assert not visitor.page.locator("#drafters input").first.is_checked()


def test_examples_come_at_once(visitor):
    """Not from the server, whose late answer would lie over what was typed since."""
    visitor.page.context.set_offline(True)
    visitor.example("Maths: two pumps")
    visitor.example("Mixture: a school trip")


def test_hovering_tells_about_a_token(visitor):
    visitor.ask("t5 t6", "merged", Length=40)
    visitor.generate()
    proposed = visitor.page.locator("#answer .tok:not(.own)").first
    tip = proposed.get_attribute("data-tip")
    assert re.search(r"proposed by (math|chat).* confidence 0\.\d\d.*depth 1 of cycle \d+", tip)
    proposed.hover()
    shown = "(token) => getComputedStyle(token, '::after').content"
    assert proposed.evaluate(shown) == f'"{tip}"'


def test_comparison(visitor):
    visitor.tab("Compare")
    visitor.ask("t5 t6", Length=12, Temperature=1, Seed=3)
    visitor.start("compare")
    visitor.wait_for_the_end("compare")
    cards = visitor.page.locator("#comparison .card")
    names = [card.get_attribute("data-variant") for card in cards.all()]
    together = [name for name in list_strategies() if name != "single"]
    assert names == ["plain generate", "math alone", "chat alone", *together]
    verdicts = [card.locator(".verdict").inner_text() for card in cards.all()]
    assert all("equal to plain generate, all 12 tokens" in verdict for verdict in verdicts[1:])


def test_slider_over_the_cycles(visitor):
    visitor.tab("Cycles")
    assert "generate an answer" in visitor.page.inner_text("#cycle")
    visitor.tab("Generate")
    visitor.ask("t5 t6", "merged", Length=30, Tree_nodes=9)
    visitor.generate()
    visitor.tab("Cycles")
    cycle = visitor.page.locator("#cycle .taps-cycle")
    for number in (1, 2, 4):
        visitor.number("Cycle", number)
        visitor.page.locator(f"#cycle .taps-cycle[data-cycle='{number}']").wait_for()
        checked = int(re.search(r"checked (\d+) nodes", cycle.inner_text())[1])
        own = cycle.locator(".wide .node.target").count()
        assert cycle.locator(".wide .node").count() == 1 + checked + own
    slider = visitor.page.locator("#cycle-slider input[type=range]")
    slider.press("ArrowRight")
    visitor.page.locator("#cycle .taps-cycle[data-cycle='5']").wait_for()


def test_stopping_an_answer(visitor, tiny_spec, going_on):
    visitor.ask("t5 t6", Length=200)
    visitor.start("generate")
    visitor.button("stop-generate").click()
    visitor.wait_for_the_end("generate")
    assert "stopped" in visitor.page.inner_text("#figures")
    assert 0 < int(visitor.figure("tokens")) < 200
    wait_until_idle()
    assert plain_answer(tiny_spec, "t5 t6", 200).startswith(visitor.answer())
    visitor.tab("Cycles")  # what was written can be looked into
    visitor.page.locator("#cycle svg:visible").wait_for()
    visitor.tab("Generate")
    visitor.ask(Length=10)  # and the next answer is not stopped
    assert visitor.generate() == plain_answer(tiny_spec, "t5 t6", 10)


def test_stopping_a_comparison(visitor, going_on):
    visitor.tab("Compare")
    visitor.ask("t5 t6", Length=200)
    visitor.start("compare")
    visitor.button("stop-compare").click()
    visitor.wait_for_the_end("compare")
    wait_until_idle()
    assert "stopped" in visitor.page.inner_text("#comparison")


def test_leaving_the_page_ends_the_answer(open_page, url, going_on):
    someone = open_page(url)
    someone.ask("t5 t6", Length=200)
    someone.start("generate")
    assert generating()
    someone.page.close()
    wait_until_idle()


def test_two_visitors_at_once(open_page, url, tiny_spec, going_on):
    visitors = {seed: open_page(url) for seed in (1, 2)}
    for seed, someone in visitors.items():
        someone.ask(f"t{seed} t6", Length=60, Temperature=1, Seed=seed)
    for someone in visitors.values():
        someone.button("generate").click()
        someone.page.locator("#answer [data-number]").wait_for()
    going_on.set()  # neither was at its end when both had begun
    for someone in visitors.values():
        someone.wait_for_the_end("generate")
    for seed, someone in visitors.items():
        assert someone.answer() == plain_answer(tiny_spec, f"t{seed} t6", 60, seed)


def test_bad_input_is_answered_in_the_page(visitor):
    def says(message: str, button: str = "generate") -> None:
        visitor.button(button).click()
        visitor.is_told(message)

    visitor.ask("  ")
    says("The prompt is empty. Write one, or choose an example.")
    visitor.ask("t5 " * 60)
    says("Shorten it to 40.")
    visitor.ask("x" * 5000)
    says("The prompt has 5,000 characters. Shorten it")
    visitor.ask("x" * 2**20)
    says("the prompt is far too long")
    assert len(visitor.page.locator("#prompt textarea").input_value()) == 2**20
    visitor.ask("t5", Seed=1.5)
    says("Seed is 1.5. Choose a whole number from 0")
    visitor.ask(Seed=0)
    for box in visitor.page.locator("#drafters input").all():
        box.uncheck()
    says("Tick at least one of: math, chat.")
    visitor.tab("Compare")
    says("Tick at least one of: math, chat.", "compare")
    assert "Traceback" not in visitor.page.content()
    visitor.page.locator("#drafters input").first.check()
    visitor.tab("Generate")
    visitor.ask(Length=5)
    assert visitor.generate()
    assert visitor.page.locator(".taps-notice").filter(visible=True).count() == 0


def test_other_models_are_loaded_in_the_page(visitor, tiny_spec, tmp_path):
    visitor.unfold("Other models")
    lines = visitor.page.get_by_label("Drafters").filter(visible=True).last
    lines.fill(f"math={tmp_path}/nowhere")
    visitor.button("load").click()
    visitor.is_told("Drafter 'math' could not be loaded")
    assert lines.input_value() == f"math={tmp_path}/nowhere"
    path = dict(tiny_spec.drafters)["chat"]
    lines.fill(f"other={path}")
    visitor.button("load").click()
    visitor.page.get_by_text("New answers are written by these models").wait_for()
    assert visitor.page.locator("#drafters label").all_inner_texts() == ["other"]
    visitor.ask("t5 t6", Length=20)
    assert visitor.generate() == plain_answer(tiny_spec, "t5 t6", 20)
    assert "other" in visitor.page.inner_text("#legend")


def test_a_crowd_is_turned_away_with_a_message(open_page, tiny_spec, going_on):
    """One answer is written, one visitor waits; the third is told, and can still look around."""
    page = serve(PageOptions(tiny_spec, queue_size=1), wait=False)
    try:
        first, second, third = (open_page(page.local_url) for _ in range(3))
        third.ask("t5 t6", Length=10)
        third.generate()
        for someone in (first, second):
            someone.ask("t5 t6", Length=20)
        first.start("generate")
        second.button("generate").click()
        second.page.locator("#answer").get_by_text("queue: 1/1").wait_for()
        third.button("generate").click()
        third.is_told("too many others are waiting")
        third.tab("Cycles")
        third.number("Cycle", 2)
        third.page.locator("#cycle .taps-cycle[data-cycle='2']").wait_for()
        going_on.set()
        for someone in (first, second):
            someone.wait_for_the_end("generate")
            assert someone.answer() == plain_answer(tiny_spec, "t5 t6", 20)
        third.tab("Generate")
        third.is_told("too many others are waiting")  # still: it is no message that goes away
        third.ask("t7")
        assert third.generate() == plain_answer(tiny_spec, "t7", 10)
        assert third.page.locator(".taps-notice").filter(visible=True).count() == 0
    finally:
        page.close()


def look_at_every_view(visitor: Visitor, folder, name: str) -> None:
    """With an answer there: nothing is wider than the screen. Takes pictures on request."""

    def look(view: str) -> None:
        visitor.fits_the_screen()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            visitor.page.wait_for_timeout(500)  # until nothing moves any more
            visitor.page.screenshot(path=folder / f"{name}-{view}.png", full_page=True)

    visitor.generate()
    visitor.page.locator("#answer .tok:not(.own)").nth(2).hover()
    look("generate")
    visitor.tab("Cycles")
    visitor.page.locator("#cycle svg:visible").wait_for()
    look("cycles")
    visitor.tab("Charts")
    visitor.page.wait_for_function(
        """(width) => {
            const charts = [...document.querySelectorAll(".taps-chart svg.marks")];
            return charts.length == 4 && charts.every((c) => c.clientWidth > width);
        }""",
        arg=0.6 * min(800, visitor.page.viewport_size["width"]),
    )
    look("charts")
    visitor.tab("Compare")
    visitor.start("compare")
    visitor.wait_for_the_end("compare")
    look("compare")


@pytest.mark.parametrize("width", [1280, 390])
def test_every_view_fits_the_screen(open_page, url, width, request):
    visitor = open_page(url, width)
    visitor.ask("t5 t6 t7", "merged", Length=40, Tree_nodes=60, Tree_depth=6)
    look_at_every_view(visitor, request.config.getoption("--screenshots"), f"tiny-{width}")
    assert visitor.errors == []


def test_nothing_of_a_model_runs(open_page, tmp_path):
    """A model that writes markup, scripts and templates only, and is asked to in these words."""
    arguments = save_tiny_models(tmp_path)
    hostile_tokenizer().save_pretrained(tmp_path / "target")
    drafters = [
        f"<script>alert({i})</script>={tmp_path / name}" for i, name in enumerate(("math", "chat"))
    ]
    page = serve(PageOptions(ModelSpec.parse(arguments[1], drafters)), wait=False)
    try:
        visitor = open_page(page.local_url)
        visitor.page.on("dialog", lambda dialog: visitor.errors.append(dialog.message))
        visitor.ask(" ".join(hostile_tokenizer().get_vocab()), "merged", Length=40)
        look_at_every_view(visitor, None, "hostile")
        shown = visitor.page.locator("#answer, #legend, #cycle, #comparison, .taps-models")
        assert shown.locator("script, img, iframe, [onload], [onerror]").count() == 0
        assert "<script>alert(" in visitor.page.locator("#comparison").inner_text()
        visitor.unfold("Other models")
        visitor.page.get_by_label("Target").fill("<img src=x onerror=alert(9)>")
        visitor.button("load").click()
        visitor.is_told("could not be loaded from '<img src=x onerror=alert(9)>'")
        assert visitor.errors == []
    finally:
        page.close()


def test_a_drafter_of_another_kind(open_page, tiny_spec, monkeypatch):
    """The page knows drafters by their names, and what they proposed by the trees."""
    right = load_models(tiny_spec)
    ids = right.encode("t5 t6")["input_ids"]
    answer = right.target.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()
    load = demo_models.load_drafter

    def load_either(path, *args, **kwargs):
        return Phrases(answer) if path == "by heart" else load(path, *args, **kwargs)

    monkeypatch.setattr(demo_models, "load_drafter", load_either)
    spec = replace(tiny_spec, drafters=(*tiny_spec.drafters, ("heart", "by heart")))
    page = serve(PageOptions(spec), wait=False)
    try:
        visitor = open_page(page.local_url)
        expected = plain_answer(tiny_spec, "t5 t6", 20)
        for strategy in list_strategies():
            visitor.ask("t5 t6", strategy, Length=20)
            assert visitor.generate() == expected
        visitor.ask(strategy="merged")
        look_at_every_view(visitor, None, "heart")
        verdicts = visitor.page.locator("#comparison .verdict").all_inner_texts()
        assert all("equal to plain generate, all" in verdict for verdict in verdicts[1:])
        visitor.tab("Generate")
        assert visitor.page.locator("#answer .tok.d2, #answer .tok.several").count() > 10
        assert "heart" in visitor.page.inner_text("#legend")
        assert visitor.errors == []
    finally:
        page.close()


@pytest.mark.real
def test_the_real_models(open_page, request, load_real, monkeypatch):
    """With the drafters of hub_cards/: both take part, and every variant writes the same text."""
    monkeypatch.setattr("taps_hf.loading.load_embedded_target", load_real)
    folder = request.config.getoption("--screenshots")
    cards = Path(__file__).resolve().parents[2] / "hub_cards"
    drafters = [f"{name}={cards / path}" for name, path in EMBEDDED_DRAFTERS.items()]
    limits = Limits(seconds=300.0, comparison_seconds=1800.0)  # whatever else the machine does
    page = serve(PageOptions(ModelSpec.parse(default_target(), drafters), limits), wait=False)
    try:
        for width in (1280,) if folder is None else (1280, 390):
            visitor = open_page(page.local_url, width)
            visitor.example("Mixture: a school trip")
            visitor.ask(strategy="merged", Length=12 if folder is None else 56)
            look_at_every_view(visitor, folder, f"real-{width}")
            text = visitor.page.locator("#answer .tok:not(.own)")
            assert text.count() >= 4
            verdicts = visitor.page.locator("#comparison .verdict").all_inner_texts()
            assert all("equal to plain generate, all" in verdict for verdict in verdicts[1:])
            assert visitor.errors == []
    finally:
        page.close()
