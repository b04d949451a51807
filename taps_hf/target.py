"""The target's side of one generation: prefill, one pass over a tree, and keeping a path."""

from __future__ import annotations

import copy
import inspect
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from .cache import CACHE, GrowingSlidingWindowLayer, InPlaceCache
from .masks import additive
from .trees.tree import DraftTree, move_together

LAST = -1
"""Among layers: the last hidden states, after the final norm: what the LM head reads."""


class StateRecorder:
    """Notes down hidden states of a target's layers while a shell of it runs."""

    def __init__(self) -> None:
        self.states: dict[int, torch.Tensor] = {}  # (1, N, hidden), by layer

    def hook(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        """A forward hook that notes down what a layer returns."""

        def note(module: nn.Module, args: Any, output: Any) -> None:
            self.states[layer] = output if isinstance(output, torch.Tensor) else output[0]

        return note


def _shell_of(module: nn.Module) -> nn.Module:
    """A copy that shares everything with the module but its table of modules and its hooks."""
    shell = copy.copy(module)
    shell.__dict__["_modules"] = dict(module._modules)
    shell.__dict__["_forward_hooks"] = OrderedDict(module._forward_hooks)
    for name in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        shell.__dict__[name] = OrderedDict(getattr(module, name))
    return shell


def recording_decoder(
    model: PreTrainedModel, layers: Collection[int]
) -> tuple[nn.Module, StateRecorder]:
    """A shell around the decoder of `model`, and the recorder inside it.

    Its recorder holds the states of these layers, and of [`LAST`], after each of its passes.

    Args:
        model: nothing is stored on it.
        layers: indices of decoder layers, or [`LAST`], that [`check_layers`] lets pass.
    """
    recorder = StateRecorder()
    decoder = _shell_of(model.base_model)
    decoder.register_forward_hook(recorder.hook(LAST))
    inner = sorted(set(layers) - {LAST})
    if inner:
        stack = _shell_of(decoder.layers)
        for layer in inner:
            stack._modules[str(layer)] = _shell_of(stack._modules[str(layer)])
            stack._modules[str(layer)].register_forward_hook(recorder.hook(layer))
        decoder._modules["layers"] = stack
    return decoder, recorder


def recording(
    model: PreTrainedModel, layers: Collection[int]
) -> tuple[PreTrainedModel, StateRecorder]:
    """A shell around the modules of `model`, for one generation, and the recorder inside it.

    What drafters read is wanted beside the logits, without keeping all layers' hidden states and
    without a hook on a model that other threads may be using (transformers 5.0 collects
    `output_hidden_states` by patching the layers, which two threads can leave patched for good).

    The shell's `forward` is the model's, one set on the object included ([`check_forward`]).
    """
    decoder, recorder = recording_decoder(model, layers)
    shell = _shell_of(model)
    shell._modules[model.base_model_prefix] = decoder
    # accelerate's wrapper around the model itself only moves inputs and outputs; its hooks on the
    # submodules stay in effect.
    forward = shell.__dict__.pop("forward", None)
    if forward is not None and not _dispatched(model):
        shell.__dict__["forward"] = types.MethodType(forward.__func__, shell)
    return shell, recorder


def check_layers(model: PreTrainedModel, layers: Collection[int]) -> None:
    """Check that hidden states of these layers can be recorded.

    Args:
        model: the target.
        layers: indices of decoder layers, from 0: what they return; or [`LAST`].

    Raises:
        ValueError: if there are no such layers, or they could not be told apart from the model's.
    """
    inner = set(layers) - {LAST}
    if not inner:
        return
    kind = type(model).__name__
    decoder = model.base_model
    found = getattr(decoder, "layers", None)
    if not isinstance(found, nn.ModuleList):
        raise ValueError(f"The target ({kind}) has no list of `layers` that drafters could read.")
    odd = sorted(layer for layer in inner if not 0 <= layer < len(found))
    if odd:
        raise ValueError(
            f"Drafters read the target's layers {odd}, expected 0 to {len(found) - 1} ({kind} has "
            f"{len(found)} layers)."
        )
    if "forward" in vars(decoder):
        raise ValueError(
            f"The target's decoder ({type(decoder).__name__}) has a `forward` of its own (set by "
            "a `device_map` for all of it, perhaps), so drafters cannot read its layers "
            f"{sorted(inner)}; expected the one of its class."
        )


def check_forward(model: PreTrainedModel) -> None:
    """Check that the model's `forward` can be run with a recorder in it.

    Raises:
        ValueError: if it names no `position_ids` or no cache, or is a function set on the object
            that is not bound to it: that would run the object's own modules, whatever it is called
            on.
    """
    kind = type(model).__name__
    parameters = inspect.signature(type(model).forward).parameters
    for name in ("position_ids", CACHE):
        if name not in parameters:
            taking = ", ".join(str(parameter) for parameter in list(parameters.values())[1:])
            raise ValueError(
                f"The target's forward ({kind}) names no `{name}`, which nodes of a tree need: it "
                f"takes ({taking}). Expected it among the named parameters."
            )
    forward = vars(model).get("forward")
    if forward is None or _dispatched(model):
        return
    if not isinstance(forward, types.MethodType) or forward.__self__ is not model:
        raise ValueError(
            f"The target ({kind}) has a `forward` of its own that is not a method bound to it (a "
            f"{type(forward).__name__}), which draft trees would bypass; expected the one of its "
            "class, or types.MethodType(function, model)."
        )


def _dispatched(model: PreTrainedModel) -> bool:
    """Whether the object's `forward` is nothing but accelerate's, for a `device_map`."""
    hook = vars(model).get("_hf_hook")
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    wrapper = getattr(vars(model).get("forward"), "func", None)  # of a functools.partial
    old = vars(model).get("_old_forward")
    return (
        all(isinstance(hook, AlignDevicesHook) for hook in hooks)
        and getattr(wrapper, "__module__", None) == AlignDevicesHook.__module__
        and getattr(old, "__func__", None) is type(model).forward
    )


class TargetSession:
    """Runs the target for one sequence.

    Invariant between passes: everything before the root (the last emitted token) is in the cache.

    Args:
        model: the target; nothing is stored on it.
        input_ids: (1, T) int64, as `generate` gives it to a decoding method.
        generation_config: as prepared by `generate`.
        model_kwargs: as prepared by `generate`; its cache is extended in place.
        layers: whose states drafters read: indices of decoder layers, or [`LAST`].

    As a context manager it releases the cache at the end.

    Raises:
        ValueError: if the cache already covers the whole prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        layers: Collection[int] = (LAST,),
    ) -> None:
        self.model = model
        self._layers = tuple(layers)
        self._shell, self._recorder = recording(model, layers)
        self.device = model.get_input_embeddings().weight.device
        self._prefill_chunk_size = generation_config.prefill_chunk_size
        config = model.config.get_text_config(decoder=True)
        self._window, self._layer_types = attention_of(model)
        mask = model_kwargs.get("attention_mask")
        cache = model_kwargs[CACHE]
        past = cache.get_seq_length()

        # `input_ids` is the whole sequence or, with an earlier turn's cache, possibly only what is
        # new; the mask (or its length, where generate dropped an all-ones mask) tells which.
        covered = mask.shape[1] if mask is not None else _mask_length(generation_config)
        whole = covered is None or covered == input_ids.shape[1]
        self._new_tokens = input_ids[:, past if whole else 0 :].to(self.device)
        earlier = input_ids[0, : past if whole else 0].to(self.device)
        if self._new_tokens.shape[1] == 0:
            raise ValueError(
                f"`{CACHE}` holds {past} tokens and `input_ids` {input_ids.shape[1]}: "
                "nothing is left to run; expected at least the last token not to be in the cache."
            )
        total = past + self._new_tokens.shape[1]
        positions = model_kwargs.get("position_ids")
        if positions is None:  # early 5.x versions leave them to prepare_inputs_for_generation
            positions = torch.arange(total, device="cpu")[None]
            if mask is not None:
                positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        self._positions = positions[:, -self._new_tokens.shape[1] :].to(self.device)
        self.root_position = int(self._positions[0, -1])
        # (1, prompt) bool, or None where nothing is padded.
        self._prompt_mask = (
            None if mask is None or bool(mask.all()) else mask.to(self.device).bool()
        )
        if self._prompt_mask is not None:
            earlier = earlier[self._prompt_mask[0, : len(earlier)]]
        # (k,) int64: what the cache covers, without padding; nothing where `generate` was not told.
        self.earlier_tokens = earlier
        self._max_positions = getattr(config, "max_position_embeddings", None)
        self._cache = InPlaceCache(cache)
        self._stored: list[int] | None = None  # before a pass, until it is kept

    def __enter__(self) -> TargetSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def room(self) -> int:
        """How many tokens may still be emitted before the target's positions end."""
        if self._max_positions is None:
            return sys.maxsize
        return self._max_positions - self.root_position

    def prefill(self) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Run the prompt up to, not including, its last token (the first root).

        Returns:
            the text that was not in the cache, without padding, (n,) int64; and by layer the states
            at the positions just run, (n - 1, hidden): those before each token but the first.
        """
        tokens, positions = self._new_tokens[:, :-1], self._positions[:, :-1]
        parts = []
        # Of the logits as few as may be: nobody reads them.
        keep = inspect.signature(type(self.model).forward).parameters.keys() & {"logits_to_keep"}
        step = self._prefill_chunk_size or max(tokens.shape[1], 1)
        for start in range(0, tokens.shape[1], step):
            chunk = slice(start, start + step)
            end = self._cache.length + tokens[:, chunk].shape[1]
            self._stored = self._cache.stored_lengths()
            _, found = self._run(
                input_ids=tokens[:, chunk],
                attention_mask=None
                if self._prompt_mask is None
                else self._prompt_mask[:, :end].long(),
                position_ids=positions[:, chunk],
                **dict.fromkeys(keep, 1),
            )
            self._stored = None
            parts.append(found)
        text = self._new_tokens[0]
        states = {
            layer: torch.cat([part[layer] for part in parts]) for layer in self._layers if parts
        }
        if self._prompt_mask is not None:
            real = self._prompt_mask[0, -len(text) :].clone()
            real[-1] = True  # whatever the mask says of it, the answer goes on from it
            text = text[real]
            states = {layer: x[real[:-1].to(x.device)] for layer, x in states.items()}
        return text, states

    def verify(self, tree: DraftTree) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """One pass of the target over all nodes of a tree.

        Returns:
            logits of shape (N, vocabulary), and by layer states of shape (N, hidden), in the
            model's dtype.
        """
        tokens, depths, ancestors = move_together(
            [tree.tokens, tree.depths, tree.ancestors()], self.device
        )
        past = self._cache.length
        self._stored = self._cache.stored_lengths()
        return self._run(
            input_ids=tokens[None],
            attention_mask=self._tree_masks(depths, ancestors, past),
            position_ids=(depths + self.root_position)[None],
        )

    def _run(self, **inputs: Any) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """One pass: logits, (n, vocabulary), and states, (N, hidden), by layer."""
        self._recorder.states = {}
        output = self._shell(
            **inputs, **{CACHE: self._cache.cache}, use_cache=True, return_dict=True
        )
        states, self._recorder.states = self._recorder.states, {}
        if not set(self._layers) <= states.keys():
            raise ValueError(
                f"The `forward` of the target ({type(self.model).__name__}) did not run the "
                "modules of its `self` whose states drafters read; expected it to use its "
                "`base_model`, not a part of that nor a fixed object, or drafters that read none."
            )
        return output.logits[0], {layer: states[layer][0] for layer in self._layers}

    def keep(self, path: list[int]) -> None:
        """Keep the states of the nodes on `path` (the root first) and move the root on."""
        self._cache.keep(self._stored, path)
        self._stored = None
        self.root_position += len(path)

    def release(self) -> None:
        """Give the cache back to its owner in transformers' own form.

        After an error in a pass, or between it and its `keep`, without anything of that pass.
        """
        if self._stored is not None:
            self._cache.keep(self._stored, [])
        self._cache.release()

    def _tree_masks(
        self, depths: torch.Tensor, ancestors: torch.Tensor, past: int
    ) -> torch.Tensor | dict[str, torch.Tensor] | None:
        """What each node may attend to: the past and its ancestors, within the window if any.

        Returns:
            (1, 1, N, stored + N), additive, a dictionary of such by layer type for models with
            several types, or None where one node sees everything.
        """
        if len(depths) == 1 and self._prompt_mask is None and self._window is None:
            return None
        # That of keys, as kernels want it: a model's first weights may be of another one.
        first = next((layer for layer in self._cache.cache.layers if layer.is_initialized), None)
        dtype = self.model.dtype if first is None else first.keys.dtype
        never = torch.finfo(dtype).min
        masks = {}
        for layer_type, layer_index in self._layer_types.items():
            stored = self._stored_by(layer_index, past)
            start = past - stored  # where the first key stands in the sequence (padding counts)
            mask = additive(ancestors, dtype, stored)
            if self._prompt_mask is not None:
                # What was emitted since is real. At first the root is the prompt's own last token.
                known = self._prompt_mask[:, start : past + 1]
                mask[:, : known.shape[1]].masked_fill_(~known, never)
            if layer_type == "sliding_attention":
                queries = past + depths
                keys = torch.cat([torch.arange(start, past, device=self.device), queries])
                mask.masked_fill_(keys[None, :] <= queries[:, None] - self._window, never)
            masks[layer_type] = mask[None, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _stored_by(self, layer_index: int, past: int) -> int:
        """How many of the `past` tokens the layer still holds."""
        layers = self._cache.cache.layers
        if layer_index < len(layers) and isinstance(layers[layer_index], GrowingSlidingWindowLayer):
            return self._stored[layer_index]
        return past


def rows_of(states: Mapping[int, torch.Tensor], nodes: Sequence[int]) -> dict[int, torch.Tensor]:
    """By layer (n, hidden), the states of n nodes, of those of all, (N, hidden)."""
    index = torch.tensor(nodes, device="cpu")
    return {
        layer: x[index.to(x.device, non_blocking=x.device.type == "cuda")]
        for layer, x in states.items()
    }


def _mask_length(generation_config: GenerationConfig) -> int | None:
    """Length of the all-ones mask that newer versions of `generate` drop, if there was one."""
    return getattr(generation_config, "_mask_length", None)


def masks_windows(model: PreTrainedModel) -> bool:
    """Whether the model hides what is outside of its config's `sliding_window`.

    Some families never read that field (Llama, Granite, OLMo 2, GLM 4, ...), though their configs
    may hold one. Which do is known by the mask they build: not all attention modules tell (those
    of code from elsewhere may be all there is).
    """
    decoder = model.base_model
    files = (sys.modules[cls.__module__] for cls in type(decoder).__mro__)
    if any(hasattr(file, "create_sliding_window_causal_mask") for file in files):
        return True
    return any(getattr(module, "sliding_window", None) for module in decoder.modules())


def attention_of(model: PreTrainedModel) -> tuple[int | None, dict[str, int]]:
    """How far back windowed layers see, themselves included; the first layer of each type."""
    config = model.config.get_text_config(decoder=True)
    if not masks_windows(model):
        return None, {"full_attention": 0}
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"]
    return window, {layer_type: types.index(layer_type) for layer_type in dict.fromkeys(types)}
