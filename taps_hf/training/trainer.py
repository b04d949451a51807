"""The training loop: transformers' `Trainer` around a [`DraftObjective`]."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers import EvalPrediction, Trainer

from ..target import LAST
from .encoding import Example
from .features import FeatureStore
from .objectives import DraftObjective
from .steps import IGNORED, scored_slots


class ExampleDataset(Dataset):
    """Examples, with their features if they are in a store.

    Args:
        examples: what to train on.
        stores: where features are looked up, in this order; none to have them computed.
        layers: whose states the features are.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        stores: Sequence[FeatureStore] = (),
        layers: Sequence[int] = (LAST,),
    ) -> None:
        self.examples = list(examples)
        self.stores = tuple(stores)
        self.layers = tuple(layers)
        # Made once: they are wanted in every epoch, between two steps of a device.
        self._tokens = [_tokens_and_labels(example) for example in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, labels = self._tokens[index]
        item = {"input_ids": ids, "labels": labels}
        if self.stores:
            known = self.examples[index].input_ids[:-1]  # nobody reads the last token's feature
            store = next(store for store in self.stores if known in store)
            item["features"] = store.read(known, self.layers)
        return item


def _tokens_and_labels(example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor(example.input_ids)
    labels = ids.where(torch.tensor(example.is_answer), IGNORED)
    labels[:2] = IGNORED  # nothing precedes them that a drafter could read
    return ids, labels


def collate(items: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad items on the right to the longest, and say which slots are scored.

    The latter here, where it costs nothing: on a device it would have to be waited for.
    """
    paddings = {"input_ids": 0, "labels": IGNORED, "features": 0.0}
    batch = {
        name: pad_sequence([item[name] for item in items], True, paddings[name])
        for name in items[0]
    }
    return {**batch, "slots": scored_slots(batch["labels"], 1)[0].flatten().nonzero()[:, 0]}


class LengthSampler(Sampler[int]):
    """Every index once an epoch, neighbours of like length, in an order that seed and epoch give.

    transformers' own length grouping draws from the global generator, so its order depends on
    whatever else has drawn from it, and with it on the number of processes.

    Args:
        lengths: of each example, in tokens.
        group: examples that should be of like length: those of one step, on all devices.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        self.lengths, self.group, self.seed, self.epoch = lengths, group, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loaders before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        order = list(range(len(self)))
        rng.shuffle(order)
        order.sort(key=lambda i: self.lengths[i] + rng.random() * 16)
        groups = [order[i : i + self.group] for i in range(0, len(order), self.group)]
        # One that is not full stays last, or every later batch would straddle two groups.
        partial = [groups.pop()] if len(self) % self.group else []
        rng.shuffle(groups)
        groups += partial
        return iter([index for group in groups for index in group])


class DrafterTrainer(Trainer):
    """`Trainer` for a [`DraftObjective`] and [`ExampleDataset`]s."""

    model: DraftObjective

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=collate, compute_metrics=measures_of, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthSampler(
            [len(example.input_ids) for example in dataset.examples],
            group * self.args.world_size,
            self.args.seed,
        )

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad(), self.compute_loss_context_manager():
            found = model(**self._prepare_inputs(inputs))
        # A row of counts for each example; labels are there for Trainer to call compute_metrics.
        return found["loss"].detach(), found["counts"], found["counts"]


def measures_of(prediction: EvalPrediction) -> dict[str, float]:
    """What the counts of [`steps.accepted_chains`] say about drafts.

    Returns:
        `top_1`: how often the first token was right; `deep_acceptance`: how often the last one was
        of the drafts that were right until there, where the answer went on (far below top-1 where
        predicted features are poor); `accepted_length`, for which what an answer does not have is
        not accepted; and of how many `chains`.
    """
    could, were = torch.as_tensor(prediction.predictions).double().sum(dim=0).unbind(dim=1)
    chains = could[0].item()
    return {
        "top_1": were[0].item() / max(chains, 1.0),
        "deep_acceptance": were[-1].item() / max(could[-1].item(), 1.0),
        "accepted_length": were.sum().item() / max(chains, 1.0),
        "chains": chains,
    }


def frequent_tokens(examples: Sequence[Example], size: int, vocab_size: int) -> torch.Tensor:
    """The `size` tokens most frequent in the answers, these first: (size,) int64.

    Tokens that never occur come last, by their ids: tokenizers learn frequent ones first.

    Raises:
        ValueError: if the vocabulary has fewer tokens.
    """
    if not 0 < size <= vocab_size:
        raise ValueError(f"`draft_vocab` is {size}, expected 1 to {vocab_size}.")
    counts: Counter[int] = Counter()
    for example in examples:
        counts.update(t for t, answer in zip(example.input_ids, example.is_answer) if answer)
    ranked = sorted(range(vocab_size), key=lambda token: (-counts[token], token))
    return torch.tensor(ranked[:size])


def coverage(examples: Sequence[Example], tokens: torch.Tensor) -> float:
    """Share of the answers' tokens that are among `tokens`."""
    known = set(tokens.tolist())
    found = [
        token in known
        for example in examples
        for token, answer in zip(example.input_ids, example.is_answer)
        if answer
    ]
    return sum(found) / max(len(found), 1)
