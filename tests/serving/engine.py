"""Serve prompts with vLLM, in a process of its own: `python engine.py JOBS RESULT`, both JSON.

Each of the jobs says `model` and `prompts` (lists of token ids), `new_tokens`, and `speculative`,
vLLM's own configuration of a drafter or null; `together`, whether all prompts are one batch;
`temperature`, 0 unless it is given; and `ignore_eos`.
Its result has the `answers`, for each prompt the `tokens` answered and, of prompts that came one
after the other, how many drafts (`drafts`) of how many tokens (`drafted`) were verified and
`accepted`; the same counts for all of them, `counted`; and those of each drafter of a composed
folder, `by_drafter`. A job that vLLM refuses has `refused`, the error, instead.
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
_OURS = "taps_hf:"
Counts = dict[str, int]


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """Answer the prompts, one after the other or together."""
    together = job.get("together", False)
    engine = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=len(job["prompts"]) if together else 1,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        speculative_config=job["speculative"],
        seed=0,
    )
    wanted = SamplingParams(  # without a seed for each: with one vLLM may read no prompt in parts
        temperature=job.get("temperature", 0),
        max_tokens=job["new_tokens"],
        detokenize=False,
        ignore_eos=job.get("ignore_eos", False),
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    first, ours, answers = _counts(engine), _by_drafter(), []
    before = first
    for batch in [prompts] if together else [[prompt] for prompt in prompts]:
        outputs = engine.generate(batch, wanted, use_tqdm=False)
        after = _counts(engine)
        counted = {} if together else _more(after, before)
        answers += [{"tokens": list(out.outputs[0].token_ids), **counted} for out in outputs]
        before = after
    return {
        "answers": answers,
        "counted": _more(before, first),
        "by_drafter": _more(_by_drafter(), ours),
    }


def _more(after: Counts, before: Counts) -> Counts:
    return {name: after[name] - before.get(name, 0) for name in after}


def _counts(engine: LLM) -> Counts:
    """Since the process started; counters of drafts are there only where there is a drafter."""
    counters = set(_COUNTERS.values())
    found = {m.name: m.value for m in engine.get_metrics() if m.name in counters}
    return {name: int(found.get(theirs, 0)) for name, theirs in _COUNTERS.items()}


def _by_drafter() -> Counts:
    """What our plugin tells Prometheus: "math drafted" and so on."""
    from prometheus_client import REGISTRY

    samples = (s for family in REGISTRY.collect() for s in family.samples)
    return {
        f"{s.labels['drafter']} {s.name.removeprefix(_OURS).removesuffix('_tokens_total')}": int(
            s.value
        )
        for s in samples
        if s.name.startswith(_OURS)
    }


def refused(error: BaseException) -> str:
    """What was wrong: the error and what it came from."""
    said = []
    while error is not None:
        said.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(said)


if __name__ == "__main__":
    jobs_file, result_file = map(Path, sys.argv[1:])
    results = []
    for job in json.loads(jobs_file.read_text()):
        try:
            results.append(serve(job))
        except (ValueError, RuntimeError) as error:
            results.append({"refused": refused(error)})
        gc.collect()  # the engine, with its memory for keys and values
    result_file.write_text(json.dumps(results))
