"""A tokenizer of 16 words with chat templates of different kinds."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..tiny import VOCAB

# t2 ends a turn, t3 begins a question, t4 an answer.
CHATML = (
    "{% for m in messages %}{{ ('t4 ' if m['role'] == 'assistant' else 't3 ') + m['content'] "
    "+ ' t2 t1 ' }}{% endfor %}{% if add_generation_prompt %}{{ 't4' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 't4 ' }}{% generation %}"
    "{{ m['content'] + ' t2' }}{% endgeneration %}{{ ' t1 ' }}{% else %}"
    "{{ 't3 ' + m['content'] + ' t2 t1 ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 't4' }}{% endif %}"
)
# Says less about earlier turns than it said when they were the last.
REWRITING = (
    "{% for m in messages %}{{ ('t4 t11 ' if m['role'] == 'assistant' and loop.last else 't3 ') "
    "+ m['content'] + ' t2 ' }}{% endfor %}{% if add_generation_prompt %}{{ 't4 t11' }}{% endif %}"
)


@functools.cache
def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Cached: do not change it."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", chat_template=template)
