"""The models that are timed, as the command line names them."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from taps_hf import EagleDrafter
from taps_hf.checks import check_device, named_paths
from taps_hf.drafters.causal import CausalDrafter
from taps_hf.embedded import EMBEDDED_DRAFTERS
from taps_hf.loading import EMBEDDED, load_drafter, load_target

ROOT = Path(__file__).resolve().parent.parent
DRAFTERS = [f"{name}={ROOT / 'hub_cards' / folder}" for name, folder in EMBEDDED_DRAFTERS.items()]
DTYPES = ("float32", "bfloat16", "float16")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which models are loaded, and how they run."""
    parser.add_argument(
        "--target", default=EMBEDDED, help=f"folder or Hub name (default: {EMBEDDED})"
    )
    parser.add_argument("--drafters", nargs="+", default=DRAFTERS, metavar="NAME=PATH")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's own)")


def check_model_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit, saying what is wrong, unless drafters are named and there is such a device."""
    try:
        named_paths(options.drafters, "--drafters")
        check_device(options.device)
    except ValueError as error:
        parser.error(str(error))


def add_compile_option(parser: argparse.ArgumentParser) -> None:
    """Add what has compiled ways measured beside the others."""
    parser.add_argument(
        "--compile",
        nargs="?",
        type=_compile_config,
        const="inductor:reduce-overhead",
        metavar="BACKEND[:MODE]",
        help="measure every way compiled, too, plain generate with a static cache among them "
        "(without a value: inductor:reduce-overhead)",
    )


def _compile_config(text: str) -> CompileConfig:
    backend, _, mode = text.partition(":")
    return CompileConfig(backend=backend, mode=mode or None, fullgraph=True)


def plain_compiled(config: CompileConfig) -> dict[str, Any]:
    """What plain `generate` gets to run compiled, on a CPU as well."""
    everywhere = copy.copy(config)
    everywhere._compile_all_devices = True  # as transformers' own tests set it
    return {"cache_implementation": "static", "compile_config": everywhere}


def load_small_model(
    options: argparse.Namespace, path: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, CausalDrafter]]:
    """The target, its tokenizer, and an ordinary language model as the only drafter, "small"."""
    logging.disable_progress_bar()
    target, tokenizer = load_target(options.target, getattr(torch, options.dtype), options.device)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=target.dtype).to(target.device).eval()
    return target, tokenizer, {"small": CausalDrafter.of(model)}


def load_models(
    options: argparse.Namespace, drafter_dtype: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, EagleDrafter]]:
    """The target, its tokenizer, and the drafters by name, in a dtype or "auto" (as saved)."""
    logging.disable_progress_bar()
    dtype = getattr(torch, options.dtype)
    target, tokenizer = load_target(options.target, dtype, options.device)
    kept = "auto" if drafter_dtype == "auto" else getattr(torch, drafter_dtype)
    drafters = {
        name: load_drafter(path, target, name=name, dtype=kept)
        for name, path in named_paths(options.drafters, "--drafters").items()
    }
    return target, tokenizer, drafters
