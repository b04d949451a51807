"""Streams an answer: every token is shown as soon as it is certain, several at a time.

python examples/streaming.py "Why is the sky blue?"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from _common import argument_parser, encode, load_drafters, load_target, prompts
from transformers import TextStreamer

import taps_hf  # noqa: F401 (teaches generate() `assistant_models`)


def main(argv: Sequence[str] | None = None) -> int:
    """Stream one answer to standard output; returns the exit status."""
    parser = argument_parser(__doc__, max_new_tokens=128)
    parser.add_argument("prompt", nargs="?", default=prompts("chat")[0])
    options = parser.parse_args(argv)
    model, tokenizer = load_target(options.target)
    drafters = load_drafters(options.drafters, options.draft_vocab)

    print(f"> {options.prompt}\n")
    output = model.generate(
        **encode(tokenizer, options.prompt).to(model.device),
        do_sample=False,
        max_new_tokens=options.max_new_tokens,
        assistant_models=drafters,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        return_dict_in_generate=True,
    )
    trace = output.draft_trace
    print(
        f"\n({len(trace.emitted)} tokens in {trace.num_target_passes} passes of the target after "
        f"the prompt's: tau {trace.tau:.2f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
