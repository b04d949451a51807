"""Answers for the tests of what is drawn from them."""

from __future__ import annotations

import threading
from html.parser import HTMLParser

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from taps_hf.demo.answer import Answer
from taps_hf.demo.settings import Request, Variant

from ..tiny import VOCAB

BOTH = Variant("merged", ("math", "chat"), "merged")


def write(request: Request, variant: Variant = BOTH) -> Answer:
    """Write an answer to its end."""
    answer = Answer(request, variant, threading.Event())
    for _ in answer.write():
        pass
    return answer


def hostile_tokenizer() -> PreTrainedTokenizerFast:
    """Every token is an attempt to break out of the page."""
    vocabulary = {f"</span></title>\"'><script>alert({i})</script>&amp;": i for i in range(VOCAB)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


class Tags(HTMLParser):
    """The tags, attributes and text of a piece of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data
