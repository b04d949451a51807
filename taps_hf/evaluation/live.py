"""Live runs: real generation by every variant, timed against plain `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from ..drafters.base import Drafter
from ..measuring import now
from ..trace import first_difference
from .measurements import Cycles
from .records import Record, RecordOptions, generate_seeded, seed_of
from .variants import Variant


def run_live(
    record: Record,
    target: PreTrainedModel,
    drafters: Mapping[str, Drafter],
    variants: Sequence[Variant],
    weights: Mapping[str, str],
    options: RecordOptions,
    rotation: int = 0,
) -> list[Cycles]:
    """Answer the question of a record anew: by plain `generate`, and by every variant.

    Args:
        record: made by [`records.record`] with the same options.
        target: the model.
        drafters: by name.
        variants: what to run.
        weights: a digest of each drafter, for the variants' keys.
        options: how the target answers.
        rotation: how far the order (plain, then the variants) is rotated, so that none always
            comes first.

    Returns:
        the cycles of each variant, in their order.
    """
    prompt = record.tokens[: record.answer_start].tolist()
    seed = seed_of(options.seed, record.benchmark, record.question_id, record.turn)
    plain = len(variants)
    order = [plain, *range(plain)]
    shift = rotation % len(order)
    outputs, seconds = {}, {}
    for number in order[shift:] + order[:shift]:
        speculate = {}
        if number != plain:
            variant = variants[number]
            speculate = {
                "assistant_models": {name: drafters[name] for name in variant.drafters},
                "strategy": variant.strategy,
                "tree": variant.tree,
                "lookup": False,  # among the drafters, if the variant has one
            }
        began = now(target.device)
        output = generate_seeded(
            target, prompt, options, seed, return_dict_in_generate=True, **speculate
        )
        seconds[number] = now(target.device) - began
        trace = getattr(output, "draft_trace", None)
        outputs[number] = (output.sequences[0, record.answer_start :].tolist(), trace)
    recorded = record.tokens[record.answer_start :].tolist()
    rows = []
    for number, variant in enumerate(variants):
        answer, trace = outputs[number]
        cycles = trace.cycles
        nothing = [None] * len(cycles)
        rows.append(
            Cycles(
                record=record.key,
                variant=variant.name,
                variant_key=variant.key(weights),
                benchmark=record.benchmark,
                category=record.category,
                temperature=record.temperature,
                tokens=len(answer),
                accepted=[cycle.accepted_length for cycle in cycles],
                nodes=[cycle.num_nodes for cycle in cycles],
                chosen=[list(cycle.drafters) for cycle in cycles],
                accepted_entropy=[[] for _ in cycles],
                rejected_entropy=nothing,
                accepted_target_entropy=[[] for _ in cycles],
                rejected_target_entropy=nothing,
                overlap=nothing,
                seconds=seconds[number],
                plain_seconds=seconds[plain],
                differs_at=first_difference(recorded, answer),
            )
        )
    return rows
