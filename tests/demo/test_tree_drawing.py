from __future__ import annotations

import re
from itertools import combinations
from xml.etree import ElementTree

import pytest

from taps_hf import DynamicTree
from taps_hf.demo.tree_drawing import cycle_html

from .written import BOTH, Tags, hostile_tokenizer, write

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module", params=["small", "60 nodes"])
def answer(request, tiny_spec):
    from taps_hf.demo.settings import Request

    tree = DynamicTree(3, 6, 12) if request.param == "small" else DynamicTree(8, 8, 60)
    return write(Request(tiny_spec, "t5 t6", 0.0, 0, 40, tree, 60.0))


def drawings(answer, number: int) -> list[ElementTree.Element]:
    """The wide and the narrow drawing."""
    found = re.findall(r"<svg.*?</svg>", cycle_html(answer, number))
    return [ElementTree.fromstring(svg) for svg in found]


def boxes(svg: ElementTree.Element) -> list[tuple[float, float, float, float]]:
    """x, y, width and height of every node."""
    names = ("x", "y", "width", "height")
    return [tuple(float(rect.get(name)) for name in names) for rect in svg.iter(f"{SVG}rect")]


def test_every_node_is_drawn_with_its_verdict(answer):
    for number, cycle in enumerate(answer.trace.cycles, start=1):
        own = len(cycle.emitted) - len(cycle.path)
        expected = ["root", *cycle.verdicts[1:], *["target"] * own]
        for svg in drawings(answer, number):
            nodes = [g.get("class").split()[1] for g in svg.iter(f"{SVG}g")]
            assert sorted(nodes) == sorted(expected)
            edges = [path.get("class").split()[1] for path in svg.iter(f"{SVG}path")]
            assert sorted(edges) == sorted(expected[1:])
            marks = [len(list(g.iter(f"{SVG}tspan"))) for g in svg.iter(f"{SVG}g")]
            assert max(marks) <= 3  # of two drafters, and the confidence


def test_confidences_are_the_trees(answer):
    for number, cycle in enumerate(answer.trace.cycles, start=1):
        sure = cycle.tree.confidence[:, 1:].nan_to_num(nan=-1.0).amax(dim=0).tolist()
        expected = ["<.01" if c < 0.005 else f"{c:.2f}".lstrip("0") for c in sure]
        for svg in drawings(answer, number):
            notes = [t.text for t in svg.iter(f"{SVG}tspan") if t.get("class") == "note"]
            assert sorted(note for note in notes if note != "target") == sorted(expected)


def test_no_node_covers_another_or_leaves_the_drawing(answer):
    for number in range(1, len(answer.trace.cycles) + 1):
        for svg in drawings(answer, number):
            found = boxes(svg)
            for x, y, width, height in found:
                assert 0 <= x <= x + width <= float(svg.get("width"))
                assert 0 <= y <= y + height <= float(svg.get("height"))
            for a, b in combinations(found, 2):
                apart = a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0]
                assert apart or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]


def test_the_narrow_drawing_fits_a_phone_and_the_accepted_path_is_straight(answer):
    for number in range(1, len(answer.trace.cycles) + 1):
        wide, narrow = drawings(answer, number)
        assert float(narrow.get("width")) < 340
        ways = ("root", "accepted", "target")
        rows = {
            float(g.find(f"{SVG}rect").get("y"))
            for g in wide.iter(f"{SVG}g")
            if g.get("class").split()[1] in ways
        }
        assert len(rows) == 1


def test_the_cycle_in_words(answer):
    number = len(answer.trace.cycles)
    for asked in (number, number + 10):  # the slider may still stand where an earlier answer ended
        assert f'data-cycle="{number}"' in cycle_html(answer, asked)
    for number, cycle in enumerate(answer.trace.cycles, start=1):
        words = Tags(cycle_html(answer, number)).text
        if cycle.drafters:
            assert f"checked {cycle.num_nodes} nodes by math and chat" in words
            assert f"accepted {cycle.accepted_length}" in words
        said = len(cycle.emitted) > len(cycle.path)
        assert ("Then the target said" if said else "The answer ended there") in words


def test_nothing_of_a_model_becomes_html(request_of):
    answer = write(request_of(), BOTH)
    answer._tokenizer = hostile_tokenizer()
    found = Tags(cycle_html(answer, 2))
    assert found.tags <= {
        *("div", "p", "b", "ul", "li", "span"),
        *("svg", "path", "g", "title", "rect", "text", "tspan"),
    }
    assert "<script>alert(" in found.text


def test_before_there_is_an_answer():
    assert "generate an answer" in cycle_html(None, 1)
