"""`taps-hf check`: does a drafter draft, and if not, why not?

A head that was read wrongly raises no error: it just accepts nothing. So a few answers of the
target are drafted again at every position, and what is right is counted by depth. Where that is far
below what is usual, the drafter is tried once more with each of the things changed that checkpoints
are silent or wrong about. What helps is the cause.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checks import check_device, set_threads
from .drafters.modeling_eagle3 import Eagle3Drafter
from .drafters.modeling_feature import FeatureDrafter
from .evaluation.forest import Spot
from .evaluation.records import Record, RecordOptions, generate_seeded, states_of
from .evaluation.replay import OneByOne
from .loading import load_drafter, load_target
from .target import LAST
from .training.commands import add_target_arguments
from .training.conversations import DataReport, DataSource, UnusableRowError, messages_of, read_rows
from .trees.shapes import ChainTree

DEPTH = 5
TYPICAL = ((0.5, 0.9),) * DEPTH
"""Of drafts right until there, what share of the next tokens is right: lower and upper ends.
(Those in hub_cards have 51 to 54 % at first and 52 to 92 % deeper, on this command's prompts.)"""
_FAR_BELOW = 0.5  # times the lower end, at the first token
_HELPS = 1.5  # times as many right first tokens, and at least ...
_CLEARLY = 0.05  # ... so many more, and so many standard errors: of many things tried
_SURELY = 3.0  # on few drafts one seems to help by chance
_PROMPTS = (
    "A shop sells pencils at 3 for 2 dollars. How much do 18 pencils cost? Explain step by step.",
    "Write a short e-mail that asks a colleague for the minutes of yesterday's meeting.",
    "What is the capital of France, and what is it known for?",
    "Solve for x: 2x + 7 = 31. Show your work.",
    "Give me three tips for learning to cook.",
    "Explain what a hash table is to somebody who has never programmed.",
)


@dataclass(frozen=True)
class Acceptance:
    """How a drafter did at the positions of some answers.

    Args:
        right: (DEPTH,) drafts whose first d tokens were right.
        tried: (DEPTH,) drafts whose first d - 1 tokens were right and were followed by more text.
    """

    right: tuple[int, ...]
    tried: tuple[int, ...]

    @property
    def by_depth(self) -> tuple[float, ...]:
        """Of drafts right until there, the share of which the next token is; NaN for none."""
        return tuple(r / t if t else float("nan") for r, t in zip(self.right, self.tried))

    @property
    def first(self) -> float:
        """The share of right first tokens."""
        return self.by_depth[0]


@dataclass(frozen=True)
class Diagnosis:
    """What [`diagnose`] found.

    Args:
        found: of the drafter as it is.
        changed: of it with one thing changed, by what was; only where little is accepted.
        causes: sentences, the likeliest first; none where all is as usual.
    """

    found: Acceptance
    changed: dict[str, Acceptance]
    causes: list[str]


def answers(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[Record]:
    """The target's greedy answers, with its states."""
    found = []
    options = RecordOptions(max_new_tokens=max_new_tokens)
    for number, text in enumerate(prompts):
        said = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        tokens = generate_seeded(target, prompt, options, 0)[0].cpu()
        start, none = len(prompt), torch.empty(0)
        record = Record("check", str(number), "", 0, 0.0, tokens, start, len(tokens), none, none)
        found.append(record)
    return found


@torch.no_grad()
def accepted(
    drafter: FeatureDrafter,
    target: PreTrainedModel,
    records: Sequence[Record],
    states: Sequence[dict[int, torch.Tensor]],
    every: int = 1,
) -> Acceptance:
    """Draft chains along answers, and count what is right.

    Args:
        drafter: the drafter.
        target: whose answers they are.
        records: the answers.
        states: of each, by layer.
        every: drafts begin at one position of so many.
    """
    grower = OneByOne(drafter, target, ChainTree(DEPTH), records, states)
    right, tried = [0] * DEPTH, [0] * DEPTH
    for number, record in enumerate(records):
        for root in range(record.answer_start, len(record.tokens) - 1, every):
            (tree,) = grower.grow([Spot(number, root, DEPTH)])
            text = record.tokens[root + 1 : root + 1 + DEPTH].tolist()
            for depth, (token, wanted) in enumerate(zip(tree.tokens[1:].tolist(), text)):
                tried[depth] += 1
                if token != wanted:
                    break
                right[depth] += 1
    return Acceptance(tuple(right), tuple(tried))


def diagnose(
    drafter: FeatureDrafter, target: PreTrainedModel, records: Sequence[Record]
) -> Diagnosis:
    """Measure a drafter, and look for the cause if little is accepted.

    Args:
        drafter: that fits the target by its sizes.
        target: the target.
        records: answers, as [`answers`] gives them.

    Raises:
        ValueError: if the answers have fewer than two tokens.
    """
    layers = range(target.config.get_text_config(decoder=True).num_hidden_layers)
    needed = {LAST, *drafter.reads_layers}
    needed |= {
        n for n in (near for layer in needed for near in (layer - 1, layer + 1)) if n in layers
    }
    needed.add(layers[-1])
    states = [states_of(record, target, sorted(needed)) for record in records]
    found = accepted(drafter, target, records, states)
    if not found.tried[0]:
        raise ValueError("The answers have no tokens to draft, expected longer ones.")
    if found.first >= _FAR_BELOW * TYPICAL[0][0]:
        return Diagnosis(found, {}, [])
    few = max(found.tried[0] // 200, 1)
    base = accepted(drafter, target, records, states, few)
    changed = {}
    for what, other, shift in _changes(drafter, target):
        seen = [{n: _late(x, shift) for n, x in known.items()} for known in states]
        changed[what] = accepted(other, target, records, seen, few)
    return Diagnosis(found, changed, _causes(drafter, target, base, changed))


def _late(states: torch.Tensor, shift: int) -> torch.Tensor:
    """Each position's states one later, so that slots pair tokens with those before."""
    return torch.cat([states[:1], states[:-1]]) if shift else states


def _changes(
    drafter: FeatureDrafter, target: PreTrainedModel
) -> Iterator[tuple[str, FeatureDrafter, int]]:
    """What may be wrong, the drafter without it, and whether states come one position late."""
    count = target.config.get_text_config(decoder=True).num_hidden_layers
    if isinstance(drafter, Eagle3Drafter):
        ids = drafter.config.layer_ids
        for by in (1, -1):
            moved = [layer + by for layer in ids]
            if all(1 <= layer <= count for layer in moved):
                yield (
                    f"layer ids off by one: hidden_states {moved} instead of {ids} (`--layer-ids`)",
                    _configured(drafter, layer_ids=moved),
                    0,
                )
        for flag in ("norm_before_residual", "norm_output"):
            value = not getattr(drafter.config, flag)
            yield f"norms: `{flag}` {value}", _configured(drafter, **{flag: value}), 0
    else:
        other = copy.copy(drafter)
        other.reads_layers = (count - 1,)
        yield "norms: features from before the target's final norm", other, 0
        if drafter.fc.bias is not None:
            other = copy.deepcopy(drafter)
            other.fc.bias.data.zero_()
            yield "bias: a projection without its bias (`fc.bias`)", other, 0
    yield "positions: features one position later than tokens", drafter, 1
    yield from _rotated(drafter, target)


def _configured(drafter: Eagle3Drafter, **fields: object) -> Eagle3Drafter:
    """The same weights under another configuration."""
    other = copy.deepcopy(drafter)
    for name, value in fields.items():
        setattr(other.config, name, value)
    other.trunk.layers[0].norm_before_residual = other.config.norm_before_residual
    return other


def _rotated(
    drafter: FeatureDrafter, target: PreTrainedModel
) -> Iterator[tuple[str, FeatureDrafter, int]]:
    """The same weights with other bases of rotary positions: the target's and the usual one."""
    own = getattr(drafter.trunk.config, "rope_parameters", None) or {}
    theirs = target.config.get_text_config(decoder=True)
    theirs = (getattr(theirs, "rope_parameters", None) or {}).get("rope_theta")
    for theta in {theirs, 10000.0} - {None, own.get("rope_theta")}:
        other = copy.deepcopy(drafter)
        other.trunk.config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
        rotary = type(drafter.trunk.rotary_emb)(config=other.trunk.config)
        other.trunk.rotary_emb = rotary.to(drafter.device)
        yield f"positions: `rope_theta` {theta:g} instead of {own.get('rope_theta')}", other, 0


def _causes(
    drafter: FeatureDrafter,
    target: PreTrainedModel,
    base: Acceptance,
    changed: dict[str, Acceptance],
) -> list[str]:
    found = []
    for what, other in sorted(changed.items(), key=lambda item: -item[1].first):
        if _helps(base, other):
            found.append(
                f"{what}: {other.first:.0%} of first tokens are right, not {base.first:.0%}"
            )
    made_for, name = drafter.config.target_name_or_path, target.config.name_or_path
    if made_for and name and Path(made_for).name != Path(name).name:
        found.append(f"wrong target: it was made for {made_for}, and this is {name}")
    if not found:
        found.append(
            "none of the changes tried helps: it may be made for another target or revision of it, "
            "another chat template or tokenizer, or trained too little"
        )
    return found


def _helps(base: Acceptance, other: Acceptance) -> bool:
    """Whether clearly more first tokens are right, and not by chance."""
    share = (base.right[0] + other.right[0]) / (base.tried[0] + other.tried[0])
    error = math.sqrt(share * (1 - share) * (1 / base.tried[0] + 1 / other.tried[0]))
    more = max(_CLEARLY, _SURELY * error)
    return other.first > max(_HELPS * base.first, base.first + more)


def report(diagnosis: Diagnosis) -> str:
    """What people read."""
    found = diagnosis.found
    rows = [
        ["depth", *(str(depth) for depth in range(1, DEPTH + 1))],
        ["right", *(_share(value) for value in found.by_depth)],
        ["usual", *(f"{low:.0%}-{high:.0%}" for low, high in TYPICAL)],
        ["of drafts", *(str(count) for count in found.tried)],
    ]
    lines = ["".join(f"{cell:>10}" for cell in row) for row in rows]
    if not diagnosis.causes:
        return "\n".join([*lines, "The drafter drafts."])
    lines.append("Far below what is usual. Likely causes:")
    lines += [f"- {cause}" for cause in diagnosis.causes]
    lines += [f"  ({what}: {_share(other.first)})" for what, other in diagnosis.changed.items()]
    return "\n".join(lines)


def _share(value: float) -> str:
    return "-" if value != value else f"{value:.0%}"  # NaN is not itself


def _prompts(file: str | None, count: int) -> list[str]:
    """The first messages of users in a file of conversations; built-in ones without a file."""
    if file is None:
        return list(_PROMPTS[:count])
    report = DataReport()
    found = []
    for row in read_rows(DataSource(file, count=count), report, seed=0):
        try:
            messages = messages_of(row.fields)
        except UnusableRowError as error:
            report.count(str(error), row.where)
            continue
        found += [said["content"] for said in messages if said["role"] == "user"][:1]
    if not found:
        raise ValueError(f"`data` ({file}) has no conversation that can be used: {report}.")
    return found


def add_check(commands: argparse._SubParsersAction) -> None:
    """Add `taps-hf check`."""
    parser = commands.add_parser(
        "check",
        help="whether a drafter drafts for a target, and if not, why",
        description="Answers a few prompts, drafts them again at every position, and counts what "
        "is right by depth. If that is little, it tries what checkpoints are often wrong about.",
    )
    parser.add_argument(
        "drafter", metavar="DRAFTER", help="folder or Hub name, in any known format"
    )
    add_target_arguments(parser)
    parser.add_argument("--data", metavar="FILE", help="conversations to take prompts from")
    parser.add_argument("--prompts", type=int, default=len(_PROMPTS), help="how many (default: 6)")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--layer-ids", type=int, nargs="+", metavar="L", help="as of convert")
    parser.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> None:
    set_threads(options.threads)
    torch.set_flush_denormal(True)  # which CPUs take many times as long over
    check_device(options.device)
    prompts = _prompts(options.data, options.prompts)
    dtype = getattr(torch, options.dtype)
    target, tokenizer = load_target(options.target, dtype, options.device, options.chat_template)
    drafter = load_drafter(options.drafter, target, tokenizer, layer_ids=options.layer_ids)
    records = answers(target, tokenizer, prompts, options.max_new_tokens)
    print(report(diagnose(drafter, target, records)))
