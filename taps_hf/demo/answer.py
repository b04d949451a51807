"""One visitor's answer: all that has happened to it, while it is written and afterwards."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing

from transformers import PreTrainedTokenizerBase

from ..trace import DraftTrace, EmittedToken
from .decoding import Update, stream
from .models import load_models
from .settings import Request, Variant

_NUMBERS = itertools.count(1)


class Answer:
    """Grows with each update. Belongs to one visitor; other requests of theirs may ask it to stop.

    Args:
        request: what was asked.
        variant: how it is answered.
        stop: set by whoever wants it to end.
    """

    def __init__(self, request: Request, variant: Variant, stop: threading.Event) -> None:
        self.number = next(_NUMBERS)  # tells it from every other, on the page too
        self.request = request
        self.variant = variant
        self.tokens: list[int] = []
        self.trace = DraftTrace(variant.drafters)
        self.seconds = 0.0
        self.ended: str | None = None
        """None while it is written; then how it ended, for the page."""
        self.stop = stop
        known = [name for name, _ in request.models.drafters]
        self._looks = [known.index(name) for name in variant.drafters]
        models = load_models(request.models)
        self._tokenizer = models.tokenizer
        self._ends = models.ends
        self._pieces: list[str] = []

    def write(self) -> Iterator[None]:
        """Write it, with a pause for whoever shows it at every update.

        Closing the iterator, or setting `stop`, ends the generation.
        """
        with closing(stream(self.request, self.variant)) as updates:
            for update in updates:
                self._add(update)
                if self.stop.is_set():
                    break
                yield
        if self._complete:
            self.ended = "complete"
        elif len(self.tokens) >= self.request.max_new_tokens:
            self.ended = "cut at the length asked for"
        elif self.stop.is_set():
            self.ended = "stopped"
        else:
            self.ended = f"cut after {self.request.seconds:g} seconds, the time limit"

    def _add(self, update: Update) -> None:
        self.seconds = update.seconds
        self.tokens += update.tokens
        if update.cycle is not None:
            self.trace.cycles.append(update.cycle)

    @property
    def _complete(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self._ends

    @property
    def ran_to_its_end(self) -> bool:
        """Whether neither the visitor nor the time limit ended it."""
        cut = len(self.tokens) >= self.request.max_new_tokens
        return self.ended is not None and (cut or self._complete)

    @property
    def pieces(self) -> list[str]:
        """The text that each token adds; a character of several tokens comes with the last."""
        for end in range(len(self._pieces) + 1, len(self.tokens) + 1):
            text = self._tokenizer.decode(self.tokens[:end], skip_special_tokens=True)
            shown = sum(map(len, self._pieces))
            self._pieces.append("" if text.endswith("\ufffd") else text[shown:])
        return self._pieces

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._tokenizer.decode(self.tokens, skip_special_tokens=True)

    @property
    def passes(self) -> int:
        """Passes of the target, the prompt's included.

        Plain `generate` makes one a token: the first token comes out of the prompt's pass.
        """
        return self.trace.num_target_passes + 1 if self.variant.drafters else len(self.tokens)

    @property
    def passes_saved(self) -> int:
        """Passes that plain `generate` would have made more."""
        return len(self.tokens) - self.passes

    @property
    def tokens_per_second(self) -> float:
        """Since it was begun, the prompt's pass included."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    def emitted(self) -> list[tuple[int, EmittedToken]]:
        """Every token with the number of its cycle, from 1; plain answers have no cycles: 0."""
        if not self.variant.drafters:
            return [(0, EmittedToken(token, None, (), (), ())) for token in self.tokens]
        return [
            (number, token)
            for number, cycle in enumerate(self.trace.cycles, start=1)
            for token in cycle.emitted
        ]

    def look(self, drafters: Sequence[int]) -> tuple[int, ...]:
        """The numbers by which the palette knows drafters, from their indices in the trace.

        A drafter looks the same in every answer, whichever others take part.
        """
        return tuple(self._looks[i] for i in drafters)

    def label(self, token: int) -> str:
        """A token on its own, as a node of a tree shows it."""
        return token_label(self._tokenizer, token)


def token_label(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token's text with its spaces and line breaks made visible.

    Tokens that are parts of a character have no text; they are shown as the vocabulary has them.
    """
    text = tokenizer.decode([token])
    if not text or "\ufffd" in text:
        return tokenizer.convert_ids_to_tokens(token)
    return text.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\t", "\u21e5")
