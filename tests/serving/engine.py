"""Serve prompts with vLLM, in a process of its own: `python engine.py JOBS RESULT`, both JSON.

Each of the jobs says `model` and `prompts` (lists of token ids); `new_tokens`, one number or one
for each prompt; and `speculative`, vLLM's own configuration of a drafter or null. It may say
`together`, whether all prompts are one batch, or of how many prompts each batch is, one after the
other; `temperature`, 0 unless it is given; `ignore_eos`; `max_model_len`; and `cached`, blocks of
how many tokens of prompts are cached (no prompts unless it is given). With `leaves`, after how many
tokens whoever asked goes away (null if they stay), prompts come one by one into a batch.
Its result has the `answers`, for each prompt the `tokens` answered and, of prompts that came one
after the other, how many drafts (`drafts`) of how many tokens (`drafted`) were verified and
`accepted`; the same counts for all of them, `counted`; and those of each drafter of a composed
folder, `by_drafter`. A job or a prompt that vLLM refuses has `refused`, the error, instead. With
`leaves`, `kept` are requests that had ended and that whoever routes per request still knew.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.llm_engine import LLMEngine

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
    if isinstance(together, bool):
        together = [len(job["prompts"])] if together else [1] * len(job["prompts"])
    engine = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=job.get("max_model_len", 512),
        max_num_seqs=max(together),
        enable_prefix_caching="cached" in job,
        block_size=job.get("cached"),
        skip_tokenizer_init=True,
        disable_log_stats=False,
        speculative_config=job["speculative"],
        seed=0,
    )
    new_tokens = job["new_tokens"]
    if isinstance(new_tokens, int):
        new_tokens = [new_tokens] * len(job["prompts"])
    wanted = [
        SamplingParams(  # without a seed for each: with one vLLM may read no prompt in parts
            temperature=job.get("temperature", 0),
            max_tokens=most,
            detokenize=False,
            ignore_eos=job.get("ignore_eos", False),
        )
        for most in new_tokens
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    first, ours, answers = _counts(engine), _by_drafter(), []
    if "leaves" in job:
        answers, kept = _with_leavers(engine.llm_engine, prompts, job["leaves"], wanted)
        return {
            "answers": answers,
            "kept": kept,
            "counted": _more(_counts(engine), first),
            "by_drafter": _more(_by_drafter(), ours),
        }
    before = first
    ends = itertools.accumulate(together)
    for batch in (slice(end - size, end) for end, size in zip(ends, together)):
        outputs = engine.generate(prompts[batch], wanted[batch], use_tqdm=False)
        after = _counts(engine)
        counted = _more(after, before) if len(outputs) == 1 else {}
        answers += [{"tokens": list(out.outputs[0].token_ids), **counted} for out in outputs]
        before = after
    return {
        "answers": answers,
        "counted": _more(before, first),
        "by_drafter": _more(_by_drafter(), ours),
    }


def _with_leavers(
    engine: LLMEngine,
    prompts: list[dict[str, Any]],
    leaves: list[int | None],
    wanted: list[SamplingParams],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Step by step; a request is aborted when it has so many tokens, as the server does it."""
    answers: list[dict[str, Any]] = [{} for _ in prompts]
    waiting, kept = list(enumerate(prompts)), set()
    runner = engine.model_executor.driver_worker.worker.model_runner
    while waiting or engine.has_unfinished_requests():
        if waiting:
            number, prompt = waiting.pop(0)
            try:
                engine.add_request(str(number), prompt, wanted[number])
            except VLLMValidationError as error:
                answers[number] = {"refused": refused(error)}
        for output in engine.step():
            number, (answer,) = int(output.request_id), output.outputs
            answers[number] = {"tokens": list(answer.token_ids), "ended": answer.finish_reason}
            leaving = leaves[number]
            if leaving is not None and len(answer.token_ids) >= leaving:
                engine.abort_request([output.request_id])
        if hasattr(runner, "drafter"):
            drafter = runner.drafter
            remembered = {*drafter._slots, *(drafter._lookups._texts if drafter._lookups else ())}
            kept |= remembered - runner.requests.keys()
    return answers, sorted(kept)


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
