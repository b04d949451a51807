"""The page: its layout, and which event belongs to which part."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from ..strategies import get_strategy, list_strategies
from . import events, palette, rendering
from .charts import CHARTS
from .gate import BodyLimit
from .models import ModelSpec, load_models
from .prompts import EXAMPLES
from .settings import Limits
from .tree_drawing import cycle_html

TITLE = "Drafters at work"
_INTRODUCTION = """
# Drafters at work
A large *target* model writes; small *drafters* guess ahead, each trained for its kind of text. The
target checks all their guesses in one pass and keeps those it would have written anyway, so the
answer is its own, in fewer passes. Here you see whose guesses it keeps.
"""
_MINUTE = 60
_KEPT = 60 * _MINUTE  # how long an idle visitor's last answer is kept
_ESCAPED = 12  # bytes of one character in JSON, at most
_FORM = 2**16  # bytes of a request beside the prompt, at most
_STRATEGY = "auto"  # the default, as everywhere else

# What happens in the browser alone: at once, whatever the server is busy with.
_PRESSED = "() => [{__type__: 'update', interactive: false}]"
_ENDED = "() => [{__type__: 'update', interactive: true}, {__type__: 'update', interactive: false}]"
_REFUSED = rendering.notice_html(
    "This was not taken: too many others are waiting, the prompt is far too long, or the server "
    "cannot be reached. Try again in a while."
)


@dataclass(frozen=True)
class PageOptions:
    """How the page is served.

    Args:
        models: the models it starts with.
        limits: of one request.
        concurrency: answers written at once; others wait in the queue.
        queue_size: requests that may wait; more are turned away with a message.
        choose_models: whether visitors may load other models. They name folders of the server.
    """

    models: ModelSpec
    limits: Limits = field(default_factory=Limits)
    concurrency: int = 1
    queue_size: int = 16
    choose_models: bool = True

    def __post_init__(self) -> None:
        numbers = {**vars(self.limits), "concurrency": self.concurrency, "queue": self.queue_size}
        for name, value in numbers.items():
            if value <= 0:
                raise ValueError(f"The limit {name.replace('_', ' ')} is {value}, expected more.")


def serve(
    options: PageOptions, host: str | None = None, port: int | None = None, wait: bool = True
) -> gr.Blocks:
    """Load the models and serve the page.

    Args:
        options: what is served.
        host: address to listen on; None for this machine only (on a Space: for everybody).
        port: None for the first free one from 7860.
        wait: return only when it is interrupted.

    Raises:
        ValueError: if the models cannot be loaded.
        OSError: if the port is taken.
    """
    page = build_page(options)
    largest = _ESCAPED * options.limits.prompt_characters + _FORM
    page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not wait,
        css=palette.stylesheet() + resources.files(__package__).joinpath("style.css").read_text(),
        # Fonts that every machine has: others would be fetched, and drawn in fewer weights.
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        footer_links=["gradio", "settings"],
        state_session_capacity=200,
        max_file_size=1,  # byte: nothing here is uploaded
        app_kwargs={"middleware": [Middleware(BodyLimit, most=largest)]},
        ssr_mode=False,
    )
    return page


def build_page(options: PageOptions) -> gr.Blocks:
    """The page; [`serve`] serves it with its style."""
    load_models(options.models)
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        spec = gr.State(options.models)
        answer = gr.State(None, time_to_live=_KEPT)
        comparison = gr.State(None, time_to_live=_KEPT)
        gr.Markdown(_INTRODUCTION)
        heading = gr.HTML(events.models_html(options.models))
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                inputs = _inputs(options)
                if options.choose_models:
                    _models(options, spec, heading, inputs[1])
            with gr.Column(scale=2, min_width=320), gr.Tabs():
                with gr.Tab("Generate"):
                    started = _generate_tab(options, spec, answer, inputs)
                with gr.Tab("Compare"):
                    _compare_tab(options, spec, comparison, inputs)
                with gr.Tab("Cycles"):
                    started = _cycle_tab(answer, started)
                with gr.Tab("Charts"):
                    _charts_tab(answer, started)
    # Gradio notes every event and, at the end of each, makes statistics of the last 10,000 that
    # nobody here reads: memory that grows for days, and a table built anew for every answer.
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000")
    # Only what runs or loads models queues, and there is no other way to it. Looking at an answer
    # goes on in whatever crowd.
    return page.queue(max_size=options.queue_size, api_open=False)


def _inputs(options: PageOptions) -> list[Any]:
    """What every request takes, in the order that `events` takes it."""
    limits, names = options.limits, [name for name, _ in options.models.drafters]
    prompt = gr.Textbox(
        label="Prompt",
        lines=4,
        max_lines=12,
        value=next(iter(EXAMPLES.values())),
        elem_id="prompt",
    )
    with gr.Row(elem_classes="taps-examples"):
        for name, text in EXAMPLES.items():
            # Not gr.Examples: its texts come from the server, late, over what was typed since.
            gr.Button(name, size="sm", min_width=0).click(
                None, None, prompt, js=f"() => {json.dumps(text)}", api_visibility="private"
            )
    drafters = gr.CheckboxGroup(names, value=names, label="Drafters", elem_id="drafters")
    strategy = gr.Dropdown(
        list(list_strategies()),
        value=_STRATEGY,
        label="Strategy",
        info=_in_a_line(_STRATEGY),
        elem_id="strategy",
    )
    strategy.change(
        lambda name: gr.Dropdown(info=_in_a_line(name)),
        strategy,
        strategy,
        show_progress="hidden",
        queue=False,
        api_visibility="private",
    )
    with _unfolding("Temperature, length, trees"):
        with gr.Row():
            temperature = gr.Slider(
                0, 2, value=0, step=0.1, label="Temperature", info="0: greedy", min_width=140
            )
            seed = gr.Number(0, label="Seed", info="of sampling", min_width=140, elem_id="seed")
        length = gr.Slider(
            1,
            limits.new_tokens,
            value=min(96, limits.new_tokens),
            step=1,
            label="Length",
            info="most tokens of an answer",
            elem_id="length",
        )
        with gr.Row():
            depth = gr.Slider(
                1,
                limits.depth,
                value=min(4, limits.depth),
                step=1,
                label="Tree depth",
                min_width=140,
            )
            nodes = gr.Slider(
                1,
                limits.num_nodes,
                value=min(12, limits.num_nodes),
                step=1,
                label="Tree nodes",
                info="of each drafter",
                min_width=140,
                elem_id="nodes",
            )
    return [prompt, drafters, strategy, temperature, seed, length, depth, nodes]


@contextmanager
def _unfolding(title: str) -> Iterator[None]:
    """A part of the form that is shown when its box is ticked; the stylesheet does that.

    What a gr.Accordion holds is made when it is opened, and set to its first value once more a
    frame later, over what was typed by then. Here everything is there from the start.
    """
    with gr.Column(elem_classes="taps-unfolding"):
        gr.Checkbox(label=title, container=False, interactive=True, elem_classes="taps-unfold")
        with gr.Column(elem_classes="taps-folded"):
            yield


def _in_a_line(strategy: str) -> str:
    """The first line of a strategy's documentation."""
    return inspect.getdoc(get_strategy(strategy)).partition("\n")[0]


def _models(options: PageOptions, spec: gr.State, heading: gr.HTML, drafters: Any) -> None:
    with _unfolding("Other models"):
        target = gr.Textbox(
            options.models.target, label="Target", info="folder, Hub name, or: embedded"
        )
        paths = gr.Textbox(
            "\n".join(f"{name}={path}" for name, path in options.models.drafters),
            label="Drafters",
            info="a line each: NAME=folder or Hub name",
            lines=3,
        )
        load = gr.Button("Load", elem_id="load")
        notice = gr.HTML(elem_classes="taps-slot")
        load.click(
            events.choose_models,
            [spec, target, paths],
            [spec, notice, heading, drafters],
            concurrency_limit=1,
            api_visibility="private",
        )


def _generate_tab(options: PageOptions, spec: gr.State, answer: gr.State, inputs: list[Any]) -> Any:
    with gr.Row():
        start = gr.Button("Generate", variant="primary", min_width=100, elem_id="generate")
        stop = gr.Button("Stop", interactive=False, min_width=100, elem_id="stop-generate")
    notice = gr.HTML(elem_classes="taps-slot")
    figures = gr.HTML(rendering.figures_html(None), elem_id="figures")
    legend = gr.HTML(rendering.legend_html(None), elem_id="legend")
    text = gr.HTML(rendering.answer_html(None), elem_id="answer")
    outputs = [answer, notice, text, figures, legend, stop]
    return _run(options, events.generate, (start, stop), answer, [spec, *inputs], outputs)


def _compare_tab(
    options: PageOptions, spec: gr.State, comparison: gr.State, inputs: list[Any]
) -> None:
    gr.Markdown(
        "The same prompt by plain `generate`, by each ticked drafter alone, and by all of them "
        "with each strategy. The texts are compared token for token. Times are of single runs."
    )
    with gr.Row():
        start = gr.Button("Compare", variant="primary", min_width=100, elem_id="compare")
        stop = gr.Button("Stop", interactive=False, min_width=100, elem_id="stop-compare")
    notice = gr.HTML(elem_classes="taps-slot")
    cards = gr.HTML(elem_id="comparison")
    outputs = [comparison, notice, cards, stop]
    _run(options, events.compare, (start, stop), comparison, [spec, *inputs], outputs)


def _run(
    options: PageOptions,
    event: Any,
    buttons: tuple[gr.Button, gr.Button],
    running: gr.State,
    inputs: list[Any],
    outputs: list[Any],
) -> Any:
    """Bind a start and a stop button. Everything that runs models shares one queue.

    The start button rests from the press until all of the answer is shown: meanwhile gradio would
    ignore it. The second of `outputs` is the notice.
    """
    start, stop = buttons
    in_browser = {"fn": None, "inputs": None, "api_visibility": "private"}
    stop.click(events.stop, running, None, queue=False, api_visibility="private")
    start.click(**in_browser, outputs=start, js=_PRESSED)
    started = start.click(
        functools.partial(event, options.limits),
        inputs,
        outputs,
        concurrency_limit=options.concurrency,
        concurrency_id="models",
        show_progress="minimal",
        api_visibility="private",
    )
    started.then(**in_browser, outputs=[start, stop], js=_ENDED)
    # gradio says why in a message that goes away; this stays until the next answer.
    refused = f"() => [{json.dumps(_REFUSED)}, ...({_ENDED})()]"
    started.failure(**in_browser, outputs=[outputs[1], start, stop], js=refused)
    return started


def _cycle_tab(answer: gr.State, started: Any) -> Any:
    slider = gr.Slider(
        1, 2, value=1, step=1, label="Cycle", interactive=False, elem_id="cycle-slider"
    )
    drawing = gr.HTML(cycle_html(None, 1), elem_id="cycle")
    slider.change(
        events.show_cycle,
        [answer, slider],
        drawing,
        show_progress="hidden",
        queue=False,
        api_visibility="private",
    )
    return started.then(
        events.show_cycles, answer, [slider, drawing], queue=False, api_visibility="private"
    )


def _charts_tab(answer: gr.State, started: Any) -> None:
    gr.Markdown("Charts of the last answer appear here when it has ended.")
    plots = [gr.Plot(show_label=False, elem_classes="taps-chart") for _ in CHARTS]
    started.then(events.show_charts, answer, plots, queue=False, api_visibility="private")
