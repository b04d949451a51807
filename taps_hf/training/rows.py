"""The rows of a training run: those to train on, and those held out of each source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from .conversations import DataReport, DataSource, SourceRow, read_mixture
from .encoding import Example, encode_rows
from .options import TrainOptions


class TrainingRows:
    """The rows of a run, read before anything else is done.

    Raises:
        ValueError: for data that cannot be read, or two sources of one name.
    """

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        self.report = DataReport()
        self.mixture = read_mixture(options.sources(), self.report, options.seed)
        self.by_source: dict[str, list[SourceRow]] = {}
        for text in [*options.data, *options.eval_data]:
            source = DataSource.parse(text)
            name = Path(source.name).name
            if name in self.by_source:
                raise ValueError(f"{name} is given twice; expected sources with different names.")
            self.by_source[name] = read_mixture(
                [DataSource(source.name)], DataReport(), options.seed
            )

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, ends: set[int]
    ) -> tuple[list[Example], dict[str, list[Example]], DataReport]:
        """Training examples, the held-out ones of each source, and what became of the rows.

        Raises:
            ValueError: if nothing is left to train on, or nothing is held out of a source.
        """
        options = self.options
        examples = encode_rows(tokenizer, self.mixture, options.max_length, self.report, ends)
        training = [x for x in examples if not is_held_out(x, options.held_out)]
        held_out = {}
        for name, rows in self.by_source.items():
            found = []
            for row in rows:
                for x in encode_rows(tokenizer, [row], options.max_length, DataReport(), ends):
                    found += [x] if is_held_out(x, options.held_out) else []
                if len(found) == options.eval_rows:
                    break
            held_out[name] = found
        empty = [name for name, found in held_out.items() if not found]
        if not training or empty:
            raise ValueError(
                f"{len(training)} rows are left to train on, and none is held out of {empty}; "
                "expected more data, or another `held_out`."
            )
        return training, held_out, self.report


def digest_of_examples(examples: Iterable[Example]) -> str:
    """16 hexadecimal digits of the SHA-256 over all tokens and marks, in their order."""
    found = hashlib.sha256()
    for example in examples:
        both = torch.tensor([example.input_ids, example.is_answer], dtype=torch.int64)
        found.update(both.numpy().tobytes())
    return found.hexdigest()[:16]


def is_held_out(example: Example, share: float) -> bool:
    """Whether a row is kept out of training: by what comes before its first answer.

    So alike in every run and mixture, and for all answers to the same question.
    """
    question = example.input_ids[: example.is_answer.index(True)]
    text = ",".join(map(str, question)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < share * 2**64
