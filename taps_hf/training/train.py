"""A training run, from rows to a drafter in a folder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..checks import loading, set_threads
from ..drafters.configuration_eagle import tokenizer_fingerprint
from ..drafters.modeling_eagle import EagleDrafter
from ..files import ResultFolder, hold, read_json, write_json
from ..loading import check_target, load_target
from ..validation import check_drafter, check_tokenizer
from .card import model_card, provenance
from .conversations import DataReport, DataSource, SourceRow, digest_of, read_mixture
from .encoding import Example, encode_rows
from .features import FeatureStore, features_of, fill_store
from .folders import OPTIONS, check_folders, last_checkpoint
from .memory import check_memory, estimate_memory
from .muon import MuonWithAdamW
from .objectives import DraftObjective, FrozenTarget
from .options import TrainOptions
from .regenerate import end_of_turn_ids
from .start import balance_inputs, check_can_be_fitted, fit_projection
from .trainer import DrafterTrainer, ExampleDataset, coverage, frequent_tokens


def train(options: TrainOptions) -> dict[str, float]:
    """Train a drafter and write it to `options.out`, in bfloat16, with a model card.

    Checkpoints lie beside it, in `<out>.checkpoints`; a run that was stopped goes on from the last
    one if it is started with the same options. A folder that holds anything but the result of an
    earlier run, as it was written, is never touched.

    Returns:
        what was measured on held-out rows, of the best checkpoint, which is the one written.

    Raises:
        ValueError: before work starts, for data, a target, options or an `out` that cannot be used.
    """
    result, work = check_folders(options)
    set_threads(options.threads)
    # Probabilities this small change nothing and slow a CPU's softmax down several times.
    torch.set_flush_denormal(True)
    rows = _Rows(options)
    arguments = _arguments(options, work)
    # Several processes of one run share the folder; another run may not.
    with hold(work / "lock") if arguments.process_index == 0 else nullcontext():
        return _run(options, rows, arguments, result)


def _run(
    options: TrainOptions, rows: _Rows, arguments: TrainingArguments, result: ResultFolder
) -> dict[str, float]:
    """[`train`], once nothing speaks against `out`."""
    work = Path(arguments.output_dir)
    with arguments.main_process_first(local=False, desc="options"):
        _remember(options, arguments.world_size, rows.digest(), work)
    dtype = getattr(torch, options.dtype)
    target, tokenizer = load_target(
        options.target, dtype, str(arguments.device), options.chat_template
    )
    check_target(target)
    say = print if arguments.process_index == 0 else _silent
    examples, held_out, report = rows.encode(tokenizer, end_of_turn_ids(target, tokenizer))
    say(report)
    drafter = _drafter(options, target, tokenizer, examples)
    if drafter.draft_token_ids is not None:
        for name, rows in held_out.items():
            say(
                f"draft vocabulary of {len(drafter.draft_token_ids)}: "
                f"{coverage(rows, drafter.draft_token_ids):.2%} of {name}'s held-out answers"
            )
    frozen = FrozenTarget(target, drafter)
    objective_options = options.objective_options()
    needed = estimate_memory(
        drafter, examples, options.batch_size, objective_options.steps, len(frozen.head_weight)
    )
    say(f"about {needed / 1e9:.1f} GB of memory next to the target")
    check_memory(needed, arguments.device)
    stores: list[FeatureStore] = []
    if options.features:
        with arguments.main_process_first(local=False, desc="features"):
            stores = _stores(options, target, [examples, *held_out.values()])
    if options.init_from is None:
        given = (drafter, frozen.embedding, examples, _features_reader(target, stores))
        if options.start == "least_squares":
            say(f"the projection explains {fit_projection(*given):.1%} of the features' variance")
        else:
            balance_inputs(*given)
    objective = DraftObjective(drafter, frozen, objective_options, options.eval_depth)
    objective.to(arguments.device)
    optimizer = None  # Trainer's own: AdamW
    if options.optimizer == "muon":
        shared = (options.learning_rate, options.weight_decay, options.beta2)
        optimizer = MuonWithAdamW(drafter.parameters(), *shared)
    trainer = DrafterTrainer(
        model=objective,
        args=arguments,
        train_dataset=ExampleDataset(examples, stores),
        eval_dataset={name: ExampleDataset(rows, stores) for name, rows in held_out.items()},
        optimizers=(optimizer, None),
    )
    arguments.eval_steps = arguments.save_steps = _interval(options, arguments, len(examples))
    scored = sum(sum(example.is_answer) for example in examples)
    say(f"{len(examples)} examples, {scored} tokens of answers; checkpoints in {work}")
    trainer.train(resume_from_checkpoint=last_checkpoint(work))
    measured: dict[str, float] = {}
    for name, dataset in trainer.eval_dataset.items():
        measured |= trainer.evaluate(dataset, metric_key_prefix=name)
    kept = ("top_1", "deep_acceptance", "accepted_length", "chains")
    measured = {k: v for k, v in measured.items() if k.endswith(kept)}
    if arguments.process_index == 0:
        record = {
            "options": asdict(options),
            "measured": measured,
            "examples": len(examples),
            "answer_tokens": scored,
            "provenance": provenance(arguments.device),
        }
        with result.writing() as folder:
            drafter.to(torch.bfloat16).save_pretrained(folder)
            model_card(drafter, record).save(folder / "README.md")
        write_json(work / "training.json", record)
        say(f"wrote {options.out}: " + ", ".join(f"{k} {v:.4g}" for k, v in measured.items()))
    return measured


def _silent(*_: object) -> None:
    """Say nothing: only the main process speaks."""


def _arguments(options: TrainOptions, work: Path) -> TrainingArguments:
    first = Path(options.sources()[0].name).name
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,  # below 1: a share of the steps
        weight_decay=options.weight_decay,
        adam_beta2=options.beta2,
        max_grad_norm=options.clip,
        bf16=options.mixed_precision,
        use_cpu=options.device == "cpu" or not torch.cuda.is_available(),
        eval_strategy="steps",
        save_strategy="steps",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{first}_accepted_length",
        greater_is_better=True,
        logging_steps=20,
        report_to=options.report_to,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=options.seed,
        ddp_find_unused_parameters=False,
        ddp_timeout=24 * 3600,  # the others wait while the main process fills a feature store
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # no DataParallel: several GPUs by a launcher
    return arguments


def _interval(options: TrainOptions, arguments: TrainingArguments, examples: int) -> int:
    """Steps between two evaluations."""
    batch = arguments.train_batch_size * arguments.world_size * options.gradient_accumulation
    steps = options.max_steps
    if steps < 0:
        steps = math.ceil(math.ceil(examples / batch) * options.epochs)
    return max(1, steps // options.evaluations)


def _remember(options: TrainOptions, processes: int, data: str, work: Path) -> None:
    """Keep the options with the checkpoints; refuse to go on with others.

    Raises:
        ValueError: if the folder holds checkpoints of a run with other options.
    """
    file = work / OPTIONS
    asked = asdict(options)
    for name in ("threads", "license"):  # may differ from run to run
        del asked[name]
    asked |= {"processes": processes, "rows": data}
    if file.exists():
        begun = read_json(file, "the options of an earlier run")
        changed = {k: (begun.get(k), v) for k, v in asked.items() if begun.get(k) != v}
        if changed:
            raise ValueError(
                f"{work} was begun with other options, (then, now): {changed}; expected the same, "
                "or another `out`."
            )
    else:
        write_json(file, asked)


class _Rows:
    """The rows of a run, read before anything else is done.

    Raises:
        ValueError: for data that cannot be read, or two sources of one name.
    """

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        self.report = DataReport()
        self.mixture = read_mixture(options.sources(), self.report, options.seed)
        self.by_source: dict[str, list[SourceRow]] = {}
        for text in [*options.data, *options.eval_data]:
            source = DataSource.parse(text)
            name = Path(source.name).name
            if name in self.by_source:
                raise ValueError(f"{name} is given twice; expected sources with different names.")
            self.by_source[name] = read_mixture(
                [DataSource(source.name)], DataReport(), options.seed
            )

    def digest(self) -> str:
        """Of what all rows say."""
        return digest_of(chain(self.mixture, *self.by_source.values()))

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, ends: set[int]
    ) -> tuple[list[Example], dict[str, list[Example]], DataReport]:
        """Training examples, the held-out ones of each source, and what became of the rows.

        Raises:
            ValueError: if nothing is left to train on, or nothing is held out of a source.
        """
        options = self.options
        examples = encode_rows(tokenizer, self.mixture, options.max_length, self.report, ends)
        training = [x for x in examples if not is_held_out(x, options.held_out)]
        held_out = {}
        for name, rows in self.by_source.items():
            found = []
            for row in rows:
                for x in encode_rows(tokenizer, [row], options.max_length, DataReport(), ends):
                    found += [x] if is_held_out(x, options.held_out) else []
                if len(found) == options.eval_rows:
                    break
            held_out[name] = found
        empty = [name for name, found in held_out.items() if not found]
        if not training or empty:
            raise ValueError(
                f"{len(training)} rows are left to train on, and none is held out of {empty}; "
                "expected more data, or another `held_out`."
            )
        return training, held_out, self.report


def is_held_out(example: Example, share: float) -> bool:
    """Whether a row is kept out of training: by its tokens, so alike in every run and mixture."""
    text = ",".join(map(str, example.input_ids)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < share * 2**64


def _drafter(
    options: TrainOptions,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
) -> EagleDrafter:
    backbone = "eagle2" if options.objective == "eagle" else "hass"
    names = [str(Path(text).name) for text in options.data]
    tokens = None
    if options.draft_vocab is not None:
        size = target.get_output_embeddings().weight.shape[0]
        tokens = frequent_tokens(examples, options.draft_vocab, size)
    if options.init_from is not None:
        with loading(f"`init_from` ({options.init_from})"):
            drafter = EagleDrafter.from_pretrained(options.init_from, dtype=torch.float32)
        check_drafter(options.init_from, drafter, target)
        check_tokenizer({options.init_from: drafter}, tokenizer)
        asked = {"fc_bias": options.fc_bias, "input_norm": options.input_norm}
        found = {name: getattr(drafter.config, name) for name in asked}
        if any(asked[name] and asked[name] != found[name] for name in asked):
            raise ValueError(f"`init_from` is a drafter with {found}, but {asked} was asked for.")
        drafter.config.backbone, drafter.config.training_data = backbone, names
        if tokens is not None:
            drafter.score_only(tokens)
        return drafter.to(target.device).train()
    torch.manual_seed(options.seed)
    drafter = EagleDrafter.from_target(
        target,
        draft_token_ids=tokens,
        fc_bias=options.fc_bias,
        input_norm=options.input_norm,
        backbone=backbone,
        target_name_or_path=target.config.name_or_path,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        training_data=names,
    )
    drafter = drafter.float()
    if options.start == "least_squares":
        check_can_be_fitted(drafter)
    return drafter.train()


def _features_reader(
    target: PreTrainedModel, stores: Sequence[FeatureStore]
) -> Callable[[Example], torch.Tensor]:
    """Reads, or computes, the features of an example."""

    def read(example: Example) -> torch.Tensor:
        known = example.input_ids[:-1]
        for store in stores:
            if known in store:
                return store.read(known)
        return features_of(target, torch.tensor([known], device=target.device))[0]

    return read


def _stores(
    options: TrainOptions, target: PreTrainedModel, parts: Sequence[Sequence[Example]]
) -> list[FeatureStore]:
    width = target.config.get_text_config(decoder=True).hidden_size
    stores = [
        FeatureStore(folder, target.config.name_or_path, width) for folder in options.features
    ]
    rows = [example.input_ids[:-1] for part in parts for example in part]
    missing = [ids for ids in rows if not any(ids in store for store in stores)]
    fill_store(stores[0], target, missing)
    return stores
