"""What lies on disk: tiny models, saved as anyone's are, and all that a folder holds."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .tiny import VOCAB, tiny_drafters, tiny_target

_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 't3 t4' }}{% endif %}"
)


@functools.cache
def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One letter a token, so that stop strings span several tokens. Cached: do not change it."""
    vocabulary = {chr(ord("a") + i): i for i in range(VOCAB)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="a")


def save_tiny_models(folder: Path) -> list[str]:
    """Write them into `folder`.

    Returns:
        the arguments `--target` and `--drafters` (math and chat) that name them.
    """
    vocabulary = {f"t{i}": i for i in range(VOCAB)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t1", chat_template=_TEMPLATE
    )
    tokenizer.save_pretrained(folder / "target")
    tiny_target().save_pretrained(folder / "target")
    drafters = []
    for name, drafter in zip(("math", "chat"), tiny_drafters()):
        drafter.save_pretrained(folder / name)
        drafters.append(f"{name}={folder / name}")
    return ["--target", str(folder / "target"), "--drafters", *drafters]


def tree_of(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder: contents of files, where links point, and folders."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = "folder" if path.is_dir() else path.read_bytes()
    return found
