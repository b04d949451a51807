"""Drafting from earlier answers: what was said before may be said again."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..files import check_writable, read_json, write_text
from ..trees.tree import DraftTree
from .base import Drafter, DrafterSession, DraftRequest
from .lookup import grow
from .suffixes import SuffixAutomaton

_LONGEST_MATCH = 32  # tokens that are compared: beyond that nothing gets surer
_LEAST_MATCH = 3  # below that, what other texts say says little about this one
_WHAT = "the answers of a taps_hf.AnswerMemory"
_BEGINS = b'{"vocab_size": '  # every file of one


class AnswerMemory(Drafter):
    """Proposes what followed in earlier answers where the last tokens of this one stood.

    One object is shared by the generations it is given to, in one thread or several. What one
    answer said can be proposed in any other. It never gets into another's text, but into its trace,
    and its speed tells of it: give different users one memory only if that is wanted.

    Of an answer that ends as it should the tokens are remembered that came after it was first asked
    (with "single" that may be none); not of the prompt, nor of one that an exception ended. Half of
    what is remembered is forgotten at once when it is full.

    Args:
        path: a file to go on from, if it is there, and to write after every answer, whole: a kill
            leaves the last one. It holds token ids of answers, readable by who has the tokenizer.
            Of several processes the last to write wins. What else comes to lie there stays.
        capacity: tokens that are remembered at most.

    Raises:
        ValueError: if the file cannot be read or written or holds something else, or `capacity` is
            no integer of at least 2.
    """

    name_or_path = "memory"
    is_free = True

    def __init__(self, path: str | Path | None = None, capacity: int = 100_000) -> None:
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 2:
            raise ValueError(f"`capacity` is {capacity!r}, expected an integer of at least 2.")
        self.path = None if path is None else Path(path).resolve()  # a link's end, not the link
        self.capacity = capacity
        self._lock = threading.Lock()  # of what is remembered
        self._writing = threading.Lock()  # of the file: nobody who drafts waits for the disk
        self._vocab_size: int | None = None  # of the target whose answers these are
        self._halves = (_Half(), _Half())  # the older one first
        if self.path is not None:
            check_writable(self.path)
            if self.path.exists():
                self._read(read_json(self.path, _WHAT))

    def __repr__(self) -> str:
        return f"AnswerMemory({str(self.path)!r}, capacity={self.capacity})"

    def __len__(self) -> int:
        """Tokens that are remembered."""
        return sum(half.size for half in self._halves)

    def __bool__(self) -> bool:
        return True

    @classmethod
    def start(cls, drafters: Sequence[Drafter], target: PreTrainedModel) -> MemorySession:
        (drafter,) = drafters
        return MemorySession(drafter, target.config.get_text_config(decoder=True).vocab_size)

    def run_key(self) -> Hashable:
        return ()  # what drafting costs does not depend on what is remembered

    def check_target(self, name: str, target: PreTrainedModel) -> None:
        """Raise `ValueError` if it remembers answers of a target with another vocabulary."""
        size = target.config.get_text_config(decoder=True).vocab_size
        if self._vocab_size not in (None, size):
            raise ValueError(
                f"Drafter {name!r} remembers answers of a target with {self._vocab_size} tokens, "
                f"and this one has {size}; expected a memory for each tokenizer."
            )

    def remember(self, answer: Sequence[int], vocab_size: int) -> None:
        """Remember the tokens of an answer, of a long one the last.

        Args:
            answer: token ids.
            vocab_size: of the target that gave it.

        Raises:
            ValueError: if earlier answers are of a target with another vocabulary; or if something
                else has come to lie in the place of the file.
            OSError: if the file cannot be written. Then, too, the answer is remembered, and
                written with the next one.
        """
        self._keep(answer, vocab_size)
        if self.path is not None:
            self._write()

    def _keep(self, answer: Sequence[int], vocab_size: int) -> None:
        answer = list(answer)[-(self.capacity // 2) :]
        with self._lock:
            if self._vocab_size not in (None, vocab_size):
                raise ValueError(
                    f"An answer of a target with {vocab_size} tokens was given, but those before "
                    f"it are of one with {self._vocab_size}; expected a memory for each tokenizer."
                )
            self._vocab_size = vocab_size
            _, new = self._halves
            if new.size + len(answer) > self.capacity // 2:
                self._halves = (new, _Half())
            self._halves[1].add(answer)

    def _write(self) -> None:
        with self._writing:  # what is newest then, so that no older state comes after a newer one
            with self._lock:
                texts = [text for half in self._halves for text in half.texts]
                content = {"vocab_size": self._vocab_size, "answers": texts}
            self._check_file()
            write_text(self.path, json.dumps(content) + "\n")

    def forget_all(self) -> None:
        """Forget all answers and whose they were, and remove the file.

        Raises:
            ValueError: if something else has come to lie in its place: that stays.
        """
        with self._writing, self._lock:
            self._halves, self._vocab_size = (_Half(), _Half()), None
            if self.path is not None:
                self._check_file()
                self.path.unlink(missing_ok=True)

    def _check_file(self) -> None:
        """Raise `ValueError` if what lies in the place of the file is none of a memory's."""
        if os.path.lexists(self.path) and not self._is_file():
            raise ValueError(f"{self.path} holds something else by now, expected {_WHAT}.")

    def _is_file(self) -> bool:
        if self.path.is_symlink() or not self.path.is_file():
            return False
        with self.path.open("rb") as file:
            return file.read(len(_BEGINS)) == _BEGINS

    def draft(self, text: Sequence[int], request: DraftRequest) -> DraftTree | None:
        """What followed a text in the half that knows more of its end; None if that is little.

        Args:
            text: tokens up to the root, the root included.
            request: what is wanted.
        """
        with self._lock:
            places = [(half.automaton, *half.automaton.find(text)) for half in self._halves]
            automaton, state, matched = max(reversed(places), key=lambda place: place[2])
            if matched < _LEAST_MATCH:
                return None
            limits = (request.shape.num_nodes, request.max_depth, _LEAST_MATCH)
            tree = grow(automaton, state, matched, request.root, *limits)
        return _without_ends(tree)

    def _read(self, content: dict[str, Any]) -> None:
        size, answers = content.get("vocab_size"), content.get("answers")
        tokens_of = isinstance(answers, list) and all(isinstance(x, list) for x in answers)
        if not tokens_of or not isinstance(size, int) or isinstance(size, bool):
            raise ValueError(f"{self.path} has no `answers` or no `vocab_size`, expected {_WHAT}.")
        for answer in answers:
            if not all(type(token) is int and 0 <= token < size for token in answer):
                raise ValueError(
                    f"{self.path} has tokens not in 0 to {size - 1}, expected {_WHAT}."
                )
        for answer in answers:
            self._keep(answer, size)


class _Half:
    """Some of the answers."""

    END = -1  # between two of them: no token

    def __init__(self) -> None:
        self.texts: list[list[int]] = []
        self.size = 0
        self.automaton = SuffixAutomaton()

    def add(self, text: list[int]) -> None:
        self.texts.append(text)
        self.size += len(text)
        for token in (*text, self.END):
            self.automaton.add(token)


def _without_ends(tree: DraftTree) -> DraftTree | None:
    """The tree without the nodes that stand for an answer's end, and what is below them."""
    kept: set[int] = set()
    for node, (token, parent) in enumerate(zip(tree.tokens.tolist(), tree.parents.tolist())):
        if token != _Half.END and (node == 0 or parent in kept):
            kept.add(node)
    found = tree.select(torch.tensor(sorted(kept), device="cpu"))
    return found if len(found) > 1 else None


class MemorySession(DrafterSession):
    """One answer, or several of a conversation, that a memory hears.

    Args:
        memory: that is asked and told.
        vocab_size: of the target.
    """

    def __init__(self, memory: AnswerMemory, vocab_size: int) -> None:
        self._memory, self._vocab_size = memory, vocab_size
        self._end: list[int] = []  # of the text
        self._answer: list[int] = []
        self._heard: list[torch.Tensor] = []
        self._drafts = False  # what is heard is an answer

    def observe(self, tokens: torch.Tensor, states: Mapping[int, torch.Tensor]) -> None:
        self._heard.append(tokens)

    def propose(self, rows: Sequence[int], request: DraftRequest) -> dict[int, DraftTree]:
        self._read()
        self._drafts = True
        tree = self._memory.draft(self._end, request)
        return {} if tree is None else {0: tree}

    def forget(self, count: int) -> bool:
        self._read()
        # What is left of the end may be too short to match: the next tokens make up for that.
        del self._end[max(len(self._end) - count, 0) :]
        return True

    def finish(self) -> None:
        self._read()
        if self._answer:
            try:
                self._memory.remember(self._answer, self._vocab_size)
            except (OSError, ValueError) as error:  # the answer is there, and worth more
                warnings.warn(f"An answer may not be remembered: {error}", stacklevel=2)
        self._answer, self._drafts = [], False

    def _read(self) -> None:
        for tokens in self._heard:
            said = tokens.tolist()
            self._end = (self._end + said)[-_LONGEST_MATCH:]
            if self._drafts:
                self._answer += said
        self._heard = []
