"""Acceptance in speculative decoding, as a metric of the `evaluate` library."""

from __future__ import annotations

import datasets
import evaluate

_DESCRIPTION = """
Accepted length (draft tokens accepted per cycle) and tau (tokens emitted per target pass) of
speculative decoding. Micro means weigh every cycle alike, macro means every answer.
"""

_INPUTS = """
Args:
    predictions: for each answer the accepted length of each of its cycles.
    references: for each answer the number of tokens emitted. Each cycle emits one token more than
        it accepts, except the last, which may end with an accepted one.
Returns:
    accepted_length, tau: micro means.
    macro_accepted_length, macro_tau: means over answers.
    tau_by_last_index: mean over answers of tokens over cycles less one, which is what scripts print
        that divide by the index of the last loop, counted from 0; None if no answer has two cycles.
Examples:
    >>> acceptance = evaluate.load("metrics/acceptance")
    >>> acceptance.compute(predictions=[[2, 0], [1]], references=[4, 2])["tau"]
    2.0
"""


class Acceptance(evaluate.Metric):
    """See the description."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int32")),
                    "references": datasets.Value("int32"),
                }
            ),
        )

    def _compute(
        self, predictions: list[list[int]], references: list[int]
    ) -> dict[str, float | None]:
        if not predictions or not all(predictions):
            raise ValueError("An answer without cycles was given, expected at least one in each.")
        for accepted, tokens in zip(predictions, references):
            most = sum(accepted) + len(accepted)
            if not most - 1 <= tokens <= most:
                raise ValueError(
                    f"{tokens} tokens were emitted in cycles that accepted {list(accepted)}, "
                    f"expected {most - 1} or {most}."
                )
        pairs = list(zip(predictions, references))
        cycles = sum(len(accepted) for accepted in predictions)
        indexed = [n / (len(accepted) - 1) for accepted, n in pairs if len(accepted) > 1]
        return {
            "accepted_length": sum(map(sum, predictions)) / cycles,
            "tau": sum(references) / cycles,
            "macro_accepted_length": _mean([sum(x) / len(x) for x in predictions]),
            "macro_tau": _mean([n / len(accepted) for accepted, n in pairs]),
            "tau_by_last_index": _mean(indexed) if indexed else None,
        }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
