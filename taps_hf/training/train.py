"""A training run, from rows to a drafter in a folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from transformers import TrainingArguments

from ..checks import is_fast_in_bfloat16, set_threads
from ..drafters.modeling_feature import FeatureDrafter
from ..files import ResultFolder, hold, read_json, write_json
from ..loading import check_frozen_target, load_target
from .card import model_card, provenance
from .drafter import drafter_to_train
from .encoding import Example
from .features import FeatureStore, filled_stores, known_features
from .folders import OPTIONS, check_folders, last_checkpoint
from .memory import check_memory, estimate_memory
from .muon import MuonWithAdamW
from .objectives import DraftObjective, Eagle3, FrozenTarget, get_objective
from .options import TrainOptions
from .regenerate import end_of_turn_ids
from .rows import TrainingRows, digest_of_examples
from .start import balance_inputs, balance_layers, copy_head, fit_projection
from .trainer import DrafterTrainer, ExampleDataset, coverage

_MEASURES = ("top_1", "deep_acceptance", "accepted_length", "chains")


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
    rows = TrainingRows(options)
    arguments = _arguments(options, work)
    # Several processes of one run share the folder; another run may not.
    with hold(work / "lock") if arguments.process_index == 0 else nullcontext():
        return _run(options, rows, arguments, result)


def _run(
    options: TrainOptions, rows: TrainingRows, arguments: TrainingArguments, result: ResultFolder
) -> dict[str, float]:
    """[`train`], once nothing speaks against `out`."""
    work = Path(arguments.output_dir)
    say = print if arguments.process_index == 0 else _silent
    dtype, device = getattr(torch, options.dtype), str(arguments.device)
    target, tokenizer = load_target(options.target, dtype, device, options.chat_template)
    check_frozen_target(target)
    examples, held_out, report = rows.encode(tokenizer, end_of_turn_ids(target, tokenizer))
    say(report)
    asked = _asked(options, arguments.world_size, examples, held_out)
    with arguments.main_process_first(local=False, desc="options"):
        _check_begun_with(asked, work)
    drafter = drafter_to_train(options, target, tokenizer, examples)
    objective = get_objective(options.objective)(
        drafter, FrozenTarget(target, drafter), options.objective_options(), options.eval_depth
    )
    for line in _expected(options, objective, examples, held_out):
        say(line)
    stores: list[FeatureStore] = []
    if options.features:
        with arguments.main_process_first(local=False, desc="features"):
            known = [x.input_ids[:-1] for x in chain(examples, *held_out.values())]
            stores = filled_stores(options.features, target, known, objective.layers)
    say(_start(options, objective, examples, stores))
    trainer = _trainer(
        options, arguments, objective.to(arguments.device), examples, held_out, stores
    )
    say(f"{len(examples)} examples, {_scored(examples)} tokens of answers; checkpoints in {work}")
    if arguments.process_index == 0:  # now that nothing is left to refuse
        write_json(work / OPTIONS, asked)
    trainer.train(resume_from_checkpoint=last_checkpoint(work))
    measured: dict[str, float] = {}
    for name, dataset in trainer.eval_dataset.items():
        found = trainer.evaluate(dataset, metric_key_prefix=name)
        measured |= {key: value for key, value in found.items() if key.endswith(_MEASURES)}
    objective.finish()
    if arguments.process_index == 0:
        record = {
            "options": asdict(options),
            "measured": measured,
            "examples": len(examples),
            "answer_tokens": _scored(examples),
            "provenance": provenance(arguments.device),
        }
        _write(drafter, record, result, work)
        say(f"wrote {options.out}: " + ", ".join(f"{k} {v:.4g}" for k, v in measured.items()))
    return measured


def _silent(*_: object) -> None:
    """Say nothing: only the main process speaks."""


def _scored(examples: Sequence[Example]) -> int:
    """Tokens of answers."""
    return sum(sum(example.is_answer) for example in examples)


def _expected(
    options: TrainOptions,
    objective: DraftObjective,
    examples: Sequence[Example],
    held_out: Mapping[str, Sequence[Example]],
) -> list[str]:
    """What is known before training: what a draft vocabulary leaves out, what the run takes.

    Raises:
        ValueError: if it takes more memory than there is.
    """
    drafter, said = objective.drafter, []
    if (tokens := drafter.draft_token_ids) is not None:
        for name, rows in held_out.items():
            covered = f"{coverage(rows, tokens):.2%} of {name}'s held-out answers"
            said.append(f"draft vocabulary of {len(tokens)}: {covered}")
    needed = estimate_memory(objective, examples, options.batch_size)
    check_memory(needed, drafter.device)
    said.append(f"about {needed / 1e9:.1f} GB of memory next to the target")
    wide = options.dtype == "float32" and not options.mixed_precision
    if not wide and not is_fast_in_bfloat16(drafter.device):
        said.append("this CPU is slow in bfloat16; faster: --dtype float32 --no-mixed-precision")
    return said


def _start(
    options: TrainOptions,
    objective: DraftObjective,
    examples: Sequence[Example],
    stores: Sequence[FeatureStore],
) -> str:
    """Give a new drafter the weights it starts with; what there is to say of the start."""
    frozen, drafter = objective.frozen, objective.drafter

    def read(example: Example) -> torch.Tensor:
        return known_features(frozen.model, stores, example.input_ids[:-1], objective.layers)

    new = options.init_from is None
    if isinstance(objective, Eagle3):
        balance_layers(objective, examples, read, scale=new)
        if options.start == "target_head" and new:
            copy_head(drafter, frozen.model)
    if not new:
        return f"training goes on from {options.init_from}"
    if isinstance(objective, Eagle3):
        return f"the drafter starts at random, with inputs of like size; start: {options.start}"
    given = (drafter, frozen.embedding, examples, read)
    if options.start == "least_squares":
        return f"the projection explains {fit_projection(*given):.1%} of the features' variance"
    balance_inputs(*given)
    return "the projection starts at random, with inputs of like size"


def _trainer(
    options: TrainOptions,
    arguments: TrainingArguments,
    objective: DraftObjective,
    examples: Sequence[Example],
    held_out: Mapping[str, Sequence[Example]],
    stores: Sequence[FeatureStore],
) -> DrafterTrainer:
    """The loop, with the optimiser that was asked for."""
    layers = objective.layers
    optimizer = None  # Trainer's own: AdamW
    if options.optimizer == "muon":
        shared = (options.learning_rate, options.weight_decay, options.beta2)
        optimizer = MuonWithAdamW(objective.drafter.named_parameters(), *shared)
    arguments.eval_steps = arguments.save_steps = _interval(options, arguments, len(examples))
    return DrafterTrainer(
        model=objective,
        args=arguments,
        train_dataset=ExampleDataset(examples, stores, layers),
        eval_dataset={
            name: ExampleDataset(rows, stores, layers) for name, rows in held_out.items()
        },
        optimizers=(optimizer, None),
    )


def _write(
    drafter: FeatureDrafter, record: dict[str, object], result: ResultFolder, work: Path
) -> None:
    """Write the drafter with its card, and the record of the run beside the checkpoints."""
    with result.writing() as folder:
        drafter.to(torch.bfloat16).save_pretrained(folder)
        model_card(drafter, record).save(folder / "README.md")
    write_json(work / "training.json", record)


def _arguments(options: TrainOptions, work: Path) -> TrainingArguments:
    first = Path(options.sources()[0].name).name
    on_cpu = options.device == "cpu" or not torch.cuda.is_available()
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
        use_cpu=on_cpu,
        eval_strategy="steps",
        save_strategy="steps",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{first}_accepted_length",
        greater_is_better=True,
        logging_steps=20,
        # Both would have the host wait for the device at every step.
        logging_nan_inf_filter=False,
        accelerator_config={"non_blocking": not on_cpu},
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


def _asked(
    options: TrainOptions,
    processes: int,
    examples: Sequence[Example],
    held_out: Mapping[str, Sequence[Example]],
) -> dict[str, object]:
    """What must be the same when a run goes on."""
    asked = asdict(options)
    for name in ("threads", "license", "out"):  # `out` says where this lies, in whatever spelling
        del asked[name]
    # As the target's tokenizer and template read them, which may change as rows may.
    rows = digest_of_examples(chain(examples, *held_out.values()))
    return {**asked, "processes": processes, "rows": rows}


def _check_begun_with(asked: Mapping[str, object], work: Path) -> None:
    """Refuse to go on with other options or rows than a run's that has left checkpoints.

    Raises:
        ValueError: if that is asked for.
    """
    if last_checkpoint(work) is None:
        return
    begun = read_json(work / OPTIONS, "the options of an earlier run")
    changed = {k: (begun.get(k), v) for k, v in asked.items() if begun.get(k) != v}
    if changed:
        raise ValueError(
            f"{work} was begun with other options, (then, now): {changed}; expected the same, "
            "or another `out`."
        )
