"""Random calls of `generate`, with plain arguments and with those of speculative decoding."""

from __future__ import annotations

import copy
import functools
import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

import taps_hf

from ..phrases import Phrases
from ..saved import letter_tokenizer
from ..tiny import FAMILIES, VOCAB, prompt, tiny_drafters, tiny_target

Arguments = dict[str, Any]
# Early versions want the whole sequence along with a cache. In chunks they run a prompt only where
# they are given a cache, and then all of it, also what an earlier turn's cache holds.
TAKES_ONLY_NEW = "_mask_length" in inspect.getsource(GenerationMixin.generate)
FEWEST_SCORED = 9  # tokens, by a drafter of `drafters_of`


@functools.cache
def drafters_of(family: str) -> tuple[taps_hf.Drafter, ...]:
    """Drafters of several kinds, shapes and dtypes: some can run as one, others cannot."""
    found = [*tiny_drafters(3, family), *tiny_drafters(2, family, torch.bfloat16)]
    found += tiny_drafters(1, family, draft_vocab=FEWEST_SCORED)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for shape in ({"fc_bias": True}, {"input_norm": True}, {"draft_token_ids": 12}):
            found.append(taps_hf.EagleDrafter.from_target(tiny_target(family), **shape).eval())
    right = tiny_target(family).generate(prompt(), max_new_tokens=30, do_sample=False)[0].tolist()
    found.append(Phrases(right[4:], list(range(VOCAB)), confidence=0.6))
    return tuple(found)


class PenaliseRecent(LogitsProcessor):
    """A processor with a state: what it was shown."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.shape[1])
        scores = scores.clone()
        scores[:, input_ids[0, -3:]] -= 2.0
        return scores


class StopAfter(StoppingCriteria):
    """Stops after two tokens side by side; remembers what it was shown."""

    def __init__(self, pair: tuple[int, int]) -> None:
        self.pair = pair
        self.seen: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids.shape[1])
        return torch.tensor([tuple(input_ids[0, -2:].tolist()) == self.pair])


class Recorder(BaseStreamer):
    """Keeps what is streamed, and how often it ended."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.seen.append("end")


class Whims(taps_hf.Strategy):
    """Asks whom it likes and verifies what it likes of that, by the number of the cycle alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.cycles = self.emitted = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.seed})"

    def begin(self, context: Any) -> taps_hf.Strategy:
        return copy.copy(self)

    def observe(self, outcome: taps_hf.CycleOutcome) -> None:
        self.cycles += 1
        self.emitted += len(outcome.tokens)

    def ask(self, everyone: tuple[int, ...]) -> tuple[int, ...]:
        choose = random.Random(f"{self.seed}/{self.cycles}")
        count = choose.choice([0, *range(1, len(everyone) + 1), len(everyone)])
        return tuple(sorted(choose.sample(everyone, count)))

    def compose(self, trees: Any) -> taps_hf.Choice:
        choose = random.Random(f"{self.seed}/{self.cycles}")
        some = sorted(choose.sample(sorted(trees), choose.randint(1, len(trees))))
        pack = choose.choice([taps_hf.merge, taps_hf.concatenate])
        tree = pack([trees[index] for index in some])
        if choose.random() < 0.3:
            tree = tree.best(choose.randint(1, 20))
        return taps_hf.Choice(self.changed(tree, choose), tuple(some))

    def changed(self, tree: taps_hf.DraftTree, choose: random.Random) -> taps_hf.DraftTree:
        """What is verified instead."""
        return tree


class Foresees(Whims):
    """Changes some proposals into what will be the answer: random drafters are seldom right.

    Args:
        answer: of plain `generate`; it may be given later.
    """

    def __init__(self, seed: int, answer: Sequence[int] = ()) -> None:
        super().__init__(seed)
        self.answer = answer

    def changed(self, tree: taps_hf.DraftTree, choose: random.Random) -> taps_hf.DraftTree:
        tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
        node = 0
        for right in self.answer[self.emitted :]:
            children = [child for child, parent in enumerate(parents) if parent == node]
            if not children or choose.random() < 0.1:
                break
            node = choose.choice(children)
            for child in children:  # siblings stay distinct
                if tokens[child] == right:
                    tokens[child] = tokens[node]
            tokens[node] = right
        return replace(tree, tokens=torch.tensor(tokens))


@dataclass
class Call:
    """One call of `generate`.

    Args:
        common: arguments that plain `generate` takes, too.
        ours: arguments of speculative decoding.
        seed: of sampling; None for greedy.
    """

    common: Arguments
    ours: Arguments
    seed: int | None = None
    observers: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        ours = dict(self.ours)
        drafters = ours.pop("assistant_models")
        single = isinstance(drafters, taps_hf.Drafter)
        listed = [drafters] if single else getattr(drafters, "values", lambda: drafters)()
        shapes = [
            (d.dtype, d.config.draft_vocab_size, d.config.fc_bias, d.config.input_norm)
            if isinstance(d, taps_hf.EagleDrafter)
            else d
            for d in listed
        ]
        return f"  seed {self.seed}, {self.common}\n  {ours}\n  {type(drafters).__name__}: {shapes}"

    def arguments(self, drafted: bool) -> Arguments:
        """What to call with, with processors, criteria and streamers of its own.

        Those are left in `observers`.
        """
        given = dict(self.common)
        self.observers = {}
        if given.pop("penalise_recent", False):
            self.observers["processor"] = PenaliseRecent()
            given["logits_processor"] = LogitsProcessorList([self.observers["processor"]])
        if pair := given.pop("stop_after", None):
            self.observers["criterion"] = StopAfter(pair)
            given["stopping_criteria"] = StoppingCriteriaList([self.observers["criterion"]])
        if given.pop("streams", False):
            self.observers["streamer"] = given["streamer"] = Recorder()
        if "stop_strings" in given:
            given["tokenizer"] = letter_tokenizer()
        if not drafted:
            return given
        ours = dict(self.ours)
        if ours.pop("as_custom_generate", False):
            settings = {**ours, "streamer": given.get("streamer")}
            return {**given, "custom_generate": taps_hf.SpeculativeDecoding(**settings)}
        return {**given, **ours}

    def foretell(self, answer: list[int]) -> None:
        """Tell the strategy, if it can use it, what plain `generate` has answered."""
        if isinstance(self.ours["strategy"], Foresees):
            self.ours["strategy"].answer = answer

    def seen(self) -> dict[str, list[Any]]:
        """What processors, criteria and streamers of the last arguments were shown."""
        return {name: observer.seen for name, observer in self.observers.items()}


def draw_call(choose: random.Random, family: str, greedy: bool | None = None) -> Call:
    """A call for a target of a family.

    Args:
        greedy: None for either.
    """
    seed = choose.randrange(2**31)
    sampled = choose.random() < 0.5 if greedy is None else not greedy
    common: Arguments = {"max_new_tokens": choose.choice([1, 2, 5, 12, 24, 40])}
    common |= {"do_sample": sampled, "return_dict_in_generate": choose.random() < 0.8}
    common |= {"output_scores": choose.random() < 0.3, "output_logits": choose.random() < 0.3}
    common |= {"streams": choose.random() < 0.3}
    size = choose.randint(1, 20) if choose.random() < 0.15 else None
    if size is not None and TAKES_ONLY_NEW:
        common["prefill_chunk_size"] = size
    common |= _processing(choose)
    if sampled:
        common |= _warping(choose)
    ours = draw_drafting(choose, family)
    if "stop_strings" not in common and choose.random() < 0.15:
        ours["as_custom_generate"] = True
    return Call(common, ours, seed if sampled else None)


def draw_drafting(choose: random.Random, family: str, sampled: bool = False) -> Arguments:
    """Drafters (if need be, those that can sample proposals), a strategy and a tree."""
    pool = [drafter for drafter in drafters_of(family) if drafter.samples or not sampled]
    count = choose.choice([1, 1, 2, 2, 2, 3, 4])
    drafters: Any = choose.sample(pool, count)
    strategy = draw_strategy(choose, count)
    ours: Arguments = {"strategy": strategy}
    # The largest trees that `auto` grows are worth more to it than any shape.
    if strategy != "auto":
        ours["tree"] = draw_tree(choose)
    if choose.random() < 0.3:
        drafters = {f"drafter {number}": drafter for number, drafter in enumerate(drafters)}
    elif count == 1 and choose.random() < 0.5:
        (drafters,) = drafters
    ours["assistant_models"] = drafters
    ours["output_draft_trees"] = choose.random() < 0.2
    return ours


def draw_strategy(choose: random.Random, count: int) -> str | taps_hf.Strategy:
    """A registered strategy, or one with settings, for so many drafters."""
    names = [name for name in taps_hf.list_strategies() if _is_ours(name)]
    if choose.random() < 0.3:
        return Foresees(choose.randrange(1000))
    if choose.random() < 0.4:  # measuring for `auto` takes seconds, for each set of models
        name = choose.choice(names)
        return name if name != "auto" or choose.random() < 0.2 else _auto(choose, count)
    return choose.choice(
        [
            taps_hf.Single(choose.randrange(count)),
            taps_hf.Confidence(per=choose.choice(["cycle", "prompt"])),
            taps_hf.Entropy(per=choose.choice(["cycle", "prompt"])),
            taps_hf.Merged(
                num_nodes=choose.choice([None, 1, 7, 20, 60]),
                packing=choose.choice(["union", "concatenate"]),
            ),
            _auto(choose, count),
            Whims(choose.randrange(1000)),
        ]
    )


def _is_ours(name: str) -> bool:
    return type(taps_hf.get_strategy(name)).__module__.startswith("taps_hf.")


def _auto(choose: random.Random, count: int) -> taps_hf.Auto:
    """With costs that are assumed, so that its decisions do not depend on the machine."""
    one = choose.choice([0.0001, 0.001, 0.01])
    row = choose.choice([0.0, 0.00001, 0.001])
    draft = taps_hf.DraftCost(choose.choice([0.0, 0.0005, 0.02]), choose.choice([0.0, 0.0005]))
    target = tuple((rows, one + rows * row) for rows in (1, 16, 17, 64))
    groups = tuple((index,) for index in range(count))
    costs = taps_hf.Costs(target, groups, (draft,) * count, (draft,) * count)
    return taps_hf.Auto(choose.choice([1, 2, 8]), choose.choice([1, 4, 64]), costs)


def draw_tree(choose: random.Random, dynamic: bool = True) -> taps_hf.TreeShape:
    """A tree shape that every drafter of `drafters_of` can grow."""
    kind = choose.choice(["dynamic", "chain", "branching", "paths"][0 if dynamic else 1 :])
    if kind == "dynamic":
        depth, top_k = choose.randint(1, 7), choose.choice([1, 2, 4, 6, 8, 12])
        return taps_hf.DynamicTree(depth, top_k, choose.choice([1, 5, 12, 30, 60]))
    if kind == "chain":
        return taps_hf.ChainTree(choose.randint(1, 6))
    if kind == "branching":
        levels = choose.randint(1, 3)
        return taps_hf.FixedTree.from_branching([choose.randint(1, 4) for _ in range(levels)])
    children: dict[tuple[int, ...], int] = {(): 0}
    for _ in range(choose.randint(1, 20)):
        parent = choose.choice([node for node, n in children.items() if n < FEWEST_SCORED])
        children[(*parent, children[parent])] = 0
        children[parent] += 1
    return taps_hf.FixedTree([node for node in children if node])


def draw_family(choose: random.Random) -> tuple[str, str]:
    """A family and an attention implementation."""
    return choose.choice(sorted(FAMILIES)), choose.choice(["sdpa", "sdpa", "sdpa", "eager"])


def draw_tokens(choose: random.Random, count: int) -> torch.Tensor:
    """(1, count) int64."""
    return torch.tensor([[choose.randrange(VOCAB) for _ in range(count)]], dtype=torch.long)


def _some(choose: random.Random, count: int) -> list[int]:
    return choose.sample(range(VOCAB), count)


def _processing(choose: random.Random) -> Arguments:
    """Processors and what stops a generation: mostly none or one of each, now and then many."""
    chance = choose.choice([0.0, 0.04, 0.04, 0.15])
    may_end = choose.random() < 0.4
    found: Arguments = {"eos_token_id": _some(choose, choose.randint(1, 3))} if may_end else {}
    bos, eos, *suppressed = _some(choose, 6)  # generate refuses to force what is suppressed
    options: list[Arguments] = [
        {"repetition_penalty": choose.uniform(0.7, 1.6)},
        {"encoder_repetition_penalty": choose.uniform(0.8, 1.4)},
        {"no_repeat_ngram_size": choose.randint(2, 4)},
        {"encoder_no_repeat_ngram_size": choose.randint(2, 4)},
        {"bad_words_ids": [_some(choose, 1), _some(choose, 2), _some(choose, 3)]},
        {"suppress_tokens": suppressed[:2], "begin_suppress_tokens": suppressed[2:]},
        {"forced_bos_token_id": bos},
        {"forced_eos_token_id": eos},
        {"sequence_bias": {(choose.randrange(VOCAB),): 1.5, tuple(_some(choose, 2)): -3.0}},
        {"guidance_scale": choose.uniform(1.1, 2.0)},
        {"renormalize_logits": True},
        {"remove_invalid_values": True},
        {"watermarking_config": WatermarkingConfig(bias=choose.uniform(0.5, 3.0))},
        {"penalise_recent": True},
        {"stop_after": tuple(_some(choose, 2))},
        {"stop_strings": ["".join(chr(ord("a") + i) for i in _some(choose, 2))]},
    ]
    if may_end:
        options += [
            {"min_new_tokens": choose.randint(1, 20)},
            {"min_length": choose.randint(1, 60)},
            {"exponential_decay_length_penalty": (choose.randint(1, 9), choose.uniform(1, 2))},
        ]
    for option in options:
        if choose.random() < chance:
            found |= option
    return found


def _warping(choose: random.Random) -> Arguments:
    found: Arguments = {"top_k": choose.choice([0, 0, 0, 1, 3, 8, 50])}
    options: list[Arguments] = [
        {"temperature": choose.choice([0.3, 0.7, 1.5])},
        {"temperature": choose.choice([0.3, 0.7, 1.5])},
        {"top_p": choose.uniform(0.3, 0.99)},
        {"min_p": choose.uniform(0.01, 0.3)},
        {"typical_p": choose.uniform(0.3, 0.95)},
        {"epsilon_cutoff": choose.uniform(0.001, 0.1)},
        {"eta_cutoff": choose.uniform(0.001, 0.1)},
    ]
    for option in options:
        if choose.random() < 0.15:
            found |= option
    return found
