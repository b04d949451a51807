"""The strategy that weighs what drafting brings against what it costs on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from typing import ClassVar

import torch

from ..trees.tree import DraftTree, merge
from .base import Choice, CycleOutcome, GenerationContext, Strategy, register_strategy
from .costs import Costs, LearntCosts
from .experience import Experience, Habits
from .looks import Look, Looks

CAUTION = 1.5
"""What looks worth its time is on average worth less: the most overrated is chosen first. And near
the best size a smaller tree brings hardly less."""
_TILE = 16  # rows; the cost of a pass may rise in steps of so many


@register_strategy("auto")
@dataclass(frozen=True)
class Auto(Strategy):
    """Merged trees sized by cost: what is drafted and verified is what pays for itself.

    A cycle brings tokens and takes time. With r the tokens per second that the generation reaches
    anyway, an action that brings g tokens more and takes c seconds more is worth taking if
    g - r c > 0 (the renewal-reward rule for the largest long-run ratio). By that rule, with a
    margin since g is an estimate, each cycle decides after each level whether to grow another, and
    which nodes of the union are verified. Which drafters draft, down to none (a plain step), is
    decided by the ratio itself.

    * c comes from [`costs.Costs`], measured once on this machine, and on a CPU corrected by what
      cycles take.
    * g comes from the drafters' confidences, calibrated by what was accepted ([`Calibration`]).
    * Free drafters (lookups) always draft. The others wait until these have proposed, and draft
      where what they bring on average, as far as it is not foreseen already, is worth their time.
    * Which others: those that alone would have been the fastest in the last cycles in which all
      ran. All are wanted in every `explore`-th cycle with a draft, and when the chosen ones fail
      twice running; so a change of topic is noticed within `explore` cycles.
    * If no choice beats plain steps (those with free drafters), a few of these follow before all
      drafters are tried again: 4, then twice as many after each failure, up to `longest_pause`.
    * What was learnt in earlier answers of the target with these drafters is where the next one
      begins ([`Experience`]), unless costs are assumed: then nothing depends on what was before.

    Times change which tree is verified and so the speed, never the output.

    Args:
        explore: all drafters run at least once in so many cycles.
        longest_pause: plain steps between two tries where drafting does not pay.
        costs: latencies to assume; None measures them.
    """

    explore: int = 8
    longest_pause: int = 64
    costs: Costs | None = None

    tree_limits: ClassVar[tuple[int, int, int]] = (8, 8, 48)

    def __post_init__(self) -> None:
        for name in ("explore", "longest_pause"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` is {value!r}, expected a positive integer.")

    def begin(self, context: GenerationContext) -> Strategy:
        learnt = context.costs() if self.costs is None else None
        costs = self.costs if learnt is None else learnt.costs
        known = context.experience if self.costs is None else None
        experience = Experience(context.num_drafters) if known is None else known()
        return _Running(self, costs, context, experience, learnt)

    def compose(self, trees: Mapping[int, DraftTree]) -> Choice:
        raise RuntimeError("Auto decides by what it learns in a generation; call `begin` first.")


class _Running(Strategy):
    """[`Auto`] in one generation.

    Args:
        settings: what was asked for.
        costs: of the models.
        context: of the generation.
        experience: of earlier answers, and where to tell what this one teaches.
        learnt: where to tell what cycles took; None if costs are assumed.
    """

    _FIRST_PAUSE = 4  # plain steps
    _LOOKS_TO_GIVE_UP = 4  # before the first pause; later ones need two
    _RATE_DECAY = 0.9  # of tokens and seconds, for each later cycle

    def __init__(
        self,
        settings: Auto,
        costs: Costs,
        context: GenerationContext,
        experience: Experience,
        learnt: LearntCosts | None = None,
    ) -> None:
        self.settings, self.costs, self._learnt = settings, costs, learnt
        self._experience = experience
        self._everyone = tuple(range(context.num_drafters))
        self._free = tuple(context.free)
        self._priced = tuple(i for i in self._everyone if i not in self._free)
        self._reads_levels = context.device.type == "cpu"
        self._calibration, self._habits, known = experience.recall()
        self._looks = Looks(costs, self._free)
        for look in known:
            self._looks.add(look)
        self._since_look = settings.explore  # cycles with a draft since the last of these
        self._asked_before: tuple[int, ...] = ()
        self._pause, self._pauses = 0, 0  # plain steps left; pauses running
        # The fastest when they were last compared: before that the cheapest one.
        self._chosen = tuple(sorted(self._priced, key=lambda i: costs.draft((i,)).first)[:1])
        self._waited = 0  # cycles since somebody drafted whose drafts cost time
        self._misses = 0  # cycles running in which the chosen drafters brought nothing
        self._passes = costs.up_to(128)  # by number of rows; grows with the trees
        self._plain = costs.target_seconds(1)
        self._tokens, self._seconds = 2.0, 2.0 * self._plain
        self._forget_cycle()

    def _forget_cycle(self) -> None:
        self._wanted: tuple[int, ...] = ()  # if free drafters leave them something to bring
        self._asked: tuple[int, ...] = ()
        self._grown = 1  # levels
        self._union: DraftTree | None = None  # all that was proposed
        self._tree: DraftTree | None = None  # what of it was verified

    @property
    def rate(self) -> float:
        """Tokens per second that this generation reaches, at least plain decoding's."""
        return max(self._tokens / self._seconds, 1.0 / self._plain)

    @property
    def _drafting(self) -> tuple[int, ...]:
        """Of those asked the ones whose drafts cost time."""
        return tuple(index for index in self._asked if index not in self._free)

    def ask(self, everyone: tuple[int, ...]) -> tuple[int, ...]:
        wanted = self._plan()
        # Where nothing is free there is nothing to wait for; and who waited for long may be better
        # by now than it is remembered.
        waits = self._free and self._waited < self.settings.longest_pause
        self._wanted = wanted if waits else ()
        self._asked = self._free if waits else tuple(sorted((*self._free, *wanted)))
        return self._asked

    def _plan(self) -> tuple[int, ...]:
        """Who is to draft of those whose drafts cost time."""
        if self._pause:
            self._pause -= 1
            return ()
        due = len(self._looks) < 2 or self._since_look >= self.settings.explore - 1
        if due or self._misses >= 2:
            return self._priced
        self._chosen = chosen = self._looks.fastest(self._priced, self._habits.levels)
        if chosen:
            self._pauses = 0
        elif self._pauses == 0 and len(self._looks) < self._LOOKS_TO_GIVE_UP:
            chosen = self._priced
        else:  # drafting does not pay: come back later
            steps = min(self._FIRST_PAUSE * 2**self._pauses, self.settings.longest_pause)
            self._pause = steps - 1
            self._pauses += 1
            self._looks.clear()
        return chosen

    def ask_also(self, trees: Mapping[int, DraftTree]) -> tuple[int, ...]:
        if not self._wanted:
            return ()
        draft = self.costs.draft(self._chosen or self._wanted)  # what a look costs more is its own
        seconds = draft.first + (self._habits.levels - 1) * draft.level
        foreseen = self._foreseen(trees)
        gain = sum(
            (1.0 - known) * share
            for known, share in zip_longest(foreseen, self._habits.survival, fillvalue=0.0)
        )
        if gain <= self.rate * seconds:
            return ()
        self._asked = tuple(sorted((*self._free, *self._wanted)))
        return self._wanted

    def _foreseen(self, trees: Mapping[int, DraftTree]) -> list[float]:
        """Of each depth from 1 on the probability that what is there by now holds the token."""
        if not trees:
            return []
        union = merge(list(trees.values()))
        found = [0.0] * union.max_depth
        probabilities = self._calibration.acceptance(union).tolist()
        for depth, probability in zip(union.depths.tolist()[1:], probabilities[1:]):
            found[depth - 1] += probability
        return [min(probability, 1.0) for probability in found]

    def go_on(self, depth: int, log_path: torch.Tensor) -> bool:
        deeper = self._habits.deeper
        if self._reads_levels:
            reach = min(float(log_path.exp().sum(dim=1).amax()), 1.0)
        else:  # reading a level back would make the device wait: by what was so far
            reach = deeper**depth
        cost = self.costs.draft(self._drafting).level + self._marginal()
        worth = reach * deeper > CAUTION * self.rate * cost
        self._grown = max(self._grown, depth + worth)  # groups grow one after the other
        return worth

    def compose(self, trees: Mapping[int, DraftTree]) -> Choice:
        union = merge(list(trees.values()))
        probability = self._calibration.acceptance(union)
        order = torch.sort(probability[1:], descending=True, stable=True)
        if len(union) > len(self._passes):
            self._passes = self.costs.up_to(2 * len(union))
        seconds = self._passes[: len(union)]
        price = CAUTION * self.rate * seconds
        gain = torch.cat([torch.zeros(1, device="cpu"), order.values.cumsum(0)]) - price
        kept = (order.indices[: int(gain.argmax())] + 1).sort().values
        self._union = union
        self._tree = union.select(torch.cat([torch.zeros(1, dtype=torch.long, device="cpu"), kept]))
        return Choice(self._tree, tuple(trees))

    def observe(self, outcome: CycleOutcome) -> None:
        rows = 1 if self._tree is None else len(self._tree)
        seconds = self.costs.target_seconds(rows)
        if self._learnt is not None and self._reads_levels and outcome.seconds_target is not None:
            # Whoever sat out before has read what was said meanwhile: that is no draft's cost.
            told = self._drafting and self._asked == self._asked_before
            spent = (outcome.seconds_target, outcome.seconds_draft)
            asked = self._asked if told else ()
            self._learnt.observe(rows, spent[0], asked, self._grown, spent[1])
        if self._asked:
            draft = self.costs.draft(self._asked)
            seconds += draft.first + (self._grown - 1) * draft.level
            self._learn(outcome)
        self._tokens = self._RATE_DECAY * self._tokens + len(outcome.tokens)
        self._seconds = self._RATE_DECAY * self._seconds + seconds
        self._asked_before = self._asked
        self._waited = 0 if self._drafting else self._waited + 1
        self._forget_cycle()  # the next one may end before anyone is asked

    def _learn(self, outcome: CycleOutcome) -> None:
        """From a cycle in which drafters were asked, if only to hear that they had nothing."""
        accepted, found = len(outcome.accepted), ()
        if self._union is not None:
            hits = self._hits(outcome.tokens)
            reached = [0, *hits][: len(outcome.tokens)]
            found = self._calibration.observe(self._union, reached, hits)
            if self._drafting:
                self._adapt(accepted, hits)
        if self._drafting and self._asked == self._everyone:
            tree = self._tree
            self._looks.add(Look() if tree is None else Look.of(outcome.accepted, tree))
            self._since_look = self._misses = 0
        elif self._drafting:
            self._since_look += 1
            self._misses = 0 if accepted else self._misses + 1
        self._experience.learn(found, self._habits, self._looks.last)

    def _adapt(self, accepted: int, hits: Sequence[int]) -> None:
        """The running means, to a cycle in which drafts were made that cost time.

        Args:
            accepted: nodes.
            hits: nodes of the union that hold what was emitted, verified or not.
        """
        habits, deeper = self._habits, self._habits.deeper
        for depth in range(1, min(accepted + 1, self._grown) + 1):
            deeper += 0.05 * ((depth <= accepted) - deeper)
        proposed = (~self._union.confidence[list(self._priced)].isnan()).any(dim=0)
        right = sum(takewhile(bool, (int(proposed[node]) for node in hits)))
        self._habits = Habits(
            deeper,
            habits.nodes + 0.2 * (len(self._tree) - 1 - habits.nodes),
            habits.levels + 0.2 * (self._grown - habits.levels),
            tuple(
                share + 0.05 * ((depth <= right) - share)
                for depth, share in enumerate(habits.survival, start=1)
            ),
        )

    def _hits(self, tokens: Sequence[int]) -> list[int]:
        """The nodes of the union that hold what was emitted."""
        children, hits = self._union.children(), []
        for token in tokens:
            node = children.get((hits[-1] if hits else 0, token))
            if node is None:
                break
            hits.append(node)
        return hits

    def _marginal(self) -> float:
        """Seconds for one node more, steps evened out."""
        rows = round(self._habits.nodes) + 1
        more = self.costs.target_seconds(rows + _TILE) - self.costs.target_seconds(rows)
        return max(more, 0.0) / _TILE
