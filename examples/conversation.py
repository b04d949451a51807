"""A conversation: each turn goes on from the cache of the one before, and so do the drafters.

python examples/conversation.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from _common import argument_parser, load_drafters, load_target

from taps_hf import crop_to_shared
from taps_hf.cache import CACHE  # what this transformers calls its cache

TURNS = (
    "Name three things that one can make from an orange.",
    "Which of them is the easiest?",
    "And what does one need for it?",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Talk; returns 1 if an answer differs from plain generate's, else 0."""
    options = argument_parser(__doc__, max_new_tokens=64).parse_args(argv)
    model, tokenizer = load_target(options.target)
    drafters = load_drafters(options.drafters, options.draft_vocab)
    settings = {"do_sample": False, "max_new_tokens": options.max_new_tokens}

    said: list[dict[str, str]] = []
    earlier, status = None, 0
    for turn in TURNS:
        said.append({"role": "user", "content": turn})
        inputs = tokenizer.apply_chat_template(
            said, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        length = inputs["input_ids"].shape[1]
        cache = {}
        if earlier is not None:
            crop_to_shared(earlier[CACHE], earlier.sequences, inputs["input_ids"])
            cache = {CACHE: earlier[CACHE]}
        kept = earlier[CACHE].get_seq_length() if cache else 0
        earlier = model.generate(
            **inputs, **settings, **cache, assistant_models=drafters, return_dict_in_generate=True
        )
        plain = model.generate(**inputs, **settings)
        answer = tokenizer.decode(earlier.sequences[0, length:], skip_special_tokens=True)
        said.append({"role": "assistant", "content": answer})
        equal = plain[0].tolist() == earlier.sequences[0].tolist()
        print(
            f"> {turn}\n{answer}\n({kept} of {length} tokens were known; tau "
            f"{earlier.draft_trace.tau:.2f}; {'equal to' if equal else 'DIFFERS from'} plain "
            "generate)\n"
        )
        status |= not equal
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
