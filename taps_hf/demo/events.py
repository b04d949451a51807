"""What happens when a visitor presses something; generators yield states of the page."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..embedded import EMBEDDED_TARGET
from ..loading import EMBEDDED
from . import rendering
from .answer import Answer
from .charts import CHARTS
from .models import ModelSpec, load_models
from .settings import Limits, check_request, check_variant, compared_variants
from .tree_drawing import cycle_html

_logger = logging.getLogger(__name__)
_PAUSE = 0.15  # seconds between two states of the page: more would only load the network


def generate(limits: Limits, spec: ModelSpec, *inputs: Any) -> Iterator[list[Any]]:
    """Write one answer. Outputs: answer, notice, answer, figures, legend as HTML, stop button."""
    answer = None
    try:
        prompt, drafters, strategy, *values = inputs
        variant = check_variant(spec, drafters, strategy)
        answer = Answer(check_request(spec, limits, prompt, *values), variant, threading.Event())
        yield _generated(answer)
        for _ in _spaced(answer.write()):
            yield _generated(answer)
        yield _generated(answer)
    except Exception as error:
        figures = gr.skip()
        if answer is not None:
            answer.ended = "failed"
            figures = rendering.figures_html(answer)
        yield [gr.skip(), _failure(error), gr.skip(), figures, gr.skip(), _stop_button(False)]


def _generated(answer: Answer) -> list[Any]:
    return [
        answer,
        "",
        rendering.answer_html(answer),
        rendering.figures_html(answer),
        rendering.legend_html(answer),
        _stop_button(answer.ended is None),
    ]


def compare(limits: Limits, spec: ModelSpec, *inputs: Any) -> Iterator[list[Any]]:
    """Answer by every variant in turn. Outputs: what stops it, notice, cards, stop button."""
    try:
        prompt, drafters, strategy, *values = inputs
        variants = compared_variants(check_variant(spec, drafters, strategy))
        request = check_request(spec, limits, prompt, *values)
        request = replace(request, seconds=limits.comparison_seconds / len(variants))
        stop, answers = threading.Event(), []
        for variant in variants:
            answers.append(Answer(request, variant, stop))
            for _ in _spaced(answers[-1].write()):
                yield [stop, "", rendering.comparison_html(answers), _stop_button(True)]
            if stop.is_set():
                break
        yield [stop, "", rendering.comparison_html(answers), _stop_button(False)]
    except Exception as error:
        yield [gr.skip(), _failure(error), gr.skip(), _stop_button(False)]


def stop(running: Answer | threading.Event | None) -> None:
    """End an answer or a comparison; what has been written stays."""
    if isinstance(running, Answer):
        running.stop.set()
    elif running is not None:
        running.set()


def show_cycles(answer: Answer | None) -> list[Any]:
    """After an answer: the slider over its cycles, and the first of them with a draft accepted."""
    cycles = answer.trace.cycles if answer else []
    lengths = [cycle.accepted_length for cycle in cycles]
    number = lengths.index(max(lengths)) + 1 if lengths else 1
    slider = gr.Slider(maximum=max(2, len(cycles)), value=number, interactive=len(cycles) > 1)
    return [slider, cycle_html(answer, number)]


def show_cycle(answer: Answer | None, number: float | None) -> str:
    """The cycle that the slider stands at."""
    return cycle_html(answer, int(number or 1))


def show_charts(answer: Answer | None) -> list[Any]:
    """After an answer: its charts."""
    if answer is None or not answer.trace.cycles:
        return [None for _ in CHARTS]
    return [chart(answer) for chart in CHARTS]


def choose_models(spec: ModelSpec, target: str, drafters: str) -> list[Any]:
    """Load other models for this visitor. Outputs: specification, notice, heading, drafters."""
    try:
        lines = [line for line in (drafters or "").splitlines() if line.strip()]
        chosen = ModelSpec.parse(target or "", lines, spec.dtype, spec.device)
        load_models(chosen)
    except Exception as error:
        return [gr.skip(), _failure(error), gr.skip(), gr.skip()]
    names = [name for name, _ in chosen.drafters]
    said = rendering.notice_html("Loaded. New answers are written by these models.", "good")
    return [chosen, said, models_html(chosen), gr.CheckboxGroup(choices=names, value=names)]


def models_html(spec: ModelSpec) -> str:
    """Which models answer."""
    drafters = ", ".join(f"<b>{escape(name)}</b>" for name, _ in spec.drafters)
    # Of a folder only its own name: where it lies on the server is nobody's business.
    target = Path(spec.target).name if Path(spec.target).is_dir() else spec.target
    target = escape(EMBEDDED_TARGET if target == EMBEDDED else target)
    return (
        f'<p class="taps-models">Target: <b>{target}</b> in {escape(spec.dtype)} on '
        f"{escape(spec.device)}. Drafters: {drafters}.</p>"
    )


def _spaced(states: Iterator[None]) -> Iterator[None]:
    """At most one state every `_PAUSE` seconds; closing this closes `states`."""
    last = 0.0
    try:
        for state in states:
            if time.perf_counter() - last >= _PAUSE:
                last = time.perf_counter()
                yield state
    finally:
        states.close()


def _stop_button(running: bool) -> gr.Button:
    return gr.Button(interactive=running)


def _failure(error: Exception) -> str:
    """What a visitor is told. Anything but a refusal also goes to the log, with its traceback."""
    if isinstance(error, ValueError):
        return rendering.notice_html(str(error))
    _logger.error("A request failed.", exc_info=error)
    return rendering.notice_html(
        f"This did not work ({type(error).__name__}). Try a shorter prompt, a shorter answer or a "
        "smaller tree; if that does not help, the log of the server says more."
    )
