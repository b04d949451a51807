"""Train a first drafter for the embedded target: EAGLE objective, on the target's own answers.

    python examples/train_drafter.py answer --data math.jsonl --out math_answers.jsonl
    python examples/train_drafter.py train --answers math_answers.jsonl --out drafter/

Both commands show progress and go on where they were stopped. This is what the drafters in
hub_cards/ were trained with; it is small on purpose.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

import taps_hf
from taps_hf.embedded import load_embedded_target, load_embedded_tokenizer

MAX_PROMPT = 512  # tokens; longer prompts stay unanswered
TOP = 10  # tokens of the target's distribution that a drafter learns from


# --- answers ------------------------------------------------------------------------------------


def read_prompts(file: Path, seed: int) -> list[list[dict[str, str]]]:
    """Conversations up to a user's turn, shuffled, from JSON lines (.gz or not).

    Rows are `instruction` or `conversations` (from: human or gpt). Of a conversation with several
    exchanges a random user's turn is asked, later ones in most cases, with what came before it.

    Raises:
        ValueError: naming file and line, for a row that is neither.
    """
    rng = random.Random(seed)
    prompts = []
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            if "instruction" in row:
                turns = [{"role": "user", "content": row["instruction"]}]
            elif "conversations" in row:
                roles = {"human": "user", "gpt": "assistant"}
                said = row["conversations"]
                turns = [{"role": roles[m["from"]], "content": m["value"]} for m in said]
                exchanges = len(turns) // 2
                last = rng.randrange(exchanges) if exchanges > 1 and rng.random() < 0.7 else 0
                turns = turns[: 2 * last + 1]
            else:
                raise ValueError(
                    f"{file}:{number} has the fields {sorted(row)}, expected `instruction` or "
                    "`conversations`."
                )
            prompts.append(turns)
    rng.shuffle(prompts)
    return prompts


@torch.inference_mode()
def answer_batch(
    target: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, eos: int
) -> list[list[int]]:
    """Greedy answers to tokenised prompts, each ending with `eos` unless cut."""
    length = max(map(len, prompts))
    ids = torch.tensor([[eos] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=target.config)
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the shrinking batch belongs to
    for _ in range(max_new_tokens):
        logits = target(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits
        tokens = logits[:, -1].argmax(dim=-1)
        going = []
        for row, token in enumerate(tokens.tolist()):
            answer = answers[rows[row]]
            if not answer or answer[-1] != eos:
                answer.append(token)
            if answer[-1] != eos:
                going.append(row)
        if not going:
            break
        if len(going) < 0.85 * len(rows):  # dropping rows copies the cache: not every time
            keep = torch.tensor(going)
            cache.batch_select_indices(keep)
            tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
            rows = [rows[row] for row in going]
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return answers


def answer(options: argparse.Namespace) -> None:
    """Have the target answer the prompts, so that the drafter learns the target's own words."""
    tokenizer = load_embedded_tokenizer()
    target = load_embedded_target(torch.bfloat16)
    prompts = read_prompts(options.data, options.seed)[: options.limit]
    out: Path = options.out
    done = sum(1 for _ in out.open()) if out.exists() else 0
    print(f"{len(prompts)} prompts, {done} answered before", flush=True)
    began, count = time.time(), 0
    for start in range(done, len(prompts), options.chunk):
        chunk = [
            tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False)
            for p in prompts[start : start + options.chunk]
        ]
        answers: list[list[int]] = [[] for _ in chunk]
        # Prompts of like length together; those too long stay without an answer.
        order = sorted(range(len(chunk)), key=lambda i: len(chunk[i]))
        order = [i for i in order if len(chunk[i]) <= MAX_PROMPT]
        for first in range(0, len(order), options.batch_size):
            batch = order[first : first + options.batch_size]
            found = answer_batch(
                target, [chunk[i] for i in batch], options.max_new_tokens, tokenizer.eos_token_id
            )
            for i, tokens in zip(batch, found):
                answers[i] = tokens
            count += sum(map(len, found))
        rows = [
            json.dumps({"prompt_ids": p if a else [], "answer_ids": a}) + "\n"
            for p, a in zip(chunk, answers)
        ]
        with out.open("a") as file:  # one write a chunk: a stopped run leaves whole chunks
            file.write("".join(rows))
        rate = count / (time.time() - began)
        print(f"{start + len(chunk)}/{len(prompts)} prompts, {rate:.0f} tokens/s", flush=True)


# --- training -----------------------------------------------------------------------------------


def read_answers(file: Path, limit: int | None) -> list[tuple[list[int], int]]:
    """(token ids, length of the prompt) of each answered row."""
    rows = [json.loads(line) for line in file.open()][:limit]
    kept = [r for r in rows if len(r["answer_ids"]) > 3]
    print(f"{file.name}: {len(kept)} answers, {len(rows) - len(kept)} too short or unanswered")
    return [(r["prompt_ids"] + r["answer_ids"], len(r["prompt_ids"])) for r in kept]


def batches(
    rows: list[tuple[list[int], int]], tokens: int, rng: random.Random
) -> Iterator[list[int]]:
    """Indices of rows of like length, at most about `tokens` tokens together, in random order."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + rng.random() * 16)
    made: list[list[int]] = [[]]
    for i in order:
        if made[-1] and (len(made[-1]) + 1) * len(rows[i][0]) > tokens:
            made.append([])
        made[-1].append(i)
    rng.shuffle(made)
    return iter(made)


@dataclass
class Example:
    """One answered prompt of n tokens, with what the target computes for it.

    Args:
        ids: (n,) int64.
        features: (n, hidden) bfloat16: the target's last hidden states.
        start: index of the answer's first token.
        wanted: (n - start, TOP) int64: the target's likeliest tokens for each token of the answer,
            as indices into the draft vocabulary.
        weights: (n - start, TOP) float32: their probabilities, normalised among themselves.
    """

    ids: torch.Tensor
    features: torch.Tensor
    start: int
    wanted: torch.Tensor
    weights: torch.Tensor


@torch.no_grad()
def examples_of(
    target: PreTrainedModel, head: torch.Tensor, rows: list[tuple[list[int], int]]
) -> list[Example]:
    """Run the target over every row once. `head`: its rows for the tokens the drafter scores."""
    examples: list[Example | None] = [None] * len(rows)
    began, seen, total = time.time(), 0, sum(len(ids) for ids, _ in rows)
    for number, batch in enumerate(batches(rows, 4096, random.Random(0))):
        longest = max(len(rows[i][0]) for i in batch)
        padded = torch.tensor([rows[i][0] + [0] * (longest - len(rows[i][0])) for i in batch])
        features = target.base_model(input_ids=padded, use_cache=False).last_hidden_state
        for i, row in zip(batch, features):
            ids, start = rows[i]
            top = F.linear(row[start - 1 : len(ids) - 1], head).float().topk(TOP)
            examples[i] = Example(
                torch.tensor(ids),
                row[: len(ids)].clone(),
                start,
                top.indices,
                top.values.softmax(1),
            )
            seen += len(ids)
        if number % 20 == 0:
            rate = seen / (time.time() - began)
            print(f"target's pass {seen}/{total} tokens, {rate:.0f} tokens/s", flush=True)
    return examples


def losses(
    drafter: taps_hf.EagleDrafter,
    target: PreTrainedModel,
    head: torch.Tensor,
    batch: list[Example],
    noise: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """EAGLE's two losses and the top-1 agreement, each a mean over the tokens of the answers.

    Feature regression (smooth L1, features in units of their standard deviation) and the
    cross-entropy of the drafter's token distribution against the target's (arXiv 2401.15077,
    section 3.2), whose mass is taken from its `TOP` likeliest tokens.

    Args:
        head: (draft vocabulary, hidden): the target's head at the tokens the drafter scores.
        noise: half-width, in standard deviations, of the uniform noise on the input features.
    """
    ids = pad_sequence([example.ids for example in batch], batch_first=True)
    features = pad_sequence([example.features for example in batch], batch_first=True)
    # Slot t sees token t + 1 and feature t, predicts feature t + 1 and so token t + 2. Of an answer
    # the first token (prompt's last slot but one) is included.
    scored = torch.zeros(len(batch), ids.shape[1] - 2, dtype=torch.bool)
    for row, example in enumerate(batch):
        scored[row, example.start - 2 : len(example.ids) - 2] = True
    wanted = torch.cat([example.wanted for example in batch])
    weights = torch.cat([example.weights for example in batch])
    teacher = features[:, 1:-1][scored].float()
    unit = teacher.std()
    inputs = features[:, :-2].float()
    inputs = inputs + (torch.rand_like(inputs) * 2 - 1) * noise * unit
    with torch.no_grad():
        embeds = target.get_input_embeddings()(ids[:, 1:-1]).float()
    with torch.autocast("cpu", torch.bfloat16):
        predicted = drafter(inputs_embeds=embeds, features=inputs).last_hidden_state[scored]
        scores = F.linear(predicted, head).float()
    regression = F.smooth_l1_loss(predicted.float() / unit, teacher / unit)
    likelihood = (weights * scores.gather(1, wanted)).sum(dim=1)
    entropy = (scores.logsumexp(dim=1) - likelihood).mean()
    agreement = (scores.argmax(dim=1) == wanted[:, 0]).float().mean()
    return regression, entropy, agreement


def train(options: argparse.Namespace) -> None:
    """Train a drafter; checkpoints after every epoch, and goes on from the last one."""
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)  # tiny probabilities slow the CPU's softmax down eightfold
    target, tokenizer = load_embedded_target(torch.bfloat16), load_embedded_tokenizer()
    rows = read_answers(options.answers, options.limit)
    counts: Counter[int] = Counter()
    for file in options.vocabulary_from or [options.answers]:
        for ids, start in read_answers(file, None)[options.held_out :]:
            counts.update(ids[start:])
    # Unseen tokens come last, by their ids: a BPE tokenizer learns frequent ones first.
    ranked = sorted(range(target.config.vocab_size), key=lambda token: (-counts[token], token))
    tokens = torch.tensor(ranked[: options.draft_vocab])
    held_out = rows[: options.held_out]
    known = set(tokens.tolist())
    covered = [t in known for ids, start in held_out for t in ids[start:]]
    print(f"draft vocabulary {len(tokens)}: covers {sum(covered) / len(covered):.2%} held out")

    drafter = taps_hf.EagleDrafter.from_target(
        target,
        draft_token_ids=tokens,
        fc_bias=True,
        target_name_or_path=target.config.name_or_path,
        tokenizer_fingerprint=taps_hf.tokenizer_fingerprint(tokenizer),
        training_data=options.describe,
    ).float()
    head = target.get_output_embeddings().weight[drafter.draft_token_ids].detach()
    rows = rows[options.held_out :]
    optimizer = torch.optim.AdamW(
        drafter.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay
    )
    per_epoch = len(list(batches(rows, options.batch_tokens, random.Random(0))))
    total = per_epoch * options.epochs

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / (0.05 * total))
        return warm * (0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, step / total))) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    checkpoint = options.out.with_name(options.out.name + ".checkpoint.pt")
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        drafter.load_state_dict(state["drafter"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]
        print(f"going on after epoch {first}")
    last = min(options.epochs, options.stop_after or options.epochs)
    if first < last:
        examples = examples_of(target, head, held_out + rows)
        held_out_examples, examples = examples[: len(held_out)], examples[len(held_out) :]
    began, seen = time.time(), 0
    for epoch in range(first, last):
        drafter.train()
        for number, batch in enumerate(
            batches(rows, options.batch_tokens, random.Random(f"{options.seed}/{epoch}"))
        ):
            chosen = [examples[i] for i in batch]
            regression, entropy, agreement = losses(drafter, target, head, chosen, options.noise)
            loss = options.regression_weight * regression + options.entropy_weight * entropy
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(drafter.parameters(), options.clip)
            optimizer.step()
            schedule.step()
            seen += sum(len(example.wanted) for example in chosen)
            if number % 20 == 0:
                print(
                    f"epoch {epoch + 1}/{options.epochs} step {number}/{per_epoch} "
                    f"regression {regression:.4f} cross-entropy {entropy:.4f} "
                    f"top-1 {agreement:.3f} {seen / (time.time() - began):.0f} tokens/s",
                    flush=True,
                )
        drafter.eval()
        with torch.no_grad():
            found = [losses(drafter, target, head, [example], 0.0) for example in held_out_examples]
        means = [float(torch.stack(x).mean()) for x in zip(*found)]
        print(
            f"after epoch {epoch + 1}, held out: regression {means[0]:.4f} "
            f"cross-entropy {means[1]:.4f} top-1 {means[2]:.3f}",
            flush=True,
        )
        temporary = checkpoint.with_suffix(".tmp")
        torch.save(
            {
                "drafter": drafter.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "epoch": epoch + 1,
            },
            temporary,
        )
        os.replace(temporary, checkpoint)
    drafter.to(torch.bfloat16).save_pretrained(options.out)
    print(f"wrote {options.out}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("answer", help="have the target answer prompts")
    one.add_argument("--data", type=Path, required=True, help="JSON lines, .gz or not")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--limit", type=int)
    one.add_argument("--max-new-tokens", type=int, default=256)
    one.add_argument("--batch-size", type=int, default=256)
    one.add_argument("--chunk", type=int, default=768, help="prompts between two writes")
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=answer)
    two = commands.add_parser("train", help="train a drafter on answers")
    two.add_argument("--answers", type=Path, required=True)
    two.add_argument("--out", type=Path, required=True, help="folder of the drafter")
    two.add_argument("--describe", nargs="*", default=[], help="the data, for config and card")
    two.add_argument(
        "--vocabulary-from",
        type=Path,
        nargs="*",
        default=[],
        help="answers that the draft vocabulary is counted over (default: --answers)",
    )
    two.add_argument("--draft-vocab", type=int, default=16384)
    two.add_argument("--limit", type=int)
    two.add_argument("--held-out", type=int, default=64)
    two.add_argument("--epochs", type=int, default=6)
    two.add_argument(
        "--stop-after",
        type=int,
        metavar="N",
        help="write the drafter after epoch N; the learning rate still follows --epochs",
    )
    two.add_argument("--batch-tokens", type=int, default=4096)
    two.add_argument("--lr", type=float, default=2e-3)
    two.add_argument("--weight-decay", type=float, default=0.01)
    two.add_argument("--clip", type=float, default=1.0)
    two.add_argument("--noise", type=float, default=0.1)
    two.add_argument("--regression-weight", type=float, default=1.0)
    two.add_argument("--entropy-weight", type=float, default=1.0)
    two.add_argument("--seed", type=int, default=0)
    two.set_defaults(run=train)
    for command in (one, two):
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.run(options)


if __name__ == "__main__":
    main()
