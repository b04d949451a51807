"""Times generation with drafters against plain `generate` in the same run, prompt by prompt.

    python benchmarks/decode.py --prompts gsm8k.jsonl:20 mt_bench.jsonl:20 --out results.json

What is measured, and how: README.md beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from prompts import Prompt, read_prompts
from results import Results, Row, markdown, read_results
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import taps_hf
from taps_hf import Auto, Confidence, DynamicTree, EagleDrafter, Merged, Single, Strategy
from taps_hf.checks import check_device, named_paths, set_threads
from taps_hf.embedded import (
    EMBEDDED_DRAFTERS,
    load_embedded_target,
    load_embedded_tokenizer,
)
from taps_hf.files import check_writable
from taps_hf.trace import first_difference

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [str(ROOT / "examples" / "prompts" / f"{kind}.jsonl") for kind in ("math", "chat")]
DRAFTERS = [f"{name}={ROOT / 'hub_cards' / folder}" for name, folder in EMBEDDED_DRAFTERS.items()]
STRATEGIES = (
    "auto",
    "auto-all",
    "prompt-lookup",
    "single",
    "confidence",
    "confidence-per-prompt",
    "merged",
    "merged-equal-budget",
    "concatenated",
)
PROMPT_LOOKUP = 10  # tokens that transformers' prompt lookup proposes, as its documentation does


@dataclass(frozen=True)
class Variant:
    """A way to decode.

    Args:
        name: as it is shown.
        strategy: how drafters are composed; None for transformers' own prompt lookup.
        tree: of each drafter; None for the strategy's own.
    """

    name: str
    strategy: Strategy | None
    tree: DynamicTree | None

    def arguments(self, drafters: Mapping[str, EagleDrafter]) -> dict[str, Any]:
        """What `generate` gets."""
        if self.strategy is None:
            return {"prompt_lookup_num_tokens": PROMPT_LOOKUP}
        tree = {} if self.tree is None else {"tree": self.tree}
        if isinstance(self.strategy, Single):  # others would not draft, but read along
            name = list(drafters)[self.strategy.index]
            return {"assistant_models": [drafters[name]], **tree}
        return {"assistant_models": drafters, "strategy": self.strategy, **tree}


def variants(
    drafters: Sequence[str],
    trees: Sequence[tuple[int, int, int]],
    strategies: Sequence[str] = STRATEGIES,
) -> list[Variant]:
    """Every strategy, with every tree where it has not its own; of one drafter only `single`.

    Args:
        drafters: their names, in the order in which `generate` gets them.
        trees: (depth, top_k, num_nodes) of each drafter's tree.
        strategies: some of `STRATEGIES`. "auto-all" is auto with all drafters in every cycle.
            "merged" verifies the union of all trees, up to num_nodes
            for each drafter; "merged-equal-budget" the num_nodes best of it.
    """
    found = []
    if "auto" in strategies:
        found.append(Variant("auto", Auto(), None))
    if "auto-all" in strategies and len(drafters) > 1:
        found.append(Variant("auto-all", Auto(explore=1), None))
    if "prompt-lookup" in strategies:
        found.append(Variant("prompt-lookup", None, None))
    for depth, top_k, num_nodes in trees:
        tree = DynamicTree(depth, top_k, num_nodes)
        ways: dict[str, Strategy] = {}
        if "single" in strategies:
            ways |= {f"single {name}": Single(i) for i, name in enumerate(drafters)}
        several: dict[str, Strategy] = {
            "confidence": Confidence(),
            "confidence-per-prompt": Confidence(per="prompt"),
            "merged": Merged(),
            "merged-equal-budget": Merged(num_nodes=num_nodes),
            "concatenated": Merged(packing="concatenate"),
        }
        if len(drafters) > 1:
            ways |= {name: way for name, way in several.items() if name in strategies}
        found += [
            Variant(f"{name} {depth},{top_k},{num_nodes}", s, tree) for name, s in ways.items()
        ]
    return found


def measure(
    model: PreTrainedModel,
    drafters: Mapping[str, EagleDrafter],
    pending: Sequence[Variant],
    prompt: Prompt,
    input_ids: torch.Tensor,
    generate: Mapping[str, Any],
    rotation: int = 0,
    seed: int = 0,
) -> list[Row]:
    """Answer one prompt by plain `generate` and by every variant.

    Args:
        model: the target.
        drafters: by name.
        pending: the variants to measure.
        prompt: what `input_ids`, (1, T) int64 on the target's device, stand for.
        input_ids: the prompt's tokens.
        generate: arguments that all calls share.
        rotation: how far the order (plain, then the variants) is rotated.
        seed: of the random numbers, before every call.

    Returns:
        one row a variant, in the order of `pending`.
    """
    order: list[Variant | None] = [None, *pending]
    shift = rotation % len(order)
    outputs, seconds, passes = {}, {}, {}
    for variant in order[shift:] + order[:shift]:
        torch.manual_seed(seed)
        with _counted_passes(model) as count:
            start = _now(model.device)
            outputs[variant] = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                return_dict_in_generate=True,
                **generate,
                **({} if variant is None else variant.arguments(drafters)),
            )
            seconds[variant] = _now(model.device) - start
        passes[variant] = len(count)

    length = input_ids.shape[1]
    answers = {variant: out.sequences[0, length:].tolist() for variant, out in outputs.items()}
    rows = []
    for variant in pending:
        trace = getattr(outputs[variant], "draft_trace", None)
        details: dict[str, Any] = {"cycles": passes[variant]}
        if trace is not None:
            details = {
                "cycles": len(trace.cycles),
                "accepted": sum(cycle.accepted_length for cycle in trace.cycles),
                "nodes": sum(cycle.num_nodes for cycle in trace.cycles),
                "drafters": sum(len(cycle.drafters) for cycle in trace.cycles),
                **{f"seconds_{p}": trace.seconds[p] for p in ("draft", "target", "rest")},
            }
        rows.append(
            Row(
                prompt=prompt.key,
                group=prompt.group,
                variant=variant.name,
                tokens=len(answers[variant]),
                seconds=seconds[variant],
                plain_tokens=len(answers[None]),
                plain_seconds=seconds[None],
                differs_at=first_difference(answers[None], answers[variant]),
                **details,
            )
        )
    return rows


@contextmanager
def _counted_passes(model: PreTrainedModel) -> Iterator[list[None]]:
    """A list that grows by one with every call of the model by transformers' own loops."""
    passes: list[None] = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(None))
    try:
        yield passes
    finally:
        handle.remove()


def run(
    model: PreTrainedModel,
    drafters: Mapping[str, EagleDrafter],
    ways: Sequence[Variant],
    prompts: Sequence[Prompt],
    encode: Callable[[str], torch.Tensor],
    generate: Mapping[str, Any],
    results: Results,
    seed: int = 0,
) -> None:
    """Measure what `results` lacks, and keep it there prompt by prompt.

    Args:
        model: the target.
        drafters: by name.
        ways: the variants.
        prompts: in the order in which they are asked.
        encode: the (1, T) int64 tokens of a text, on the target's device.
        generate: arguments that all calls share.
        results: where rows go.
        seed: of the first prompt's random numbers; later prompts count on from it.
    """
    warm = False
    for i, prompt in enumerate(prompts):
        pending = [way for way in ways if not results.has(prompt.key, way.name)]
        if not pending:
            continue
        input_ids = encode(prompt.text)
        if not warm:  # first passes cost more than later ones
            measure(model, drafters, pending, prompt, input_ids, {**generate, "max_new_tokens": 4})
            warm = True
        rows = measure(model, drafters, pending, prompt, input_ids, generate, i, seed + i)
        results.add(rows)
        best = max(rows, key=lambda row: row.ratio)
        print(
            f"[{i + 1}/{len(prompts)}] {prompt.key}: plain {rows[0].plain_tokens} tokens in "
            f"{rows[0].plain_seconds:.1f} s; best {best.variant}, {best.ratio:.2f} x plain",
            file=sys.stderr,
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 if an answer differed from plain's in float32, else 0."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parse(argv)
    prompts = [prompt for spec in options.prompts for prompt in read_prompts(spec)]
    set_threads(options.threads)
    if options.out is not None:  # before models are loaded
        check_writable(options.out)
        if options.out.exists():
            read_results(options.out)
    model, tokenizer = load_target(options.target, options.dtype, options.device)
    dtype = model.dtype
    drafters = load_drafters(options.drafters, options.drafter_dtype, model.device)
    if options.draft_vocab is not None:
        for drafter in drafters.values():
            drafter.score_only(options.draft_vocab)

    filler = "\n\n".join(prompt.text for prompt in prompts)

    def encode(text: str) -> torch.Tensor:
        ids = _tokens(tokenizer, text)
        if (missing := options.context - ids.shape[1]) > 0:
            # Other questions above this one, cut to the length asked for.
            above = tokenizer(filler, add_special_tokens=False)["input_ids"]
            above = (above * (missing // len(above) + 1))[:missing]
            ids = _tokens(tokenizer, f"{tokenizer.decode(above)}\n\n{text}")
        return ids.to(model.device)

    generate: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    if options.temperature:
        generate |= {"do_sample": True, "temperature": options.temperature, "top_k": 0}
    settings = _settings(options, model, drafters)
    results = Results(options.out, settings)
    ways = variants(list(drafters), options.trees, options.strategies)
    run(model, drafters, ways, prompts, encode, generate, results, options.seed)

    keys, names = {prompt.key for prompt in prompts}, {way.name for way in ways}
    rows = [row for row in results.rows if row.prompt in keys and row.variant in names]
    differing = sum(row.differs_at is not None for row in rows)
    print(f"{_heading(settings)}  \n`{_command(argv)}`\n\n{markdown(rows)}")
    print(
        f"\n{differing} of {len(rows)} answers differ from plain generate's ({settings['dtype']})."
    )
    ours = [row for row in rows if row.accepted is not None]  # not prompt lookup's
    wrong = any(row.differs_at is not None for row in ours)
    return int(wrong and dtype == torch.float32)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=PROMPTS,
        metavar="FILE[:COUNT]",
        help="JSON lines with `turns` or `instruction` (default: the examples' own)",
    )
    parser.add_argument("--target", help="folder or Hub name (default: the embedded one)")
    parser.add_argument("--drafters", nargs="+", default=DRAFTERS, metavar="NAME=PATH")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument(
        "--trees",
        nargs="+",
        type=_tree,
        default=[(3, 8, 15), (5, 8, 24)],
        metavar="DEPTH,TOP_K,NUM_NODES",
        help="of each drafter's tree (default: 3,8,15 5,8,24)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--drafter-dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="default: as saved",
    )
    parser.add_argument(
        "--draft-vocab", type=int, help="tokens that drafters score (default: as saved)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's own)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--context", type=int, default=0, help="tokens of each prompt at least, filled up with text"
    )
    parser.add_argument("--out", type=Path, help="file of results to write or to go on with")
    options = parser.parse_args(argv)
    try:
        named_paths(options.drafters, "--drafters")
        check_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    return options


def _tree(text: str) -> tuple[int, int, int]:
    """For argparse, which says what was wrong with which argument."""
    if not re.fullmatch(r"[1-9]\d*,[1-9]\d*,[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not DEPTH,TOP_K,NUM_NODES, all positive")
    depth, top_k, num_nodes = map(int, text.split(","))
    return depth, top_k, num_nodes


def load_target(name: str | None, dtype: str, device: str) -> tuple[PreTrainedModel, Any]:
    """A model and its tokenizer; None is the embedded one."""
    transformers.utils.logging.disable_progress_bar()
    if name is None:
        model = load_embedded_target(getattr(torch, dtype))
        return model.to(device), load_embedded_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def load_drafters(
    specs: Sequence[str], dtype: str, device: torch.device
) -> dict[str, EagleDrafter]:
    """Drafters by name from NAME=PATH."""
    return {
        name: EagleDrafter.from_pretrained(path, dtype=dtype).to(device).eval()
        for name, path in named_paths(specs, "--drafters").items()
    }


def _tokens(tokenizer: Any, text: str) -> torch.Tensor:
    """(1, T) int64: the tokens of a question."""
    messages = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded["input_ids"]


def _settings(
    options: argparse.Namespace, model: PreTrainedModel, drafters: Mapping[str, EagleDrafter]
) -> dict[str, Any]:
    """What rows must have in common to be compared."""
    name = str(model.config.name_or_path)
    return {
        "target": Path(name).name if os.path.isdir(name) else name,
        "drafters": {name: _fingerprint(drafter) for name, drafter in drafters.items()},
        "dtype": options.dtype,
        "drafter_dtype": options.drafter_dtype,
        "draft_vocab": options.draft_vocab,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "context": options.context,
        "hardware": hardware(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "taps_hf": taps_hf.__version__,
    }


def _fingerprint(drafter: EagleDrafter) -> str:
    """12 hexadecimal digits that change with the drafter's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(drafter.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def hardware(device: torch.device) -> str:
    """What a device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        model = found[1].strip() if found else model
    return f"{model}, {os.cpu_count()} cores"


def _heading(settings: Mapping[str, Any]) -> str:
    temperature = settings["temperature"]
    scored = f" scoring {size} tokens" if (size := settings["draft_vocab"]) else ""
    return (
        f"{settings['target']}, {settings['dtype']}, drafters {settings['drafter_dtype']}{scored}, "
        f"{f'temperature {temperature}' if temperature else 'greedy'}, "
        f"at most {settings['max_new_tokens']} tokens"
        f"{f', after at least {context}' if (context := settings['context']) else ''}; "
        f"{settings['hardware']}, "
        f"{settings['threads']} threads; torch {settings['torch']}, transformers "
        f"{settings['transformers']}, taps-hf {settings['taps_hf']}"
    )


def _command(argv: Sequence[str]) -> str:
    """The command line; of paths that lead out of the working folder only the last part."""
    shown = [re.sub(r"(^|=)(/|\.\./)\S*/", r"\1", argument) for argument in argv]
    return shlex.join(["python", "benchmarks/decode.py", *shown])


def _now(device: torch.device) -> float:
    """Seconds on a clock, after what the device still had to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
