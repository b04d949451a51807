"""What is measured of one answer, and the file it is kept in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..files import cut_off, starts_like
from ..trees.tree import DraftTree
from ..verification import Walked


@dataclass(frozen=True)
class Cycles:
    """The cycles of one answer by one variant, oldest first; every list has one entry a cycle.

    Args:
        record: key of the record.
        variant: name of the variant.
        variant_key: tells it from others of that name; see [`Variant.key`].
        benchmark, category: of the question.
        temperature: the target's.
        tokens: emitted in all.
        accepted: accepted length, in draft tokens.
        nodes: nodes verified, roots not counted.
        chosen: indices (into the variant's drafters) of whose proposals were verified; empty where
            nothing was drafted.
        accepted_entropy: draft entropy (nats) of the distribution each accepted token came from,
            the smallest of those drafters that proposed it; None where they have no distributions.
        rejected_entropy: the same where the walk left the tree, of all drafters with a node there;
            None where it could not go on because the tree ended, or the answer.
        accepted_target_entropy: entropy of the target's distributions at the accepted tokens.
        rejected_target_entropy: of the one at which the walk left the tree, or None.
        overlap: of the paths in the verified tree the share that all of its drafters proposed
            (Jaccard); None where it holds the proposals of one.
        seconds, plain_seconds: of the whole answer and of plain `generate`; None in replays. Live
            runs measure neither entropies nor overlap, which would take time.
        differs_at: in live runs the first answer token that is not the record's, if there is one.
    """

    record: str
    variant: str
    variant_key: str
    benchmark: str
    category: str
    temperature: float
    tokens: int
    accepted: list[int]
    nodes: list[int]
    chosen: list[list[int]]
    accepted_entropy: list[list[float | None]]
    rejected_entropy: list[float | None]
    accepted_target_entropy: list[list[float]]
    rejected_target_entropy: list[float | None]
    overlap: list[float | None]
    seconds: float | None = None
    plain_seconds: float | None = None
    differs_at: int | None = None

    @property
    def emitted(self) -> list[int]:
        """Tokens emitted in each cycle: one more than accepted, but for the answer's end."""
        emitted = [length + 1 for length in self.accepted]
        if emitted:
            emitted[-1] -= sum(emitted) - self.tokens
        return emitted


class CycleRecorder:
    """Collects the cycles of one answer.

    Args:
        entropies: (answer tokens,) nats: of the target's distributions.
    """

    def __init__(self, entropies: torch.Tensor) -> None:
        self.entropies = entropies.tolist()
        self.emitted = 0
        self.columns: dict[str, list] = {
            name: []
            for name in (
                "accepted",
                "nodes",
                "chosen",
                "accepted_entropy",
                "rejected_entropy",
                "accepted_target_entropy",
                "rejected_target_entropy",
                "overlap",
            )
        }

    def add(self, tree: DraftTree, chosen: Sequence[int], path: Walked) -> None:
        """Note a cycle.

        Args:
            tree: what was verified.
            chosen: whose proposals it holds.
            path: what was emitted along it.
        """
        columns = self.columns
        length, emitted = len(path.accepted), len(path.tokens)
        target = self.entropies[self.emitted :]
        columns["accepted"].append(length)
        columns["nodes"].append(len(tree) - 1)
        columns["chosen"].append(list(chosen))
        columns["accepted_entropy"].append([_entropy(tree, [node]) for node in path.accepted])
        children = (tree.parents == path.nodes[-1]).nonzero().flatten().tolist()
        rejected = bool(children) and emitted > length
        columns["rejected_entropy"].append(_entropy(tree, children) if rejected else None)
        columns["accepted_target_entropy"].append(target[:length])
        columns["rejected_target_entropy"].append(target[length] if rejected else None)
        columns["overlap"].append(overlap(tree, chosen) if len(chosen) > 1 else None)
        self.emitted += emitted


def _entropy(tree: DraftTree, nodes: Sequence[int]) -> float | None:
    """The smallest that any drafter had at any of the nodes; None if none had any."""
    values = tree.entropy[:, list(nodes)].flatten().tolist()
    return min((value for value in values if not math.isnan(value)), default=None)


def overlap(tree: DraftTree, drafters: Sequence[int]) -> float:
    """Paths that all `drafters` proposed over paths that any of them did; copies count once."""
    parents, tokens = tree.parents.tolist(), tree.tokens.tolist()
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, len(tree)):
        paths.append((*paths[parents[node]], tokens[node]))
    proposed = ~tree.confidence[list(drafters)].isnan()
    sets = [{paths[i] for i in row.nonzero().flatten().tolist() if i} for row in proposed]
    union = set.union(*sets)
    return len(set.intersection(*sets)) / len(union) if union else 0.0


class Measurements:
    """Measured answers in a file of JSON lines; a last line half written is cut off.

    Args:
        file: made if it does not exist.

    Raises:
        ValueError: naming file and line, if it holds anything else.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[Cycles] = []
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        whole = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self.rows.append(Cycles(**json.loads(line)))
                except (ValueError, TypeError, RecursionError) as error:
                    raise ValueError(
                        f"{file}, line {number}: not a measurement ({error})."
                    ) from None
                whole += len(line)
        cut_off(file, whole, lambda line: starts_like(line, b'{"record": '))
        self._known = {_names(row): row for row in self.rows}

    def __iter__(self) -> Iterator[Cycles]:
        return iter(self.rows)

    def get(self, record: str, variant: str, variant_key: str) -> Cycles | None:
        """What was measured of this, if it was: of the same weights under another name nothing."""
        return self._known.get((record, variant, variant_key))

    def add(self, rows: Iterable[Cycles]) -> None:
        """Take rows in and write them down, but for what is known."""
        rows = [row for row in rows if _names(row) not in self._known]
        with self.file.open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
        self.rows += rows
        self._known |= {_names(row): row for row in rows}


def _names(row: Cycles) -> tuple[str, str, str]:
    return row.record, row.variant, row.variant_key
