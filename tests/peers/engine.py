"""Serve prompts with vLLM, in a process of its own: `python engine.py JOBS RESULT`, both JSON.

Each of the jobs says `model` and `prompts` (lists of token ids), `new_tokens`, and `speculative`,
vLLM's own configuration of a drafter or null. Its result has for each prompt the `tokens` answered,
and how many drafts (`drafts`) of how many tokens (`drafted`) were verified and `accepted`.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

_COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
}


def serve(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Answer the prompts one after the other, so that each has its own counts."""
    engine = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=1,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        speculative_config=job["speculative"],
    )
    wanted = SamplingParams(temperature=0, max_tokens=job["new_tokens"], detokenize=False)
    answers, before = [], _counts(engine)
    for prompt in job["prompts"]:
        (answer,) = engine.generate([{"prompt_token_ids": prompt}], wanted, use_tqdm=False)
        after = _counts(engine)
        counted = {name: after[name] - before[name] for name in after}
        answers.append({"tokens": list(answer.outputs[0].token_ids), **counted})
        before = after
    return answers


def _counts(engine: LLM) -> dict[str, int]:
    """Since the process started; counters of drafts are there only where there is a drafter."""
    counters = set(_COUNTERS.values())
    found = {m.name: m.value for m in engine.get_metrics() if m.name in counters}
    return {name: int(found.get(theirs, 0)) for name, theirs in _COUNTERS.items()}


if __name__ == "__main__":
    jobs_file, result_file = map(Path, sys.argv[1:])
    answers = []
    for job in json.loads(jobs_file.read_text()):
        answers.append(serve(job))
        gc.collect()  # the engine, with its memory for keys and values
    result_file.write_text(json.dumps(answers))
