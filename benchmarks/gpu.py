"""What a cycle costs on a GPU, in steps of plain `generate`; one command, some minutes.

    python benchmarks/gpu.py --out docs/performance-gpu.md

Parts: what is launched (`launches.py`); a target of random weights in the shape of Llama-3-8B with
two random drafters, of which hardly anything is ever accepted, so that what a cycle costs can be
read off; training steps; and the embedded target with real drafters, end to end. `--shape tiny
--device cpu` runs all of it where there is no GPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import decode
import launches
import torch
import transformers
from models import DRAFTERS, add_compile_option, plain_compiled
from parts import all_parts, timed
from settings import command, hardware
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, PreTrainedModel

import taps_hf
from taps_hf import Confidence, DynamicTree, EagleDrafter, Merged, Single, Strategy
from taps_hf.checks import check_device
from taps_hf.files import check_writable, write_text
from taps_hf.measuring import now
from taps_hf.training.objectives import FrozenTarget, get_objective
from taps_hf.training.steps import IGNORED

SHAPES = {
    # Meta-Llama-3-8B-Instruct's.
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
}
TREES = (DynamicTree(5, 8, 24), DynamicTree(7, 10, 60))
PLAIN, COMPILED = "plain `generate`", ", compiled"
PROMPT = 256  # tokens
SHORT, LONG = 6, 30  # new tokens of two runs, whose difference is what cycles cost


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print or write Markdown."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parse(argv)
    device = torch.device(options.device)
    name = hardware(device)
    sections = [
        f"# What a cycle costs on {'a GPU' if device.type == 'cuda' else 'a CPU'}\n\n"
        f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, taps-hf "
        f"{taps_hf.__version__}; eager mode{'' if options.compile is None else ' and compiled'}."
        f"\n\n    {command(argv, 'gpu.py')}"
    ]
    for part in (_launches, _cycles, _training, _end_to_end):
        started = time.perf_counter()
        sections.append(part(options, device))
        print(
            f"{part.__name__}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True
        )
        text = "\n\n".join(sections) + "\n"
        if options.out is not None:
            write_text(options.out, text)
    print(text)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=[*SHAPES], default="llama-3-8b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--drafters", nargs="+", default=DRAFTERS, metavar="NAME=PATH")
    parser.add_argument("--prompts", nargs="+", default=decode.PROMPTS, metavar="FILE[:COUNT]")
    add_compile_option(parser)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args(argv)
    try:
        check_device(options.device)
        if options.out is not None:
            check_writable(options.out)
    except ValueError as error:
        parser.error(str(error))
    return options


def random_target(shape: str, device: torch.device) -> PreTrainedModel:
    """A Llama of random bfloat16 weights that never ends an answer."""
    config = AutoConfig.for_model("llama", **SHAPES[shape])
    torch.manual_seed(0)
    with device:
        target = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    target.generation_config.eos_token_id = None
    return target.eval().requires_grad_(False)


def _cycles(options: argparse.Namespace, device: torch.device) -> str:
    """Cycles of a random target, and the parts they are made of."""
    target = random_target(options.shape, device)
    scored = min(32000, target.config.vocab_size)
    drafters = [EagleDrafter.from_target(target, draft_token_ids=scored).eval() for _ in range(2)]
    ways: dict[str, tuple[Strategy, DynamicTree] | None] = {PLAIN: None}
    for tree in TREES:
        shown = f"depth {tree.depth}, {tree.num_nodes} nodes"
        ways[f"one drafter, {shown}"] = (Single(0), tree)
        ways[f"two, routed by confidence, {shown}"] = (Confidence(), tree)
        ways[f"two, merged, {shown} verified"] = (Merged(num_nodes=tree.num_nodes), tree)
    seconds, shares = _cost_of_cycles(target, drafters, ways, options.rounds, options.compile)
    plain = seconds[PLAIN]
    quickest = seconds.get(PLAIN + COMPILED)
    lines = [
        f"## A target in the shape of {options.shape}\n\nRandom weights, bfloat16, a prompt of "
        f"{PROMPT} tokens; drafters score {scored:,} tokens. Medians of {options.rounds} rounds, "
        "all ways in each; shares of a cycle are of runs in which the host waited for each part.\n",
        "| | ms a cycle | x plain step | x plain step, compiled | drafting | target | rest |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, value in seconds.items():
        cells = ["", "", ""]
        if name in shares:
            drafting, passing = shares[name]
            cells = [f"{share:.0%}" for share in (drafting, passing, 1 - drafting - passing)]
        against = "" if quickest is None else f"{value / quickest:.2f}"
        cells = [name, f"{value * 1e3:.2f}", f"{value / plain:.2f}", against, *cells]
        lines.append(f"| {' | '.join(cells)} |")
    parts = timed(all_parts(target, drafters, TREES[-1], PROMPT), options.rounds * 2, device)
    lines += ["\n| part, each waited for | ms |", "| --- | --- |"]
    lines += [f"| {name} | {value * 1e3:.2f} |" for name, value in parts.items()]
    return "\n".join(lines)


def _cost_of_cycles(
    target: PreTrainedModel,
    drafters: Sequence[EagleDrafter],
    ways: Mapping[str, tuple[Strategy, DynamicTree] | None],
    rounds: int,
    compile: CompileConfig | None,
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Seconds a cycle of every way, and the shares of drafting and of the target's pass.

    With `compile` of every way compiled, too.
    """
    device = target.device
    inputs = torch.arange(PROMPT, device=device)[None] * 7 % target.config.vocab_size

    names = [*ways]
    if compile is not None:
        names += [name + COMPILED for name in ways]

    def generate(name: str, tokens: int, **more: Any) -> Any:
        is_compiled = name.endswith(COMPILED)
        if (way := ways[name.removesuffix(COMPILED)]) is None:
            more |= plain_compiled(compile) if is_compiled else {}
        else:
            strategy, tree = way
            more |= {"compile": compile} if is_compiled else {}
            used = list(drafters[:1] if isinstance(strategy, Single) else drafters)
            more |= {"assistant_models": used, "strategy": strategy, "tree": tree}
        mask = torch.ones_like(inputs)
        shared = {"attention_mask": mask, "max_new_tokens": tokens, "do_sample": False}
        return target.generate(inputs, **shared, **more)

    # Apart from what is timed: to know how long its parts take, the host waits for them.
    cycles, shares = {}, {}
    for name in names:
        counts = []
        for tokens in (SHORT, LONG):
            out = generate(name, tokens, return_dict_in_generate=True)
            trace = getattr(out, "draft_trace", None)
            counts.append(tokens if trace is None else len(trace.cycles))
        cycles[name] = counts[1] - counts[0]
        if trace is not None:
            whole = sum(trace.seconds[phase] for phase in ("draft", "target", "rest"))
            shares[name] = trace.seconds["draft"] / whole, trace.seconds["target"] / whole
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times = []
            for tokens in (SHORT, LONG):
                start = now(device)
                generate(name, tokens)
                times.append(now(device) - start)
            found[name].append((times[1] - times[0]) / cycles[name])
    return {name: statistics.median(values) for name, values in found.items()}, shares


def _launches(_: argparse.Namespace, device: torch.device) -> str:
    """`launches.py`."""
    return "## What is launched\n\n" + launches.table(device)


def _end_to_end(options: argparse.Namespace, device: torch.device) -> str:
    """`decode.py` on the embedded target."""
    arguments = ["--device", options.device, "--dtype", "bfloat16", "--max-new-tokens", "96"]
    arguments += ["--trees", "5,8,24", "--drafters", *options.drafters]
    arguments += ["--prompts", *options.prompts]
    if (config := options.compile) is not None:
        arguments += ["--compile", ":".join(filter(None, (config.backend, config.mode)))]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        decode.main(arguments)
    return "## SmolLM2-135M-Instruct with trained drafters, end to end\n\n" + printed.getvalue()


def _training(options: argparse.Namespace, device: torch.device) -> str:
    """Tokens a second of training steps, features computed on the fly."""
    target = random_target(options.shape, device)
    scored, batch, length = min(32000, target.config.vocab_size), 4, 1024
    ids = torch.randint(0, target.config.vocab_size, (batch, length), device=device)
    labels = ids.clone()
    labels[:, : length // 4] = IGNORED
    lines = [
        f"## Training for the shape of {options.shape}\n\nForward, backward and AdamW on {batch} x "
        f"{length} random tokens, three quarters of them answers, autocast to bfloat16, draft "
        f"vocabulary of {scored:,}.\n",
        "| objective | tokens a second |",
        "| --- | --- |",
    ]
    for name in ("eagle", "hass"):
        drafter = EagleDrafter.from_target(target, draft_token_ids=scored).float().train()
        kind = get_objective(name)
        objective = kind(drafter, FrozenTarget(target, drafter), kind.options_with())
        optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-4)
        step = _step(objective, optimizer, ids, labels)
        seconds = timed({name: step}, options.rounds, device)[name]
        lines.append(f"| {name} | {batch * length / seconds:,.0f} |")
    return "\n".join(lines)


def _step(
    objective: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    labels: torch.Tensor,
) -> Callable[[], None]:
    def run() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = objective(ids, labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


if __name__ == "__main__":
    sys.exit(main())
