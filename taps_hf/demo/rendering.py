"""Answers as HTML. Every text of a model or a visitor is escaped here."""

from __future__ import annotations

from collections import Counter
from html import escape

from ..trace import EmittedToken, first_difference
from . import palette
from .answer import Answer

_WRITING = "being written\u2026"


def notice_html(message: str, kind: str = "error") -> str:
    """A message in the page: what is wrong and what to do, or how an answer ended."""
    if not message:
        return ""
    role = "alert" if kind == "error" else "status"
    return f'<div class="taps-notice {kind}" role="{role}">{escape(message)}</div>'


def answer_html(answer: Answer | None) -> str:
    """The answer with every token coloured by origin; hovering or tapping tells the rest."""
    if answer is None:
        text = '<div class="text empty">The answer appears here.</div>'
        return f'<div class="taps-answer">{text}</div>'
    return (
        f'<div class="taps-answer" data-number="{answer.number}">'
        f'<div class="text">{_tokens(answer)}</div></div>'
    )


def _tokens(answer: Answer) -> str:
    spans, last = [], 0
    for (cycle, token), piece in zip(answer.emitted(), answer.pieces):
        css = palette.css_class(answer.look(token.drafters)) + " first" * (cycle != last)
        last = cycle
        tip = escape(_tip(answer, cycle, token))
        spans.append(
            f'<span class="tok {css}" tabindex="-1" data-tip="{tip}">{escape(piece)}</span>'
        )
    return "".join(spans)


def _tip(answer: Answer, cycle: int, token: EmittedToken) -> str:
    shown = f"\u201c{answer.label(token.token)}\u201d"
    if not cycle:
        return f"{shown}: the target's own"
    if token.depth is None:
        return f"{shown}: the target's own, the last token of cycle {cycle}"
    by = ", ".join(
        f"{answer.trace.drafters[i]} with confidence {c:.3f}"
        for i, c in zip(token.drafters, token.confidence)
    )
    return f"{shown}: proposed by {by}; depth {token.depth} of cycle {cycle}'s tree"


def legend_html(answer: Answer | None) -> str:
    """Whose tokens the answer's are: what the colours and lines mean, with counts and shares."""
    if answer is None or not answer.variant.drafters:
        return ""
    names = answer.trace.drafters
    counts = Counter(token.drafters for _, token in answer.emitted())
    origins = [(i,) for i in range(len(names))]
    origins += sorted(o for o in counts if len(o) > 1) + [()]
    total = len(answer.tokens)
    items, bars = [], []
    for origin in origins:
        css, words = palette.css_class(answer.look(origin)), escape(palette.label(origin, names))
        share = counts[origin] / total if total else 0.0
        items.append(
            f'<li><span class="tok {css}">{words}</span> {counts[origin]} ({share:.0%})</li>'
        )
        bars.append(f'<i class="{css}" style="width:{share:.2%}" title="{words} {share:.0%}"></i>')
    return (
        f'<div class="taps-legend"><div class="bar" aria-hidden="true">{"".join(bars)}</div>'
        f"<ul>{''.join(items)}</ul></div>"
    )


def figures_html(answer: Answer | None) -> str:
    """The live figures."""
    if answer is None:
        return ""
    tau = f"{answer.trace.tau:.2f}" if answer.trace.cycles else "\u2013"
    plain = len(answer.tokens)
    figures = [
        ("tau", tau, "tokens per target pass, the prompt's pass not counted"),
        ("tokens per second", f"{answer.tokens_per_second:.1f}", "on this machine, now"),
        (
            "target passes saved",
            f"{max(0, answer.passes_saved)}",
            f"{answer.passes} passes, where plain generate makes {plain}",
        ),
        ("tokens", str(plain), answer.ended or _WRITING),
    ]
    cells = "".join(
        f'<div><dt>{name}</dt><dd data-figure="{name}">{value}</dd><small>{note}</small></div>'
        for name, value, note in figures
    )
    return f'<dl class="taps-figures">{cells}</dl>'


def comparison_html(answers: list[Answer]) -> str:
    """Cards side by side: the first is plain `generate`, with which the others are compared."""
    cards = "".join(_card(answer, answers[0]) for answer in answers)
    return f'<div class="taps-cards">{cards}</div>'


def _card(answer: Answer, plain: Answer) -> str:
    tau = f"{answer.trace.tau:.2f}" if answer.trace.cycles else "1"
    verdict, kind = ("the reference", "plain") if answer is plain else _verdict(answer, plain)
    rows = [
        ("target passes", str(answer.passes)),
        ("tau", tau),
        ("time", f"{answer.seconds:.1f} s"),
        ("tokens", f"{len(answer.tokens)}, {answer.ended or _WRITING}"),
    ]
    table = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    share = min(1.0, answer.passes / max(1, len(answer.tokens)))
    bar = f'<i style="width:{share:.1%}"></i>'
    return (
        f'<section class="card" data-variant="{escape(answer.variant.name)}">'
        f"<h4>{escape(answer.variant.name)}</h4>"
        f'<p class="verdict {kind}">{escape(verdict)}</p>'
        f'<div class="passes" title="target passes per token">{bar}</div>'
        f"<dl>{table}</dl>{answer_html(answer)}</section>"
    )


def _verdict(answer: Answer, plain: Answer) -> tuple[str, str]:
    """Whether an answer is plain `generate`'s, token for token, and where they part."""
    if answer.ended is None:
        return _WRITING, "running"
    at = first_difference(plain.tokens, answer.tokens)
    if at is None:
        return f"\u2713 equal to plain generate, all {len(plain.tokens)} tokens", "equal"
    if at == min(len(plain.tokens), len(answer.tokens)) and not (
        answer.ran_to_its_end and plain.ran_to_its_end
    ):
        return f"the first {at} tokens are equal; one of the two was ended early", "running"
    sides = [
        answer_.label(answer_.tokens[at]) if at < len(answer_.tokens) else "(the end)"
        for answer_ in (plain, answer)
    ]
    return (
        f"\u2717 differs from token {at + 1} on: plain \u201c{sides[0]}\u201d, "
        f"here \u201c{sides[1]}\u201d",
        "differs",
    )
