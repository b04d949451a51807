"""The draft tree of a cycle, drawn as SVG.

Two drawings of the same tree go into the page, and its stylesheet shows one of them: on a wide
screen depth runs to the right and the accepted path straight along the top; on a narrow one every
node has a row of its own, indented by depth, so that no text need be made smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from ..trace import CycleTrace
from . import palette
from .answer import Answer

_ROW = 28  # height of a row
_BOX = 22  # height of a node
_GAP = 26  # between columns of the wide drawing
_INDENT = 16  # a level of the narrow drawing
_CHARACTER = 7.3  # width of a character of the node's font
_LONGEST = 14  # characters of a token shown; its tooltip has them all


@dataclass
class _Node:
    """A node to draw. `status`: root, accepted, rejected, unreached, or target (no node at all)."""

    text: str
    status: str
    drafters: tuple[int, ...]  # as the palette knows them
    note: str
    tip: str
    sureness: float
    children: list[_Node]
    x: float = 0.0
    y: float = 0.0

    @property
    def on_path(self) -> bool:
        return self.status in ("root", "accepted", "target")

    @property
    def width(self) -> float:
        return 18 + _CHARACTER * (len(self.text) + 1.6 * len(self.drafters) + len(self.note) + 1)


def cycle_html(answer: Answer | None, number: int) -> str:
    """One cycle in words and drawn, `number` from 1."""
    if answer is None or not answer.trace.cycles:
        return (
            '<p class="taps-empty">Nothing to look into yet: generate an answer with drafters, '
            "then move the slider over its cycles.</p>"
        )
    number = min(max(1, number), len(answer.trace.cycles))
    cycle = answer.trace.cycles[number - 1]
    root = _nodes(answer, cycle)
    return (
        f'<div class="taps-cycle" data-cycle="{number}"><p>{_in_words(answer, cycle, number)}</p>'
        f"{_legend(answer)}"
        f'<div class="wide">{_svg(root, _place_wide(root), number)}</div>'
        f'<div class="narrow">{_svg(root, _place_narrow(root), number)}</div></div>'
    )


def _in_words(answer: Answer, cycle: CycleTrace, number: int) -> str:
    names = answer.trace.drafters
    of = f"<b>Cycle {number} of {len(answer.trace.cycles)}.</b>"
    own = cycle.emitted[len(cycle.path) :]
    went = (
        f" Then the target said <b>{_quoted(answer.label(own[0].token))}</b> itself."
        if own
        else " The answer ended there."
    )
    if not cycle.drafters:
        return f"{of} Nothing was drafted.{went}"
    both = sum(len(cycle.tree.proposers(i)) > 1 for i in range(1, len(cycle.tree)))
    by = escape(" and ".join(names[i] for i in cycle.drafters))
    shared = f", {both} of them proposed by several" if len(cycle.drafters) > 1 else ""
    accepted = "".join(answer.label(token.token) for token in cycle.emitted[: len(cycle.path)])
    said = f": <b>{_quoted(accepted)}</b>" if accepted else ""
    return (
        f"{of} The target checked {cycle.num_nodes} nodes by {by}{shared}, and accepted "
        f"{cycle.accepted_length}{said}.{went}"
    )


def _legend(answer: Answer) -> str:
    marks = "".join(
        f'<li class="{palette.css_class((i,))}"><span>{palette.mark(i)}</span> {escape(name)}</li>'
        for i, name in zip(answer.look(range(len(answer.trace.drafters))), answer.trace.drafters)
    )
    return (
        f'<ul class="marks">{marks}<li>thick: accepted</li><li>thin: rejected</li>'
        "<li>faint: never looked at</li><li>dashed: the target's own</li>"
        "<li>numbers: confidence</li></ul>"
    )


def _nodes(answer: Answer, cycle: CycleTrace) -> _Node:
    """The tree as nested nodes: the accepted child first, then the surest."""
    tree, names = cycle.tree, answer.trace.drafters
    nodes: list[_Node] = []
    verdicts = ["root", *cycle.verdicts[1:]]
    for i, (token, parent) in enumerate(zip(tree.tokens.tolist(), tree.parents.tolist())):
        status, by = verdicts[i], tree.proposers(i) if i else ()
        confidence = tree.confidence[list(by), i].tolist()
        label = answer.label(token)
        tip = f"{_quoted(label, as_html=False)}: "
        if i:
            sure = ", ".join(f"{names[d]} with confidence {c:.3f}" for d, c in zip(by, confidence))
            value = max(tree.path_confidence[list(by), i].tolist())
            tip += f"proposed by {sure}; path confidence {value:.3f}; depth {tree.depths[i]}; "
            tip += status if status != "unreached" else "never looked at"
        else:
            tip += "the last token before this cycle, the root"
        note = _confidence(max(confidence)) if i else ""
        node = _Node(
            _short(label), status, answer.look(by), note, tip, max(confidence, default=0.0), []
        )
        nodes.append(node)
        if i:
            nodes[parent].children.append(node)
    for node in nodes:
        node.children.sort(key=lambda child: (not child.on_path, -child.sureness))
    for token in cycle.emitted[len(cycle.path) :]:
        label = answer.label(token.token)
        tip = f"{_quoted(label, as_html=False)}: the target's own, proposed by nobody here"
        nodes[[0, *cycle.path][-1]].children.insert(
            0, _Node(_short(label), "target", (), "target", tip, 0.0, [])
        )
    return nodes[0]


def _place_wide(root: _Node) -> list[tuple[_Node, _Node | None]]:
    """Columns by depth; a node stands in the row of its first child. Returns nodes and parents."""
    order = _preorder(root)
    depth = {id(root): 0}
    widths: dict[int, float] = {}
    for node, parent in order:
        if parent is not None:
            depth[id(node)] = depth[id(parent)] + 1
        at = depth[id(node)]
        widths[at] = max(widths.get(at, 0.0), node.width)
    left = [1.0]
    for at in range(len(widths)):
        left.append(left[-1] + widths[at] + _GAP)
    row = 0
    for node, parent in order:
        if parent is not None and node is not parent.children[0]:
            row += 1
        node.x, node.y = left[depth[id(node)]], row * _ROW + _ROW / 2
    return order


def _place_narrow(root: _Node) -> list[tuple[_Node, _Node | None]]:
    """A row for every node, indented by depth. Returns nodes and their parents."""
    order = _preorder(root)
    for row, (node, parent) in enumerate(order):
        node.x = 1.0 if parent is None else parent.x + _INDENT
        node.y = row * _ROW + _ROW / 2
    return order


def _preorder(root: _Node) -> list[tuple[_Node, _Node | None]]:
    order, waiting = [], [(root, None)]
    while waiting:
        node, parent = waiting.pop()
        order.append((node, parent))
        waiting += [(child, node) for child in reversed(node.children)]
    return order


def _svg(root: _Node, order: list[tuple[_Node, _Node | None]], number: int) -> str:
    width = max(node.x + node.width for node, _ in order) + 2
    height = max(node.y for node, _ in order) + _ROW / 2
    # Edges first, those of the accepted path last: it lies on top of the others.
    edges = sorted((p for p in order if p[1] is not None), key=lambda pair: pair[0].on_path)
    parts = [_edge(node, parent) for node, parent in edges] + [_box(node) for node, _ in order]
    return (
        f'<svg role="img" aria-label="Draft tree of cycle {number}, {len(order)} nodes" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _edge(node: _Node, parent: _Node) -> str:
    """From the parent's right side, or from below it where the child is a row of its own."""
    if node.x > parent.x + parent.width:
        middle = node.x - _GAP / 2
        path = (
            f"M{parent.x + parent.width:.1f} {parent.y:.1f}H{middle:.1f}V{node.y:.1f}H{node.x:.1f}"
        )
    else:
        start = parent.x + _INDENT / 2
        path = f"M{start:.1f} {parent.y + _BOX / 2:.1f}V{node.y:.1f}H{node.x:.1f}"
    return f'<path class="edge {node.status}" d="{path}"/>'


def _box(node: _Node) -> str:
    marks = "".join(
        f'<tspan class="mark {palette.css_class((d,))}">{palette.mark(d)} </tspan>'
        for d in node.drafters
    )
    note = f'<tspan class="note" dx="6">{escape(node.note)}</tspan>' if node.note else ""
    top = node.y - _BOX / 2
    return (
        f'<g class="node {node.status} {palette.css_class(node.drafters)}">'
        f"<title>{escape(node.tip)}</title>"
        f'<rect x="{node.x:.1f}" y="{top:.1f}" width="{node.width:.1f}" height="{_BOX}" rx="5"/>'
        f'<text x="{node.x + 8:.1f}" y="{node.y + 4.5:.1f}" xml:space="preserve">{marks}'
        f"{escape(node.text)}{note}</text></g>"
    )


def _confidence(value: float) -> str:
    return "<.01" if value < 0.005 else f"{value:.2f}".removeprefix("0")


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "\u2026"


def _quoted(text: str, as_html: bool = True) -> str:
    return f"\u201c{escape(text) if as_html else text}\u201d"
