"""Answers for the tests of what is drawn from them."""

from __future__ import annotations

import threading
from html.parser import HTMLParser

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from taps_hf.demo.answer import Answer
from taps_hf.demo.models import ModelSpec, load_models
from taps_hf.demo.settings import Request, Variant

from ..tiny import VOCAB

BOTH = Variant("merged", ("math", "chat"), "merged")


def write(request: Request, variant: Variant = BOTH) -> Answer:
    """Write an answer to its end."""
    answer = Answer(request, variant, threading.Event())
    for _ in answer.write():
        pass
    return answer


def plain_answer(spec: ModelSpec, prompt: str, length: int, seed: int | None = None) -> str:
    """What plain `generate` writes; sampled at temperature 1 with a seed."""
    models = load_models(spec)
    inputs = models.encode(prompt)
    sampling = {"do_sample": False}
    if seed is not None:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": 1.0}
    out = models.target.generate(**inputs, **sampling, max_new_tokens=length)
    tokens = out[0, inputs["input_ids"].shape[1] :]
    return models.tokenizer.decode(tokens, skip_special_tokens=True)


_HOSTILE = (
    "</span></title>\"'><script>alert(0)</script>&amp;",
    "<img/src=x/onerror=alert(0)>",
    "<svg/onload=alert(0)>",
    "&lt;img/src=x/onerror=alert(0)&gt;",
    "${alert(0)}",
    "`${alert(0)}`",
    "{{alert(0)}}",
    "]]></style><iframe/srcdoc='<script>parent.alert(0)</script>'>",
)


def hostile_tokenizer() -> PreTrainedTokenizerFast:
    """Every token is an attempt to break out of the page."""
    vocabulary = {_HOSTILE[i % len(_HOSTILE)].replace("0", str(i)): i for i in range(VOCAB)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, chat_template="{{ messages[0]['content'] }}"
    )


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
