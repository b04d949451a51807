"""The decoding loop: draft, verify, walk, keep.

[`SpeculativeDecoding`] is a decoding method for `generate(custom_generate=...)`: transformers does
all its usual preparation (inputs, cache, logits processors, stopping criteria) and then calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import (
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
from .drafters.modeling_eagle import EagleDrafter
from .strategies import CycleOutcome, Strategy, get_strategy
from .target import TargetSession
from .trace import (
    CycleTrace,
    DraftTrace,
    SpeculativeDecoderOnlyOutput,
    Stopwatch,
    trace_cycle,
)
from .trees.shapes import DynamicTree, TreeShape
from .validation import (
    check_call,
    check_drafter,
    check_settings,
    check_target,
    check_tokenizer,
    named_drafters,
)
from .verification import VERIFIERS


class SpeculativeDecoding:
    """Speculative decoding with one or several drafters.

        target.generate(**inputs, custom_generate=SpeculativeDecoding([math, chat], "merged"))

    is `target.generate(**inputs, assistant_models=[math, chat], strategy="merged")` without the
    extension of `generate`. The output is what plain `generate` gives (docs/architecture.md states
    for which dtypes and verifiers in what sense).

    The object holds settings only and can serve several threads, except that a `streamer` and
    `on_cycle` belong to one call.

    Args:
        assistant_models: a drafter, a list of them, or a dictionary from names to them.
        strategy: a registered name or a [`Strategy`]. Default: "single" for one drafter, "auto"
            for several ("merged" with rejection).
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
        tokenizer: if given, drafters are checked to have been trained with its vocabulary.

    Raises:
        ValueError: for settings that are unknown or do not go together.
    """

    def __init__(
        self,
        assistant_models: EagleDrafter | Sequence[EagleDrafter] | Mapping[str, EagleDrafter],
        strategy: str | Strategy | None = None,
        tree: TreeShape | None = None,
        verification: str = "walk",
        output_draft_trees: bool = False,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        on_cycle: Callable[[CycleTrace], None] | None = None,
    ) -> None:
        self.drafters = named_drafters(assistant_models)
        if strategy is None:
            # Sampled proposals cannot be sized by confidence: it would be that of what was sampled.
            several = "merged" if verification == "rejection" else "auto"
            strategy = "single" if len(self.drafters) == 1 else several
        self.strategy = get_strategy(strategy)
        self.tree = DynamicTree(*self.strategy.tree_limits) if tree is None else tree
        self.verification = verification
        self.output_draft_trees = output_draft_trees
        self.streamer = streamer
        self.on_cycle = on_cycle
        check_settings(self.drafters, self.strategy, self.tree, verification)
        if on_cycle is not None and not callable(on_cycle):
            raise ValueError(f"`on_cycle` is {on_cycle!r}, expected a function of a CycleTrace.")
        if tokenizer is not None:
            check_tokenizer(self.drafters, tokenizer)

    def check(self, model: PreTrainedModel) -> None:
        """Raise `ValueError` unless `model` can be accelerated by these drafters."""
        check_target(model)
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
        as_dict = generation_config.return_dict_in_generate
        do_sample = bool(generation_config.do_sample)
        verifier_class = VERIFIERS[self.verification]
        sample_temperature = None
        if self.verification == "rejection":
            sample_temperature = float(generation_config.temperature or 1.0) if do_sample else 1.0
        scores = () if as_dict and generation_config.output_scores else None
        raw_logits = () if as_dict and generation_config.output_logits else None
        recording = as_dict or self.on_cycle is not None
        trace = DraftTrace(tuple(self.drafters)) if recording else None

        target = TargetSession(model, input_ids, generation_config, model_kwargs)
        try:
            generator = TreeCandidateGenerator(
                model,
                list(self.drafters.values()),
                self.strategy,
                self.tree,
                generation_config.max_length,
                sample_temperature,
                with_entropy=recording and self.output_draft_trees,
            )
            # 1. The prompt, up to its last token: the first root.
            clock = Stopwatch(target.device)
            generator.observe(*target.prefill())
            if trace is not None:
                clock.lap()
                trace.seconds_prefill = clock.seconds()[0]

            finished = False
            while not finished:
                # 2. Draft. Of a path of d nodes at most d + 1 tokens are emitted.
                # On a GPU, reading the time makes the host wait: only if it was asked for.
                timing = trace is not None or target.device.type == "cpu"
                clock = Stopwatch(target.device) if timing else None
                room = _room(model, generation_config, input_ids.shape[1], target.root_position)
                choice = generator.propose(input_ids[0, -1:], max_depth=room - 1)
                if clock:
                    clock.lap()

                # 3. Verify: one pass of the target over the tree.
                logits, features = target.verify(choice.tree)
                if clock:
                    clock.lap()

                # 4. Walk: plain generate's inner loop, once per emitted token, for as long as the
                #    tree holds the emitted token. The last token emitted has no node to go on from.
                tree = choice.tree
                verifier = verifier_class(tree, do_sample)
                nodes, walked, start = [0], [], input_ids.shape[1]
                accepted: list[list[int]] = []  # the node (or copies of it) of each draft token
                while nodes and not finished:
                    walked.append(nodes[0])
                    node_logits = logits[nodes[0]][None].to(
                        copy=True, dtype=torch.float32, device=input_ids.device
                    )
                    node_scores = logits_processor(input_ids, node_logits)
                    if scores is not None:
                        scores += (node_scores,)
                    if raw_logits is not None:
                        raw_logits += (node_logits,)
                    token, nodes = verifier.step(nodes, node_scores)
                    accepted += [nodes] if nodes else []
                    input_ids = torch.cat([input_ids, token[:, None]], dim=-1)
                    finished = bool(stopping_criteria(input_ids, scores).all())
                    if self.streamer is not None:
                        self.streamer.put(token.cpu())

                # 5. Keep the states of every token but the last emitted, which is the new root.
                target.keep(walked)
                emitted = input_ids[0, start:]
                generator.observe(emitted, features[walked])
                origins = tuple(tree.proposers(copies) for copies in accepted)
                seconds = tuple(clock.seconds()) if target.device.type == "cpu" else None
                generator.record(
                    CycleOutcome(choice.drafters, origins, tuple(emitted.tolist()), seconds)
                )
                if trace is not None:
                    clock.lap()
                    trace.cycles.append(
                        trace_cycle(
                            tree,
                            choice.drafters,
                            emitted.tolist(),
                            accepted,
                            tuple(clock.seconds()),
                            self.output_draft_trees,
                        )
                    )
                if self.on_cycle is not None:
                    self.on_cycle(trace.cycles[-1])
        finally:
            target.release()

        if self.streamer is not None:
            self.streamer.end()
        if not as_dict:
            return input_ids
        return SpeculativeDecoderOnlyOutput(
            sequences=input_ids,
            scores=scores,
            logits=raw_logits,
            draft_trace=trace,
            **{CACHE: model_kwargs[CACHE]},
        )


def _room(
    model: PreTrainedModel, generation_config: GenerationConfig, length: int, root_position: int
) -> int:
    """How many tokens may still be emitted before a limit that is known beforehand."""
    room = generation_config.max_length - length
    config = model.config.get_text_config(decoder=True)
    if (positions := getattr(config, "max_position_embeddings", None)) is not None:
        # The deepest node stands at root_position + depth, and depth is at most room - 1.
        room = min(room, positions - root_position)
    return room
