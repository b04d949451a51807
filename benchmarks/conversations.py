"""Second turns of conversations: with the cache of the first, and with what drafters know of it.

    python benchmarks/conversations.py --prompts mt_bench.jsonl:20 --dtype bfloat16

What is measured, and how: README.md beside this file.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from models import add_model_options, check_model_options, load_models
from prompts import Prompt, read_prompts
from results import interval
from settings import command, hardware
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

import taps_hf
from taps_hf import EagleDrafter
from taps_hf.cache import CACHE, crop_to_shared
from taps_hf.checks import set_threads

STRATEGIES = ("auto", "merged", "single")
PLAIN, GOES_ON, ANEW, AT_ONCE = (
    "plain generate, cache",
    "drafters go on",
    "drafters begin anew, cache",
    "no cache: the whole conversation",
)


@dataclass(frozen=True)
class Turn:
    """One answer to a second turn.

    Args:
        tokens: of the answer.
        first: seconds until its first token.
        seconds: of all of it.
        tau: tokens emitted per pass; None for plain generate.
    """

    tokens: tuple[int, ...]
    first: float
    seconds: float
    tau: float | None


class _FirstToken(BaseStreamer):
    """Notes when the first token of an answer comes."""

    def __init__(self) -> None:
        self.seen = 0
        self.at = 0.0

    def put(self, value: torch.Tensor) -> None:
        self.seen += 1
        if self.seen == 2:  # first comes the prompt
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def second_turns(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    speculate: Mapping[str, Any],
    max_new_tokens: int,
    rotation: int,
) -> dict[str, Turn]:
    """Have the first turn answered, then the second one in all four ways.

    Args:
        model: the target.
        tokenizer: its.
        prompt: with two turns.
        speculate: drafters and strategy, for `generate`.
        max_new_tokens: of each answer.
        rotation: how far the order is rotated.
    """
    said = [{"role": "user", "content": prompt.text}]
    first = _generate(model, _encode(model, tokenizer, said), max_new_tokens, **speculate)
    text = tokenizer.decode(first.sequences[0, first.prompt_length :], skip_special_tokens=True)
    said += [
        {"role": "assistant", "content": text},
        {"role": "user", "content": prompt.later[0]},
    ]
    ids = _encode(model, tokenizer, said)
    cache: DynamicCache = first.output[CACHE]
    crop_to_shared(cache, first.sequences, ids)
    ways: dict[str, dict[str, Any]] = {
        PLAIN: {CACHE: copy.deepcopy(cache)},
        GOES_ON: {CACHE: cache, **speculate},
        ANEW: {CACHE: copy.deepcopy(cache), **speculate},
        AT_ONCE: speculate,
    }
    order = list(ways)
    order = order[rotation % 4 :] + order[: rotation % 4]
    found = {}
    for way in order:
        answer = _generate(model, ids, max_new_tokens, **ways[way])
        trace = getattr(answer.output, "draft_trace", None)
        found[way] = Turn(
            tuple(answer.sequences[0, ids.shape[1] :].tolist()),
            answer.first,
            answer.seconds,
            None if trace is None else trace.tau,
        )
    return found


@dataclass(frozen=True)
class _Answer:
    output: Any
    prompt_length: int
    first: float
    seconds: float

    @property
    def sequences(self) -> torch.Tensor:
        return self.output.sequences


def _generate(
    model: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int, **more: Any
) -> _Answer:
    streamer = _FirstToken()
    _wait(model.device)
    start = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        streamer=streamer,
        **more,
    )
    _wait(model.device)
    return _Answer(output, ids.shape[1], streamer.at - start, time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, said: Sequence[dict[str, str]]
) -> torch.Tensor:
    encoded = tokenizer.apply_chat_template(
        list(said), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded["input_ids"].to(model.device)


def table(turns: Sequence[Mapping[str, Turn]], strategy: str) -> str:
    """What the second turns came to, in Markdown rows."""
    lines = []
    for way in (GOES_ON, ANEW, AT_ONCE):
        cells = [strategy, way]
        passes = sum(len(turn[way].tokens) / turn[way].tau for turn in turns)
        cells.append(f"{sum(len(turn[way].tokens) for turn in turns) / passes:.2f}")
        for ratio in (
            [turn[way].first / turn[PLAIN].first for turn in turns],
            [
                (len(turn[way].tokens) / turn[way].seconds)
                / (len(turn[PLAIN].tokens) / turn[PLAIN].seconds)
                for turn in turns
            ],
        ):
            low, high = interval(ratio, statistics.median)
            cells.append(f"{statistics.median(ratio):.2f} [{low:.2f}, {high:.2f}]")
        differ = sum(turn[way].tokens != turn[PLAIN].tokens for turn in turns)
        lines.append("| " + " | ".join([*cells, str(differ)]) + " |")
    return "\n".join(lines)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafters: Mapping[str, EagleDrafter],
    prompts: Sequence[Prompt],
    options: argparse.Namespace,
) -> dict[str, list[dict[str, Turn]]]:
    """The second turns of all prompts, by strategy."""
    found: dict[str, list[dict[str, Turn]]] = {name: [] for name in options.strategies}
    for number, prompt in enumerate(prompts):
        for name in options.strategies:
            speculate = {"assistant_models": drafters, "strategy": name}
            given = (model, tokenizer, prompt, speculate)
            if not found[name]:  # first passes cost more than later ones
                second_turns(*given, max_new_tokens=4, rotation=0)
            found[name].append(second_turns(*given, options.max_new_tokens, number))
        print(f"[{number + 1}/{len(prompts)}] {prompt.key}", file=sys.stderr, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 if an answer differed from plain's in float32, else 0."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        metavar="FILE[:COUNT]",
        help="JSON lines whose `turns` are two or more",
    )
    add_model_options(parser)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--draft-vocab", type=int, help="tokens that drafters score")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args(argv)
    check_model_options(parser, options)
    prompts = [prompt for spec in options.prompts for prompt in read_prompts(spec)]
    if short := [prompt.key for prompt in prompts if not prompt.later]:
        parser.error(f"--prompts: {short[0]} has one turn, expected two or more")
    set_threads(options.threads)
    model, tokenizer, drafters = load_models(options, "auto")
    if options.draft_vocab is not None:
        for drafter in drafters.values():
            drafter.score_only(options.draft_vocab)
    found = measure(model, tokenizer, drafters, prompts, options)
    print(
        f"{len(prompts)} second turns, {options.dtype}, greedy, at most {options.max_new_tokens} "
        f"tokens; {hardware(model.device)}, {torch.get_num_threads()} threads; torch "
        f"{torch.__version__}, transformers {transformers.__version__}, taps-hf "
        f"{taps_hf.__version__}  \n`{command(argv, 'conversations.py')}`\n\n"
        "| strategy | turn 2 | tau | first token's time, x plain | tokens/s, x plain | differ |"
        "\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, turns in found.items():
        print(table(turns, name))
    differ = any(
        turn.tokens != turns[PLAIN].tokens
        for of_strategy in found.values()
        for turns in of_strategy
        for turn in turns.values()
    )
    return int(differ and options.dtype == "float32")


if __name__ == "__main__":
    sys.exit(main())
