"""What a measurement belongs to: models, options, machine and versions, and how they are shown."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import taps_hf
from taps_hf.drafters.base import Drafter


def settings_of(
    options: argparse.Namespace, model: PreTrainedModel, drafters: Mapping[str, Drafter]
) -> dict[str, Any]:
    """What rows must have in common to be compared."""
    name = str(model.config.name_or_path)
    return {
        "target": Path(name).name if os.path.isdir(name) else name,
        "drafters": {name: drafter.digest() for name, drafter in drafters.items()},
        "dtype": options.dtype,
        "drafter_dtype": options.drafter_dtype,
        "draft_vocab": options.draft_vocab,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "context": options.context,
        "filler": [Path(spec).name for spec in options.filler],
        "context_window": options.context_window,
        "hardware": hardware(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "taps_hf": taps_hf.__version__,
    }


def hardware(device: torch.device) -> str:
    """What a device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        model = found[1].strip() if found else model
    return f"{model}, {os.cpu_count()} cores"


def heading(settings: Mapping[str, Any]) -> str:
    """Settings in a line."""
    temperature = settings["temperature"]
    scored = f" scoring {size} tokens" if (size := settings["draft_vocab"]) else ""
    return (
        f"{settings['target']}, {settings['dtype']}, drafters {settings['drafter_dtype']}{scored}, "
        f"{f'temperature {temperature}' if temperature else 'greedy'}, "
        f"at most {settings['max_new_tokens']} tokens"
        f"{f', after at least {context}' if (context := settings['context']) else ''}"
        f"{f', drafters seeing {window} slots' if (window := settings['context_window']) else ''}; "
        f"{settings['hardware']}, "
        f"{settings['threads']} threads; torch {settings['torch']}, transformers "
        f"{settings['transformers']}, taps-hf {settings['taps_hf']}"
    )


def command(argv: Sequence[str], script: str = "decode.py") -> str:
    """The command line; of paths that lead out of the working folder only the last part."""
    shown = [re.sub(r"(^|=)(/|\.\./)\S*/", r"\1", argument) for argument in argv]
    return shlex.join(["python", f"benchmarks/{script}", *shown])
