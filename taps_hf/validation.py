"""Everything that can be refused is refused here, before any pass of any model.

Each message names the argument, what was found and what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationMode

from .cache import CACHE, check_cache
from .drafters.base import Drafter
from .drafters.causal import CausalDrafter
from .drafters.configuration_eagle import tokenizer_fingerprint
from .drafters.lookup import PromptLookup
from .strategies import Strategy
from .target import check_forward, check_layers, masks_windows
from .trees.shapes import TreeShape
from .verification import VERIFIERS

# What generate() hands to a decoding method and a text-only target's forward takes.
_KNOWN_MODEL_KWARGS = {
    "attention_mask",
    "cache_position",
    "logits_to_keep",
    CACHE,
    "position_ids",
    "use_cache",
}
_EXPECTED = (
    "expected at least one taps_hf.Drafter, as an EagleDrafter is, or causal language model (a "
    "list of them, or a dictionary from names to them)"
)
_LOOKUP = PromptLookup()
_FINGERPRINTS: WeakKeyDictionary[PreTrainedTokenizerBase, str] = WeakKeyDictionary()
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def named_drafters(
    assistant_models: Drafter | Sequence[Drafter] | Mapping[str, Drafter],
) -> dict[str, Drafter]:
    """Drafters by name: the given names, or the last part of their paths (made unique).

    Raises:
        ValueError: unless they are drafters. There may be none: see [`check_some`].
    """
    if isinstance(assistant_models, Drafter):
        assistant_models = [assistant_models]
    if isinstance(assistant_models, Mapping):
        named = {str(name): drafter for name, drafter in assistant_models.items()}
    elif isinstance(assistant_models, Sequence) and not isinstance(assistant_models, str):
        named = {}
        for i, drafter in enumerate(assistant_models):
            path = str(getattr(drafter, "name_or_path", "")).rstrip("/")
            name = path.rpartition("/")[2] or f"drafter {i}"
            while name in named:
                name = f"{name} ({i})"
            named[name] = drafter
    else:
        named = {"assistant_models": assistant_models}
    named = {name: _as_drafter(drafter) for name, drafter in named.items()}
    wrong = {name: type(d).__name__ for name, d in named.items() if not isinstance(d, Drafter)}
    if wrong:
        raise ValueError(f"`assistant_models` is {wrong}, {_EXPECTED}.")
    return named


def _as_drafter(given: Any) -> Any:
    """What `assistant_models` takes for a drafter: a causal language model is made one."""
    if isinstance(given, PreTrainedModel) and not isinstance(given, Drafter):
        return CausalDrafter.of(given)
    return given


def check_some(drafters: dict[str, Drafter]) -> dict[str, Drafter]:
    """The drafters, if there are any.

    Raises:
        ValueError: if there are none.
    """
    if not drafters:
        raise ValueError(f"`assistant_models` is empty and no `lookup` was asked for, {_EXPECTED}.")
    return drafters


def with_lookup(drafters: Mapping[str, Drafter]) -> dict[str, Drafter]:
    """The drafters and, unless there is one among them, a lookup: always the same object, so that
    what is known of it is known in the next call.
    """
    if any(isinstance(drafter, PromptLookup) for drafter in drafters.values()):
        return dict(drafters)
    names = ("lookup", *(f"lookup ({i})" for i in range(1, len(drafters) + 1)))
    name = next(name for name in names if name not in drafters)
    return {**drafters, name: _LOOKUP}


def check_settings(
    drafters: Mapping[str, Drafter], strategy: Strategy, tree: TreeShape, verification: str
) -> None:
    """Check what can be checked without a target.

    Raises:
        ValueError: for settings that are unknown or do not go together.
    """
    if not isinstance(tree, TreeShape):
        raise ValueError(
            f"`tree` is {tree!r}, expected a tree shape such as taps_hf.DynamicTree(depth=5, "
            "top_k=8, num_nodes=24)."
        )
    for name, drafter in drafters.items():
        scored = drafter.num_scored_tokens
        if scored is not None and scored < tree.min_vocab_size:
            raise ValueError(
                f"`tree` asks for {tree.min_vocab_size} children of a node, but drafter {name!r} "
                f"scores only {scored} tokens."
            )
    if not isinstance(verification, str) or verification not in VERIFIERS:
        raise ValueError(
            f"`verification` is {verification!r}, expected one of {', '.join(sorted(VERIFIERS))}."
        )
    strategy.check(len(drafters))
    if verification == "rejection":
        unable = [name for name, drafter in drafters.items() if not drafter.samples]
        if unable:
            raise ValueError(
                f'`verification` is "rejection", but {", ".join(unable)} cannot sample proposals '
                "with their distributions; expected drafters that do, or the walk."
            )
        if tree.follows_tokens:
            raise ValueError(
                f'`tree` is {tree!r} and `verification` is "rejection": proposals are sampled, and '
                "a tree shaped by their confidence would change their distribution; expected a "
                "FixedTree or a ChainTree."
            )
        if not strategy.supports_sampled_proposals:
            raise ValueError(
                f'`strategy` is {strategy!r} and `verification` is "rejection": proposals are '
                "sampled, and choosing among them would change their distribution; expected "
                "single, or merged without a node budget."
            )


def check_target(model: PreTrainedModel) -> None:
    """Check that trees can be verified by this model.

    Raises:
        ValueError: for encoder-decoder models, attention kernels that take no tree mask, layers of
            kinds that cannot forget a rejected branch, models without position ids or a head, and
            methods set on the object that would be bypassed.
    """
    kind = type(model).__name__
    _check_preparation(model)
    if model.config.is_encoder_decoder:
        raise ValueError(f"The target is an encoder-decoder model ({kind}), expected decoder-only.")
    config = model.config.get_text_config(decoder=True)
    if config is not model.config:
        raise ValueError(f"The target ({kind}) is multimodal, expected a text-only causal model.")
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"The target's attention implementation is {attention!r}, which takes no tree mask; "
            'expected "sdpa" or "eager" (model.set_attn_implementation("sdpa")).'
        )
    odd = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if odd or getattr(config, "attention_chunk_size", None):
        found = ", ".join(sorted(odd)) or "chunked_attention"
        raise ValueError(
            f"The target ({kind}) has layers of type {found}; expected "
            f"{' and '.join(sorted(_LAYER_TYPES))} only."
        )
    if _is_encoder(model) or getattr(config, "use_bidirectional_attention", None):
        raise ValueError(f"The target ({kind}) attends both ways, expected a causal model.")
    check_forward(model)
    if model.get_output_embeddings() is None or model.base_model is model:
        raise ValueError(f"The target ({kind}) has no LM head, expected a causal language model.")


def check_weights(model: PreTrainedModel) -> None:
    """Check that a target's weights are where decoding needs them.

    Raises:
        ValueError: if its embedding is not on a device, by which a session goes.
    """
    if model.get_input_embeddings().weight.device.type == "meta":
        raise ValueError(
            f"The target's embedding ({type(model).__name__}) is offloaded; expected a "
            "`device_map` that keeps it on a device."
        )


def _is_encoder(model: PreTrainedModel) -> bool:
    """Whether a model is of BERT's kind, and was not told to be a decoder.

    The configuration alone does not tell: GPT-NeoX's says the same. Nor do modules: attention to an
    encoder's states is not causal either.
    """
    return getattr(model.config, "is_decoder", None) is False and any(
        vars(module).get(name) is False
        for module in model.base_model.modules()
        for name in ("is_causal", "is_decoder")  # whichever the family has
    )


def _check_preparation(model: PreTrainedModel) -> None:
    """Refuse a `prepare_inputs_for_generation` set on the object: trees are prepared without it.

    peft sets one on the base model while `PeftModel.generate` runs with prompt learning, to put
    virtual tokens or a prefix before the prompt. Afterwards it leaves the class's own there.
    """
    prepare = vars(model).get("prepare_inputs_for_generation")
    owner = getattr(prepare, "__self__", None)
    own = type(model).prepare_inputs_for_generation
    if prepare is None or (owner is model and getattr(prepare, "__func__", None) is own):
        return
    adapter = getattr(owner, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(
            f"The target's adapter is {getattr(adapter.peft_type, 'value', adapter.peft_type)}, "
            "which puts learnt states before the prompt that draft trees do not have; expected an "
            "adapter inside the layers (LoRA, IA3, ...), or none (`disable_adapter`)."
        )
    raise ValueError(
        f"The target ({type(model).__name__}) has a `prepare_inputs_for_generation` of its own "
        f"({prepare!r}), which draft trees would bypass; expected the one of its class."
    )


def check_drafter(name: str, drafter: Drafter, model: PreTrainedModel) -> None:
    """Check that a drafter fits a target.

    Raises:
        ValueError: as [`Drafter.check_target`], and if it reads layers that cannot be read.
    """
    drafter.check_target(name, model)
    check_layers(model, drafter.reads_layers)


def check_tokenizer(drafters: Mapping[str, Drafter], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that drafters were trained with this tokenizer's vocabulary.

    Raises:
        ValueError: if a drafter's recorded fingerprint differs from the tokenizer's.
    """
    expected = {d.tokenizer_fingerprint for d in drafters.values()} - {None}
    if not expected:
        return
    if tokenizer not in _FINGERPRINTS:  # half a second for a large vocabulary: not in every call
        _FINGERPRINTS[tokenizer] = tokenizer_fingerprint(tokenizer)
    found = _FINGERPRINTS[tokenizer]
    for name, drafter in drafters.items():
        recorded = drafter.tokenizer_fingerprint
        if recorded not in (None, found):
            raise ValueError(
                f"Drafter {name!r} was trained with a tokenizer of fingerprint {recorded}, but "
                f"`tokenizer` ({tokenizer.name_or_path}) has {found}: their vocabularies differ."
            )


def check_call(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> None:
    """Check what `generate` prepared for this call.

    Raises:
        ValueError: for anything but greedy search or sampling of one sequence with a dynamic cache.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"The generation mode is {mode.value!r} (num_beams={generation_config.num_beams}), "
            "expected greedy search or sampling with `assistant_models`."
        )
    if (generation_config.num_return_sequences or 1) > 1:
        raise ValueError(
            f"`num_return_sequences` is {generation_config.num_return_sequences}, expected 1 with "
            "`assistant_models`."
        )
    if input_ids.shape[0] != 1:
        raise ValueError(
            f"The batch has {input_ids.shape[0]} sequences, expected 1 with `assistant_models`."
        )
    if input_ids.shape[1] == 0 or model_kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "The prompt was given as `inputs_embeds`, expected `input_ids`: drafters read tokens."
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name):
            raise ValueError(
                f"`{name}` is True, expected False with `assistant_models`: a pass over a tree has "
                "no per-token counterpart of it. `output_scores` and `output_logits` are available."
            )
    odd = sorted(
        k for k, v in model_kwargs.items() if v is not None and k not in _KNOWN_MODEL_KWARGS
    )
    if odd:
        raise ValueError(
            f"`generate` was given {', '.join(odd)}, which draft trees cannot carry; expected only "
            f"text inputs ({', '.join(sorted(_KNOWN_MODEL_KWARGS))})."
        )
    if not generation_config.use_cache:
        raise ValueError("`use_cache` is False, expected True with `assistant_models`.")
    cache = model_kwargs.get(CACHE)
    check_cache(cache)
    _check_windows(model, cache, generation_config)
    _check_rotary(model, max(input_ids.shape[1], cache.get_seq_length()), generation_config)


def _check_windows(
    model: PreTrainedModel, cache: DynamicCache, generation_config: GenerationConfig
) -> None:
    """Refuse runs in which the cache forgets what the target's attention would still see.

    Plain generate then attends to the whole prompt in its one pass over it, and to a window later:
    what a token sees depends on how the text is cut into passes.
    """
    if masks_windows(model):
        return
    windows = [layer.sliding_window for layer in cache.layers if layer.is_sliding]
    if windows and generation_config.max_length > min(windows):
        raise ValueError(
            f"The target ({type(model).__name__}) has no sliding windows, but its cache forgets "
            f"all but {min(windows)} tokens and `max_length` is {generation_config.max_length}; "
            f"expected `sliding_window` None in its config (or `{CACHE}=DynamicCache()`)."
        )


def _check_rotary(model: PreTrainedModel, length: int, generation_config: GenerationConfig) -> None:
    """Refuse runs in which plain generate would change the rotary frequencies on the way.

    They follow the length of a pass ("dynamic" and "longrope" scaling), and passes over trees have
    other lengths.
    """
    config = model.config.get_text_config(decoder=True)
    scaling = getattr(config, "rope_parameters", None) or {}
    ropes = [scaling] if "rope_type" in scaling else scaling.values()
    for rope in (rope for rope in ropes if rope):  # layers of some type may have none
        kind = rope.get("rope_type")
        limit = config.max_position_embeddings
        if kind == "dynamic" and length >= limit:
            raise ValueError(
                f"The target's positions are scaled dynamically beyond {limit} tokens and the "
                f"prompt has {length}; expected fewer than {limit} with `assistant_models`."
            )
        limit = rope.get("original_max_position_embeddings") or limit
        if kind == "longrope" and length <= limit + 1 and generation_config.max_length > limit:
            raise ValueError(
                f"The target's positions are scaled differently beyond {limit} tokens (longrope), "
                f"and this run would go from {length} to {generation_config.max_length}; expected "
                "`max_length` on the same side with `assistant_models`."
            )
