from __future__ import annotations

import threading

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from taps_hf.demo.answer import Answer, token_label
from taps_hf.demo.decoding import Update
from taps_hf.demo.models import load_models
from taps_hf.demo.settings import PLAIN, Variant

BOTH = Variant("merged", ("math", "chat"), "merged")


def written(request, variant=BOTH, stop_after: int | None = None) -> Answer:
    answer = Answer(request, variant, threading.Event())
    for _ in answer.write():
        if stop_after is not None and len(answer.tokens) >= stop_after:
            answer.stop.set()
    return answer


def test_an_answer_and_its_figures(request_of):
    answer = written(request_of())
    assert len(answer.tokens) == 24
    assert answer.ended == "cut at the length asked for"
    assert answer.passes == len(answer.trace.cycles) + 1
    assert answer.passes_saved == 24 - answer.passes
    assert [token.token for _, token in answer.emitted()] == answer.tokens
    assert answer.emitted()[-1][0] == len(answer.trace.cycles)
    assert "".join(answer.pieces) == answer.text
    plain = written(request_of(), PLAIN)
    assert (plain.passes, plain.passes_saved) == (24, 0)
    assert plain.tokens == answer.tokens


def test_how_an_answer_ends(request_of, monkeypatch):
    stopped = written(request_of(max_new_tokens=200), stop_after=5)
    assert stopped.ended == "stopped"
    assert 5 <= len(stopped.tokens) < 200
    assert not stopped.ran_to_its_end
    late = written(request_of(max_new_tokens=200, seconds=0.2))
    assert late.ended == "cut after 0.2 seconds, the time limit"
    target = load_models(request_of().models).target
    free = written(request_of()).tokens
    monkeypatch.setattr(target.generation_config, "eos_token_id", free[5])
    complete = written(request_of())
    assert complete.ended == "complete"
    assert complete.ran_to_its_end
    assert complete.tokens == free[: free.index(free[5]) + 1]


def test_a_drafter_looks_the_same_alone(request_of):
    alone = Answer(request_of(), Variant("chat alone", ("chat",)), threading.Event())
    assert alone.look((0,)) == (1,)
    assert Answer(request_of(), BOTH, threading.Event()).look((0, 1)) == (0, 1)


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, so that one character can take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_character_comes_with_its_last_token(request_of, byte_tokenizer):
    answer = Answer(request_of(), PLAIN, threading.Event())
    answer._tokenizer = byte_tokenizer
    pieces = []
    for token in byte_tokenizer.encode("a\u20ac b"):
        answer.tokens.append(token)
        pieces = list(answer.pieces)
    assert pieces == ["a", "", "", "\u20ac", " ", "b"]
    assert answer.text == "a\u20ac b"


def test_labels_show_what_is_invisible(byte_tokenizer):
    (space,), (line,), euro = (byte_tokenizer.encode(text) for text in (" ", "\n", "\u20ac"))
    assert token_label(byte_tokenizer, space) == "\u00b7"
    assert token_label(byte_tokenizer, line) == "\u21b5"
    part = token_label(byte_tokenizer, euro[0])
    assert part == byte_tokenizer.convert_ids_to_tokens(euro[0])


def test_updates_without_tokens_are_signs_of_life(request_of):
    answer = Answer(request_of(), PLAIN, threading.Event())
    answer._add(Update(0.5))
    assert (answer.tokens, answer.seconds) == ([], 0.5)
