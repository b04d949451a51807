"""Times the parts of a generation apart: the prompt, passes of the target, drafting, composing.

    python benchmarks/parts.py --dtype bfloat16

Every part is run once a round, round after round; shown is the median over rounds. Below: the
memory that drafters take next to plain `generate`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from models import add_model_options, check_model_options, load_models
from settings import hardware
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from taps_hf import (
    Auto,
    ChainTree,
    Costs,
    DraftCost,
    DraftTree,
    DynamicTree,
    EagleDrafter,
    GenerationContext,
    merge,
)
from taps_hf.cache import CACHE
from taps_hf.checks import set_threads
from taps_hf.drafters.base import DraftRequest
from taps_hf.drafters.ensemble import Ensemble
from taps_hf.drafters.heads import topk_by_blocks
from taps_hf.measuring import now
from taps_hf.strategies.costs import LearntCosts
from taps_hf.target import TargetSession

Part = Callable[[], object]
WIDTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


def scoring(drafter: EagleDrafter, tokens: int | None) -> EagleDrafter:
    """The same drafter with so many tokens to score; None for all that the target has."""
    other = copy.deepcopy(drafter)
    other.score_only(tokens)
    return other


class Drafting:
    """Trees of some drafters in one context.

    Args:
        groups: drafters that run as one; groups run one after the other.
        target: whose features they read.
        tree: what is grown.
        tokens: (n,) int64: the context.
        states: by layer, what the target computed before them.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[EagleDrafter]],
        target: PreTrainedModel,
        tree: DynamicTree,
        tokens: torch.Tensor,
        states: Mapping[int, torch.Tensor],
    ) -> None:
        self._new = (tokens[-3:], {layer: x[-3:] for layer, x in states.items()})
        self._request = DraftRequest(tokens[-1:], tree, tree.depth)
        self._ensembles = [Ensemble(group, target) for group in groups]
        for ensemble in self._ensembles:
            ensemble.observe(tokens, states)

    def __call__(self) -> list[DraftTree]:
        trees: list[DraftTree] = []
        for ensemble in self._ensembles:
            ensemble.observe(*self._new)
            everyone = range(len(ensemble.drafters))
            trees += ensemble.propose(everyone, self._request).values()
        return trees


def timed(parts: Mapping[str, Part], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each part; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(rounds + 1):
        for name, part in parts.items():
            start = now(device)
            part()
            if number:
                seconds[name].append(now(device) - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Print a table."""
    options = _parse(argv)
    set_threads(options.threads)
    target, _, drafters = load_models(options, options.dtype)
    tree = DynamicTree(*options.tree)
    found = timed(
        all_parts(target, [*drafters.values()], tree, options.context),
        options.rounds,
        target.device,
    )
    plain = found["target, 1 row"]
    print(
        f"{options.dtype}, {options.context} tokens of context, trees {tree}, median of "
        f"{options.rounds} rounds; {hardware(target.device)}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n\n| part | ms | x plain step |\n| --- | --- | --- |"
    )
    for name, seconds in found.items():
        print(f"| {name} | {seconds * 1e3:.2f} | {seconds / plain:.2f} |")
    print("\n| memory of | MB | bytes a token of context |\n| --- | --- | --- |")
    for name, drafter in drafters.items():
        held, per_token = memory_of(drafter, target)
        print(f"| {name} | {held / 1e6:.1f} | {per_token} |")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--context", type=int, default=256, help="tokens before the root")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tree", nargs=3, type=int, default=[5, 8, 24])
    options = parser.parse_args(argv)
    check_model_options(parser, options)
    return options


def all_parts(
    target: PreTrainedModel, drafters: Sequence[EagleDrafter], tree: DynamicTree, context: int
) -> dict[str, Part]:
    """What is timed, by name.

    Args:
        target: whose passes are timed, and whose features drafters read.
        drafters: of that target.
        tree: that each of them grows.
        context: tokens before the root.
    """
    vocabulary = target.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(context + 1, device=target.device) * 7 % vocabulary)[None]
    session = _begun(target, ids)
    tokens, states = session.prefill()

    def draft(*groups: Sequence[EagleDrafter]) -> Drafting:
        return Drafting(groups, target, tree, tokens, states)

    def observe_prompt() -> None:
        ensemble = Ensemble(drafters, target)
        ensemble.observe(tokens, states)
        ensemble.propose(range(len(drafters)), DraftRequest(ids[0, -1:], ChainTree(1), 1))

    parts: dict[str, Part] = {
        f"target, {width} row{'s' * (width > 1)}": _verifying(session, ids[0, -1:], width)
        for width in WIDTHS
    }
    parts["prompt, plain generate's pass"] = lambda: target(ids, use_cache=True, logits_to_keep=1)
    parts["prompt, the target's pass with drafters"] = lambda: _begun(target, ids).prefill()
    parts["prompt, all drafters' pass"] = observe_prompt
    parts["draft, one drafter"] = draft(drafters[:1])
    scored = drafters[0].config.draft_vocab_size or vocabulary
    for size in (scored // 2, scored // 4, None):
        name = f"{vocabulary if size is None else size:,}"
        parts[f"draft, one drafter, {name} tokens"] = draft([scoring(drafters[0], size)])
    logits = torch.randn(tree.top_k, scored, device=target.device)
    parts["children of one level, torch's topk"] = lambda: logits.topk(tree.top_k)
    parts["children of one level, topk by blocks"] = lambda: topk_by_blocks(logits, tree.top_k)
    if len(drafters) > 1:
        parts[f"draft, {len(drafters)} drafters one by one"] = draft(*([d] for d in drafters))
        parts[f"draft, {len(drafters)} drafters as one"] = draft(drafters)
        trees = draft(drafters)()
        parts["merge"] = lambda: merge(trees)
        parts["merge, calibrate and choose (auto)"] = _choosing(trees)
    return parts


def _verifying(session: TargetSession, root: torch.Tensor, width: int) -> Part:
    """A pass of the target over so many tokens, none of which is kept."""
    star = DraftTree.star(root.cpu(), width - 1)

    def run() -> None:
        session.verify(star)
        session.keep([])

    return run


def _choosing(trees: Sequence[DraftTree]) -> Part:
    """What `auto` does with the trees of all drafters."""
    count, each = len(trees), (DraftCost(0.0, 0.0),)
    free = Costs(((1, 1.0), (64, 2.0)), (tuple(range(count)),), each, each)
    context = GenerationContext(count, torch.device("cpu"), lambda: LearntCosts(free))
    strategy = Auto(costs=free).begin(context)

    def compose() -> None:
        strategy.ask(tuple(range(count)))
        strategy.compose(dict(enumerate(trees)))

    return compose


def _begun(target: PreTrainedModel, ids: torch.Tensor) -> TargetSession:
    """A generation whose prompt has not been run yet."""
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    return TargetSession(target, ids, GenerationConfig(), {CACHE: cache})


def memory_of(drafter: EagleDrafter, target: PreTrainedModel) -> tuple[int, int]:
    """Bytes that one drafter takes next to plain `generate`.

    Returns:
        its weights and its rows of the target's head (stacked drafters have their linear layers
        once more, in the stack); and keys and values for each token of context.
    """
    held = sum(x.numel() * x.element_size() for x in drafter.parameters())
    if drafter.draft_token_ids is not None:
        rows = len(drafter.draft_token_ids)
        held += rows * target.get_output_embeddings().weight.shape[1] * drafter.dtype.itemsize
    cache = DynamicCache(config=drafter.trunk.config)
    embeds = torch.zeros(
        1, 1, drafter.config.hidden_size, dtype=drafter.dtype, device=drafter.device
    )
    drafter(inputs_embeds=embeds, features=embeds, past_key_values=cache)
    states = (cache.layers[0].keys, cache.layers[0].values)
    return held, sum(x.numel() * x.element_size() for x in states)


if __name__ == "__main__":
    sys.exit(main())
