"""Charts of one answer, drawn by Altair from its trace."""

from __future__ import annotations

from typing import Any

import altair as alt

from . import palette
from .answer import Answer

_BINS = 10
_ACCEPTED, _REJECTED = "#0072B2", "#D55E00"


def accepted_length_chart(answer: Answer) -> alt.LayerChart:
    """Accepted length of every cycle, in the order of the answer, and its running mean."""
    total, rows = 0, []
    for number, cycle in enumerate(answer.trace.cycles, start=1):
        total += cycle.accepted_length
        rows.append({"cycle": number, "accepted": cycle.accepted_length, "mean": total / number})
    base = alt.Chart(alt.InlineData(values=rows)).encode(_cycles())
    longest = max((row["accepted"] for row in rows), default=0)
    title, whole = "draft tokens accepted", alt.Axis(values=list(range(longest + 1)), format="d")
    bars = base.mark_bar(color=palette.COLOURS[3]).encode(
        y=alt.Y("accepted:Q", title=title, axis=whole),
        tooltip=[alt.Tooltip("cycle:Q"), alt.Tooltip("accepted:Q", title="accepted")],
    )
    line = base.mark_line(color=palette.COLOURS[4], strokeWidth=2.5).encode(
        y=alt.Y("mean:Q", title=title, axis=whole),
        tooltip=[alt.Tooltip("cycle:Q"), alt.Tooltip("mean:Q", title="mean so far", format=".2f")],
    )
    return _finish(bars + line, "Accepted length over the answer", "line: the mean so far")


def depth_chart(answer: Answer) -> alt.LayerChart:
    """Of the cycles that accepted depth d - 1, the share that accepted a token at depth d."""
    rows = [{"depth": d, "share": share} for d, share in answer.trace.acceptance_by_depth.items()]
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("depth:O", title="depth", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("share:Q", title="accepted", scale=alt.Scale(domain=[0, 1]), axis=_percent()),
        tooltip=[alt.Tooltip("depth:O"), alt.Tooltip("share:Q", title="accepted", format=".0%")],
    )
    text = base.mark_text(dy=-7, fontSize=13).encode(text=alt.Text("share:Q", format=".0%"))
    return _finish(
        base.mark_bar(color=_ACCEPTED) + text,
        "Acceptance by depth",
        "of the cycles that got to the depth before",
    )


def confidence_chart(answer: Answer) -> alt.Chart:
    """Distributions of c(v) over accepted nodes and over those the target rejected.

    Nodes below a rejected one were never judged and are left out. A node of several drafters counts
    with the surest.
    """
    counts = {"accepted": [0] * _BINS, "rejected": [0] * _BINS}
    for cycle in answer.trace.cycles:
        sure = cycle.tree.confidence.nan_to_num(nan=-1.0).amax(dim=0).tolist()
        for verdict, confidence in list(zip(cycle.verdicts, sure))[1:]:
            if verdict in counts:
                counts[verdict][min(_BINS - 1, int(confidence * _BINS))] += 1
    rows: list[dict[str, Any]] = []
    for status, bins in counts.items():
        for i, n in enumerate(bins):
            span = f"{i / _BINS:.1f}\u2013{(i + 1) / _BINS:.1f}"
            share = n / max(1, sum(bins))
            rows.append({"confidence": span, "nodes": n, "share": share, "status": status})
    chart = alt.Chart(alt.InlineData(values=rows)).mark_bar(stroke="currentColor", strokeWidth=0.5)
    chart = chart.encode(
        x=alt.X("confidence:O", title="node confidence", axis=alt.Axis(labelAngle=-45)),
        xOffset="status:N",
        y=alt.Y("share:Q", title="share of its kind", axis=_percent()),
        color=alt.Color(
            "status:N",
            title=None,
            scale=alt.Scale(domain=list(counts), range=[_ACCEPTED, _REJECTED]),
            legend=alt.Legend(orient="top"),
        ),
        tooltip=["status:N", "confidence:O", "nodes:Q", alt.Tooltip("share:Q", format=".0%")],
    )
    return _finish(chart, "Confidence of accepted and rejected nodes", "left bar: accepted")


def routing_chart(answer: Answer) -> alt.LayerChart:
    """Which drafters' proposals were verified in each cycle, and how many of theirs accepted."""
    names, rows = list(answer.trace.drafters), []
    colours = [palette.colour(i) for i in answer.look(range(len(names)))]
    for number, cycle in enumerate(answer.trace.cycles, start=1):
        for drafter in cycle.drafters:
            accepted = sum(drafter in token.drafters for token in cycle.emitted)
            rows.append({"cycle": number, "drafter": names[drafter], "accepted": accepted})
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        _cycles(),
        y=alt.Y("drafter:N", title=None, sort=names, scale=alt.Scale(domain=names)),
        tooltip=["cycle:Q", "drafter:N", alt.Tooltip("accepted:Q", title="its tokens accepted")],
    )
    verified = base.mark_tick(thickness=1.5, size=26, color=palette.OWN)
    accepted = base.mark_circle(opacity=1).encode(
        size=alt.Size("accepted:Q", scale=alt.Scale(range=[0, 220]), legend=None),
        color=alt.Color(
            "drafter:N",
            scale=alt.Scale(domain=names, range=colours),
            legend=None,
        ),
    )
    return _finish(
        verified + accepted,
        "Routing along the answer",
        "tick: verified; dot: tokens accepted, the larger the more",
    )


CHARTS = (accepted_length_chart, depth_chart, confidence_chart, routing_chart)


def _cycles() -> alt.X:
    return alt.X(
        "cycle:Q", title="cycle", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(nice=False)
    )


def _percent() -> alt.Axis:
    return alt.Axis(format="%")


def _finish(chart: Any, title: str, subtitle: str) -> Any:
    """What all charts share: as wide as the page lets them be, and SVG, which its style reaches."""
    return (
        chart.properties(
            width="container",
            height=240,
            title=alt.TitleParams(title, subtitle=subtitle, anchor="start"),
            usermeta={"embedOptions": {"renderer": "svg", "actions": False}},
        )
        .configure(
            autosize=alt.AutoSizeParams(type="fit", contains="padding"), background="transparent"
        )
        .configure_axis(labelFontSize=12, titleFontSize=12, titleFontWeight="normal")
        .configure_legend(labelFontSize=12)
    )
