from __future__ import annotations

import re

from taps_hf.demo import rendering
from taps_hf.demo.palette import COLOURS, LINES, MARKS, css_class, stylesheet
from taps_hf.demo.settings import PLAIN, Variant

from .written import BOTH, Tags, hostile_tokenizer, write


def test_tokens_by_origin(request_of):
    answer = write(request_of(max_new_tokens=40))
    html = rendering.answer_html(answer)
    assert Tags(html).text == answer.text
    classes = re.findall(r'class="tok (\w+)', html)
    assert classes == [css_class(token.drafters) for _, token in answer.emitted()]
    assert "own" in classes
    assert len(set(classes)) > 1
    # The first token of every cycle is marked.
    assert html.count(" first") == len(answer.trace.cycles)


def test_legend_and_figures_are_the_traces(request_of):
    answer = write(request_of(max_new_tokens=40))
    legend = Tags(rendering.legend_html(answer)).text
    for origin, share in answer.trace.origin_share.items():
        words = " + ".join(BOTH.drafters[i] for i in origin) or "target's own"
        assert f"{words} {round(share * 40)} ({share:.0%})" in legend
    figures = rendering.figures_html(answer)
    assert f'data-figure="tau">{answer.trace.tau:.2f}<' in figures
    assert f'data-figure="target passes saved">{answer.passes_saved}<' in figures


def test_nothing_of_a_model_becomes_html(request_of):
    for variant in (BOTH, PLAIN):
        answer = write(request_of(max_new_tokens=40), variant)
        answer._tokenizer = hostile_tokenizer()
        found = Tags(rendering.comparison_html([answer, answer]))
        assert found.tags <= {"div", "section", "h4", "p", "i", "dl", "dt", "dd", "span"}
        assert found.attributes <= {
            *("class", "data-number", "data-tip", "data-variant", "style", "tabindex", "title")
        }
        assert "<script>alert(" in found.text
    notice = rendering.notice_html("<img src=x onerror=alert(1)>")
    assert Tags(notice).tags == {"div"}


def test_comparison_says_equal_only_of_equal_answers(request_of):
    plain, merged = write(request_of(), PLAIN), write(request_of())
    assert "all 24 tokens" in rendering.comparison_html([plain, merged])
    merged.tokens[7] = (merged.tokens[7] + 1) % 16
    html = rendering.comparison_html([plain, merged])
    assert "equal to plain" not in html
    assert "differs from token 8 on: plain \u201c" in html
    # One token less is a difference too, unless one of the two was ended early.
    merged = write(request_of())
    merged.tokens.pop()
    assert "the first 23 tokens are equal; one of the two was ended early" in (
        rendering.comparison_html([plain, merged])
    )
    merged._ends = frozenset(merged.tokens[-1:])
    html = rendering.comparison_html([plain, merged])
    assert "differs from token 24 on" in html
    assert "here \u201c(the end)\u201d" in html


def test_no_two_drafters_look_alike():
    looks = list(zip(COLOURS, LINES))
    assert len(set(looks)) == len(looks)
    assert len(set(MARKS)) == len(MARKS) == len(COLOURS)
    assert [css_class(o) for o in ((0,), (1,), (0, 1), ())] == ["d0", "d1", "several", "own"]
    assert all(f".d{i} {{" in stylesheet() for i in range(len(COLOURS)))


def test_before_there_is_an_answer():
    assert "The answer appears here" in rendering.answer_html(None)
    assert rendering.figures_html(None) == rendering.legend_html(None) == ""


def test_alone_a_drafter_keeps_its_colour(request_of):
    answer = write(request_of(max_new_tokens=40), Variant("chat alone", ("chat",)))
    assert set(re.findall(r'class="tok (\w+)', rendering.answer_html(answer))) == {"d1", "own"}
