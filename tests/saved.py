"""A tiny target with a tokenizer and two drafters, saved as anyone's models are."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .tiny import VOCAB, tiny_drafters, tiny_target

_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 't3 t4' }}{% endif %}"
)


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
