"""Drafters in a transformers pipeline: they are arguments of the call, like any of generate's.

python examples/pipeline.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from _common import argument_parser, load_drafters, load_target, prompts
from transformers import pipeline

import taps_hf  # noqa: F401 (teaches generate() `assistant_models`)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the pipeline's answers; returns 1 if one differs without drafters, else 0."""
    options = argument_parser(__doc__, max_new_tokens=64).parse_args(argv)
    model, tokenizer = load_target(options.target)
    drafters = load_drafters(options.drafters, options.draft_vocab)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {
        "do_sample": False,
        "max_new_tokens": options.max_new_tokens,
        "return_full_text": False,
    }

    status = 0
    for kind in ("math", "chat"):
        messages = [{"role": "user", "content": prompts(kind)[0]}]
        plain = generator(messages, **settings)
        drafted = generator(messages, assistant_models=drafters, strategy="merged", **settings)
        print(f"> {messages[0]['content']}\n\n{drafted[0]['generated_text']}\n")
        if drafted != plain:
            print(f"Without drafters: {plain[0]['generated_text']}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
