"""Teaches `generate` the arguments of speculative decoding, and can take them back.

Calls without `assistant_models` go to transformers' own `generate` untouched.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

from transformers import GenerationMixin, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from .formats.names import with_loaded
from .generation import SpeculativeDecoding

_SETTINGS = (
    "strategy",
    "tree",
    "verification",
    "output_draft_trees",
    "on_cycle",
    "lookup",
    "compile",
)
_MARK = "_taps_hf_original"


def enable() -> None:
    """Extend `generate` of all transformers models. Importing the package does this."""
    original = GenerationMixin.generate
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A repository's own decoding takes what arguments it likes (`bundle` writes such a one).
        if "assistant_models" not in kwargs or isinstance(kwargs.get("custom_generate"), str):
            return original(self, *args, **kwargs)
        return _speculative_generate(original, self, *args, **kwargs)

    setattr(generate, _MARK, original)
    GenerationMixin.generate = generate


def disable() -> None:
    """Undo [`enable`]: `generate` is transformers' own again."""
    GenerationMixin.generate = getattr(GenerationMixin.generate, _MARK, GenerationMixin.generate)


def is_enabled() -> bool:
    """Whether `generate` knows `assistant_models`."""
    return hasattr(GenerationMixin.generate, _MARK)


def speculative_generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`model.generate(..., assistant_models=...)`, whether or not `generate` knows the argument.

    What a `custom_generate` repository runs (`bundle`).

    Raises:
        ValueError: without `assistant_models`, and as `generate` raises with them.
    """
    if kwargs.get("assistant_models") is None:
        raise ValueError("`assistant_models` was not given, expected drafters or names of some.")
    original = getattr(GenerationMixin.generate, _MARK, GenerationMixin.generate)
    return _speculative_generate(original, model, *args, **kwargs)


def _speculative_generate(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` with `assistant_models`: bind the settings, run as a custom decoding method."""
    names = list(inspect.signature(original).parameters)[1:]
    kwargs = {**dict(zip(names, args)), **kwargs}
    assistant_models = kwargs.pop("assistant_models")
    settings = {name: kwargs.pop(name) for name in _SETTINGS if name in kwargs}
    if assistant_models is None:
        if settings:
            raise ValueError(
                f"`assistant_models` is None, but {', '.join(settings)} was given; expected "
                "drafters."
            )
        return original(model, **kwargs)
    for name in ("assistant_model", "custom_generate"):
        if kwargs.get(name) is not None:
            raise ValueError(f"`{name}` was given together with `assistant_models`, expected one.")
    for name in ("synced_gpus", "token_healing"):
        if kwargs.get(name):
            raise ValueError(f"`{name}` is True, expected False with `assistant_models`.")
    if kwargs.get("cache_implementation") == "paged":
        raise ValueError('`cache_implementation` is "paged", expected a dynamic cache.')

    decoding = SpeculativeDecoding(
        with_loaded(assistant_models, model),
        **settings,
        streamer=kwargs.get("streamer"),
        tokenizer=kwargs.get("tokenizer"),
    )
    decoding.check(model)
    kwargs = _bind_stop_strings(model, kwargs)
    return original(model, **{**kwargs, "custom_generate": decoding})


def _bind_stop_strings(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Turn stop strings into a stopping criterion.

    With a callable decoding method `generate` drops the tokenizer that stop strings need, so what
    it would have built from them is built here.
    """
    config, tokenizer = kwargs.get("generation_config"), kwargs.get("tokenizer")
    of_config = getattr(config, "stop_strings", None)
    of_model = model.generation_config.stop_strings
    of_both = of_model if of_config is None else of_config
    # A keyword argument has the last word over configurations, None too.
    stop_strings = kwargs.get("stop_strings", of_both)
    if stop_strings is None or tokenizer is None:  # without a tokenizer generate itself complains
        return kwargs
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
    # A criterion that was given takes the place of the one of its kind that generate would make.
    if not any(isinstance(criterion, StopStringCriteria) for criterion in criteria):
        criteria.insert(0, StopStringCriteria(tokenizer, stop_strings))
    kwargs = {**kwargs, "stopping_criteria": criteria}
    if of_config is not None:
        kwargs["generation_config"] = copy.deepcopy(config)
        kwargs["generation_config"].stop_strings = None
    # Only then, for generate warns of arguments that are given beside a configuration.
    if "stop_strings" in kwargs or of_model is not None:
        kwargs["stop_strings"] = None
    return kwargs
