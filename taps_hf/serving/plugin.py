"""What vLLM calls in each of its processes: the entry point `vllm.general_plugins`.

It runs for everybody who has both packages installed, whatever they serve. So it changes nothing
but how drafters of our architectures are proposed with, and never fails.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from ..formats.composition import ARCHITECTURES
from .versions import unsupported

_logger = logging.getLogger("vllm.taps_hf")  # vLLM shows what is below its own name
# Folders of EAGLE-2 drafters when vLLM is asked for `eagle3`; the model says what is wrong.
_MISTAKEN = f"Eagle3{ARCHITECTURES['eagle']}"
_OURS = set(ARCHITECTURES.values())
# Of what makes proposals in vLLM's two runners; imported when they are made.
_SUBCLASSES = {
    "EagleProposer": (".proposer", "ComposedProposer"),
    "EagleSpeculator": (".speculator", "ComposedSpeculator"),
}
_registered = False


def register() -> None:
    """Register our architectures, our proposers, and the drafters' metrics. Once a process."""
    global _registered
    if _registered:
        return
    _registered = True
    from vllm import ModelRegistry

    # By name: importing the model takes a device, which not every process may touch.
    for name in (*ARCHITECTURES.values(), _MISTAKEN):
        ModelRegistry.register_model(name, f"{__package__}.model:ComposedForCausalLM")
    if (reason := unsupported()) is not None:
        _logger.warning("%s", reason)  # raised, with the same words, if such a folder is served
        return
    _propose_with_ours()
    from prometheus_client import REGISTRY

    from .counters import Collector, counters_folder

    counters_folder()  # before vLLM starts the processes that are to know it
    REGISTRY.register(Collector())


def _propose_with_ours() -> None:
    """Have vLLM's two runners make our subclasses of their proposers for our architectures.

    Both make theirs by name, and ask with `isinstance` what it is. So the class stays, and gives an
    instance of a subclass where the draft model is ours.
    """
    from vllm.v1.spec_decode.eagle import EagleProposer
    from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

    for theirs in (EagleProposer, EagleSpeculator):
        theirs.__new__ = _maker(theirs)


def _maker(theirs: type) -> Any:
    def make(cls: type, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        model = vllm_config.speculative_config.draft_model_config
        if cls is theirs and not _OURS.isdisjoint(model.architectures):
            module, name = _SUBCLASSES[theirs.__name__]
            cls = getattr(importlib.import_module(module, __package__), name)
        return object.__new__(cls)

    return make
