"""The decoding loop: draft, verify, walk, keep.

[`SpeculativeDecoding`] is a decoding method for `generate(custom_generate=...)`: transformers does
all its usual preparation (inputs, cache, logits processors, stopping criteria) and then calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from .cache import CACHE
from .candidate_generator import TreeCandidateGenerator
from .compiled.session import target_session
from .compiled.settings import (
    Compilation,
    check_compilable,
    check_config,
    compilation_for,
    resolve,
)
from .drafters.base import Drafter
from .drafters.ensemble import layers_read
from .strategies import Auto, Strategy, get_strategy
from .target import TargetSession, rows_of
from .trace import CycleTrace, Recorder, SpeculativeDecoderOnlyOutput
from .trees.shapes import DynamicTree, TreeShape
from .validation import (
    check_call,
    check_drafter,
    check_settings,
    check_some,
    check_target,
    check_tokenizer,
    check_weights,
    named_drafters,
    with_lookup,
)
from .verification import VERIFIERS, Walk


class SpeculativeDecoding:
    """Speculative decoding with one or several drafters.

        target.generate(**inputs, custom_generate=SpeculativeDecoding([math, chat], "merged"))

    is `target.generate(**inputs, assistant_models=[math, chat], strategy="merged")` without the
    extension of `generate`. The output is what plain `generate` gives (docs/architecture.md states
    for which dtypes and verifiers in what sense).

    The object holds settings only and can serve several threads, except that a `streamer` and
    `on_cycle` belong to one call.

    Args:
        assistant_models: a drafter, a list of them, or a dictionary from names to them. With a
            lookup it may be empty.
        strategy: a registered name or a [`Strategy`]. Default: "single" for one drafter that is
            not free, "auto" otherwise ("merged" with rejection).
        tree: shape of each drafter's tree. Default: `DynamicTree()`; what "auto" grows at most is
            larger.
        verification: "walk" (deterministic proposals; greedy or seed-exact sampling) or "rejection"
            (proposals sampled from the drafters; exact in distribution).
        output_draft_trees: with `return_dict_in_generate` or `on_cycle`, keep every cycle's tree,
            with draft entropies, in the trace.
        on_cycle: called with the [`CycleTrace`] of each cycle when it ends, in the thread that
            generates: to show what happens while it does. What it raises ends the generation. Like
            a streamer it belongs to one call.
        streamer: needed here only with `custom_generate=`, which does not hand on `generate`'s;
            give it to both.
        lookup: whether a [`PromptLookup`] is added to the drafters, unless there is one among them.
            Default: with "auto", which is asked for proposals that cost nothing.
        tokenizer: if given, drafters are checked to have been trained with its vocabulary.
        compile: whether cycles run as compiled graphs (docs/performance.md, "Compiled"): True for
            `generate`'s `compile_config`, or one that fits, or a `CompileConfig`. The first answer
            waits for the graphs to be made; they are kept with the target.

    Raises:
        ValueError: for settings that are unknown or do not go together.
    """

    def __init__(
        self,
        assistant_models: Drafter | Sequence[Drafter] | Mapping[str, Drafter],
        strategy: str | Strategy | None = None,
        tree: TreeShape | None = None,
        verification: str = "walk",
        output_draft_trees: bool = False,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        on_cycle: Callable[[CycleTrace], None] | None = None,
        lookup: bool | None = None,
        compile: bool | CompileConfig = False,
    ) -> None:
        given = named_drafters(assistant_models)
        if not (lookup is None or isinstance(lookup, bool)):
            raise ValueError(f"`lookup` is {lookup!r}, expected True, False, or None.")
        if strategy is None:
            strategy = _default_strategy(list(given.values()), verification, bool(lookup))
        self.strategy = get_strategy(strategy)
        if lookup is None:
            lookup = isinstance(self.strategy, Auto) and verification != "rejection"
        self.drafters = with_lookup(given) if lookup else check_some(given)
        self.tree = DynamicTree(*self.strategy.tree_limits) if tree is None else tree
        self.verification = verification
        self.output_draft_trees = output_draft_trees
        self.streamer = streamer
        self.on_cycle = on_cycle
        self.compile = compile
        check_config(compile)
        check_settings(self.drafters, self.strategy, self.tree, verification)
        if on_cycle is not None and not callable(on_cycle):
            raise ValueError(f"`on_cycle` is {on_cycle!r}, expected a function of a CycleTrace.")
        if tokenizer is not None:
            check_tokenizer(self.drafters, tokenizer)

    def check(self, model: PreTrainedModel) -> None:
        """Raise `ValueError` unless `model` can be accelerated by these drafters."""
        check_target(model)
        check_weights(model)
        if self.compile:
            check_compilable(model)
        for name, drafter in self.drafters.items():
            check_drafter(name, drafter, model)

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> SpeculativeDecoderOnlyOutput | torch.LongTensor:
        """Decode one sequence; called by `generate`, with what it has prepared.

        Returns:
            (1, length) int64, or with `return_dict_in_generate` an output with a `draft_trace`.

        Raises:
            ValueError: for a target, cache or generation mode that is not supported.
        """
        self.check(model)
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            # Early 5.x versions leave it to the model to make its cache.
            model_kwargs[CACHE] = DynamicCache(config=model.config.get_text_config(decoder=True))
        check_call(model, input_ids, generation_config, model_kwargs)
        cache = model_kwargs[CACHE]
        as_dict = generation_config.return_dict_in_generate
        do_sample = bool(generation_config.do_sample)
        sample_temperature = None
        if self.verification == "rejection":
            sample_temperature = float(generation_config.temperature or 1.0) if do_sample else 1.0
        recorded = as_dict or self.on_cycle is not None
        streamer = self.streamer
        walk = Walk(
            input_ids,
            logits_processor,
            stopping_criteria,
            VERIFIERS[self.verification],
            do_sample,
            keep_scores=as_dict and generation_config.output_scores,
            keep_logits=as_dict and generation_config.output_logits,
            on_token=None if streamer is None else streamer.put,
        )
        layers = layers_read(self.drafters.values())
        compilation = self._compilation(model, generation_config)
        with target_session(
            model, input_ids, generation_config, model_kwargs, layers, compilation
        ) as target:
            drafting = TreeCandidateGenerator(
                model,
                list(self.drafters.values()),
                self.strategy,
                self.tree,
                generation_config.max_length,
                sample_temperature,
                with_entropy=recorded and self.output_draft_trees,
                cache=cache,
                compilation=compilation,
            )
            recorder = Recorder(
                self.drafters, target.device, recorded, self.output_draft_trees, self.on_cycle
            )
            decode(target, drafting, walk, recorder, generation_config.max_length)
        if streamer is not None:  # first: who listens waits for no drafter
            streamer.end()
        drafting.lay_by()
        if not as_dict:
            return walk.input_ids
        return SpeculativeDecoderOnlyOutput(
            sequences=walk.input_ids,
            scores=walk.scores,
            logits=walk.logits,
            draft_trace=recorder.trace,
            **{CACHE: cache},
        )

    def _compilation(
        self, model: PreTrainedModel, generation_config: GenerationConfig
    ) -> Compilation | None:
        if not self.compile:
            return None
        config = resolve(self.compile, generation_config)
        check_config(config)
        nodes, drafters = self.tree.num_nodes, len(self.drafters)
        return compilation_for(config, model, generation_config.max_length, nodes, drafters)


def _default_strategy(drafters: Sequence[Drafter], verification: str, lookup: bool) -> str:
    alone = len(drafters) == 1 and not drafters[0].is_free and not lookup
    # Sampled proposals cannot be sized by confidence: it would be that of what was sampled.
    several = "merged" if verification == "rejection" else "auto"
    return "single" if alone else several


def decode(
    target: TargetSession,
    drafting: TreeCandidateGenerator,
    walk: Walk,
    recorder: Recorder,
    max_length: int,
) -> None:
    """Speculative decoding: drafters propose a tree, the target verifies it in one pass.

    The target's states are always those of every token but the last emitted, the root.
    """
    # The prompt, up to its last token: the first root.
    drafting.read_prompt(target.earlier_tokens, *target.prefill())
    recorder.prefilled()
    while not walk.is_finished:
        # Draft. Of a path of d nodes at most d + 1 tokens are emitted.
        recorder.start()
        room = min(max_length - walk.text.shape[1], target.room)
        choice = drafting.propose(walk.text[0, -1:], max_depth=room - 1)
        recorder.lap()
        # Verify: one pass of the target over the tree.
        logits, states = target.verify(choice.tree)
        recorder.lap()
        # Walk: plain generate's inner loop, for as long as the tree holds the token emitted.
        path = walk.along(choice.tree, logits)
        # Keep the states of the tokens emitted but for the last, which is the new root.
        target.keep(path.nodes)
        drafting.observe(path.tokens, rows_of(states, path.nodes))
        # Observe: the strategy hears what became of its choice.
        cycle = recorder.cycle(choice.tree, choice.drafters, path)
        drafting.record(cycle)
        recorder.tell(cycle)
