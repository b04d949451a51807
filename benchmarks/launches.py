"""Counts what a cycle gives a GPU to do, in steps of plain `generate`; on any machine.

    python benchmarks/launches.py

In eager mode a pass over few tokens takes a GPU as long as launching its kernels does. Counted are
the operations that torch dispatches, less those that only look at a tensor in another way; that is
nearly the number of kernels, and the same on every machine. The target is a tiny Llama of random
weights with as many layers as Llama-3-8B. Of random drafters' trees nothing is accepted, so there
is a row whose drafters foresee everything: eight tokens a cycle, and a path to keep. On a GPU
(`--device cuda`) only what has to do with its memory is counted, and the moments at which the host
waits for it are counted as well; on a CPU the host's own small tensors count, too.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from taps_hf import Confidence, DynamicTree, EagleDrafter, Merged, Single

LAYERS = 32
TREE = DynamicTree(7, 10, 60)
# New tokens of two runs whose difference is made of cycles alone, whole ones if all is accepted.
SHORT, LONG = 8, 48
# Give memory, or the same memory under another name: a GPU does nothing.
_NO_WORK = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach"}
_NO_WORK |= {"_unsafe_view", "_reshape_alias", "lift_fresh", "alias", "_local_scalar_dense"}


class WorkCounter(TorchDispatchMode):
    """Counts dispatched operations that do work on a device, by name."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view and (name := func.overloadpacket.__name__) not in _NO_WORK:
            tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, torch.Tensor)]
            self.counts[name] += any(x.device.type == self.device.type for x in tensors)
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    print(table(torch.device(options.device)))
    return 0


def table(device: torch.device) -> str:
    """Operations, and on a GPU waits, of a plain step and of cycles, as Markdown."""
    target = tiny_target(device)
    drafters = [EagleDrafter.from_target(target, draft_token_ids=64).eval() for _ in range(2)]
    ways = {
        "plain `generate`": {},
        "one drafter": {"assistant_models": drafters[:1], "strategy": Single()},
        "two drafters, merged": {"assistant_models": drafters, "strategy": Merged()},
        "two drafters, merged within a budget": {
            "assistant_models": drafters,
            "strategy": Merged(num_nodes=TREE.num_nodes),
        },
        "two drafters, routed": {"assistant_models": drafters, "strategy": Confidence()},
        "two drafters, merged, who foresee everything": {
            "assistant_models": drafters,
            "strategy": Merged(),
        },
    }
    lines = [
        f"Trees of depth {TREE.depth} and {TREE.num_nodes} nodes; {LAYERS} layers; torch "
        f"{torch.__version__}, {device.type}.\n",
        "| | operations | x plain step | waits of the host |",
        "| --- | --- | --- | --- |",
    ]
    plain = None
    for name, arguments in ways.items():
        if arguments:
            arguments = {**arguments, "tree": TREE}
        if name.endswith("everything"):
            foresee_everything(target, drafters)
        work, waits = per_cycle(target, arguments)
        plain = plain or work
        shown = "" if waits is None else f"{waits:.1f}"
        lines.append(f"| {name} | {work:.0f} | {work / plain:.2f} | {shown} |")
    return "\n".join(lines)


def tiny_target(device: torch.device) -> PreTrainedModel:
    """A Llama of random weights with as many layers as Llama-3-8B."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(device).eval()


@torch.no_grad()
def foresee_everything(target: PreTrainedModel, drafters: Sequence[EagleDrafter]) -> None:
    """Let the target say one token whatever it reads, and drafters hand its features on."""
    target.get_input_embeddings().weight[:, 0] = 50.0  # beside which nothing else matters
    target.get_output_embeddings().weight[5, 0] = 10.0
    width = target.config.hidden_size
    for drafter in drafters:
        drafter.fc.weight.copy_(torch.eye(width, 2 * width).roll(width, dims=1))
        if drafter.fc.bias is not None:
            drafter.fc.bias.zero_()


def per_cycle(target: PreTrainedModel, arguments: dict[str, Any]) -> tuple[float, float | None]:
    """Operations of a cycle, and how often the host waits for a GPU (None on a CPU)."""

    def run(tokens: int, **more: Any) -> Any:
        torch.manual_seed(0)
        inputs = torch.arange(16, device=target.device)[None]
        mask = torch.ones_like(inputs)
        return target.generate(
            inputs, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **arguments, **more
        )

    counts = []
    for tokens in (SHORT, LONG):
        out = run(tokens, return_dict_in_generate=True)
        trace = getattr(out, "draft_trace", None)
        counts.append(tokens if trace is None else len(trace.cycles))
    cycles = counts[1] - counts[0]
    work, waits = [], []
    for tokens in (SHORT, LONG):
        with WorkCounter(target.device) as counter:
            run(tokens)
        work.append(counter.counts.total())
        if target.device.type == "cuda":
            waits.append(_waits(lambda tokens=tokens: run(tokens)))
    waited = (waits[1] - waits[0]) / cycles if waits else None
    return (work[1] - work[0]) / cycles, waited


def _waits(run: Callable[[], object]) -> int:
    """How often the host waits for the GPU, by torch's own warnings."""
    with _synchronisations_warn(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return sum("synchroniz" in str(warning.message) for warning in caught)


@contextmanager
def _synchronisations_warn() -> Any:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    sys.exit(main())
