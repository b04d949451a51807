"""Answer prompts with llama.cpp, in a process of its own: `python llama_cpp.py JOBS RESULT`.

Both files are JSON. Each of the jobs says `model`, a GGUF file, `drafter`, that of an EAGLE-3
drafter or null, how many tokens long its drafts are (`length`), `prompts` (lists of token ids) and
`new_tokens`. Its result is, for each prompt, the `tokens` answered, and how many were `drafted` and
`accepted`. Everything is computed in float32, by one thread.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import xllamacpp as cpp


def answer(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Answer the prompts, one after the other."""
    params = cpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx, params.n_parallel = 512, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    if job["drafter"] is not None:
        speculative, draft = params.speculative, params.speculative.draft
        speculative.types = [cpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3]
        draft.mparams.path = job["drafter"]
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = 1
        draft.n_max, draft.n_min, draft.p_min = job["length"], 0, 0.0
        draft.cache_type_k = draft.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    server = cpp.Server(params)
    found = []
    for prompt in job["prompts"]:
        said = server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": job["new_tokens"],
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
                "logprobs": 1,  # they come with the tokens' ids
            }
        )
        if "choices" not in said:
            raise SystemExit(f"llama.cpp answered {said}")
        found.append(
            {
                "tokens": [token["id"] for token in said["choices"][0]["logprobs"]["content"]],
                "drafted": said["timings"].get("draft_n", 0),
                "accepted": said["timings"].get("draft_n_accepted", 0),
            }
        )
    return found


if __name__ == "__main__":
    jobs_file, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps([answer(job) for job in json.loads(jobs_file.read_text())]))
