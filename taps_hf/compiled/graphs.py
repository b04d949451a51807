"""The target's pass over a tree as graphs of fixed widths, kept with the target.

What differs from cycle to cycle comes as numbers in one tensor, and in memory: so a graph is made
once for a width and a capacity. [`graphs_for`] keeps them for as long as the target lives, with the
memories that they run on, of which every running generation has one to itself.
"""

from __future__ import annotations

import inspect
import threading
import types
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig, PreTrainedModel

from ..cache import CACHE
from ..target import LAST, TargetSession, attention_of, recording
from ..trees.tree import DraftTree
from .memory import Layout, Memory, cache_of
from .settings import compile_arguments, key_of

_MOST_KEPT = 4  # of a target: other settings, other layers read, earlier weights' places
_MOST_FREE = 4  # memories
# What `generate` and its users keep on a model, and no pass reads.
_NOT_OF_A_PASS = {
    "_compiled_call",
    "_last_compile_config",
    "_taps_hf_drafter",
    "generation_config",
}

# The second one is raised by itself, as for hooks that count how often they are called.
_NOT_COMPILED = (
    torch._dynamo.exc.TorchDynamoException,
    torch._dynamo.exc.FailOnRecompileLimitHit,
)

_kept: weakref.WeakKeyDictionary[PreTrainedModel, list[tuple[object, TargetGraphs]]]
_kept = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class TargetGraphs:
    """Compiled passes of one target.

    Args:
        model: the target; nothing is stored on it.
        layers: whose states drafters read.
        config: what torch.compile is told.
    """

    def __init__(
        self, model: PreTrainedModel, layers: Collection[int], config: CompileConfig
    ) -> None:
        self.layers = tuple(layers)
        self._name = type(model).__name__
        self._shell, self._recorder = recording(model, layers)
        # Some of them hold the model, which would live for as long as its graphs.
        for name in _NOT_OF_A_PASS - {"generation_config"}:
            vars(self._shell).pop(name, None)
        self._config = config
        self._window, self._layer_types = attention_of(model)
        # Early 5.x versions count what is in the cache unless they are told.
        self._takes_places = "cache_position" in inspect.signature(type(model).forward).parameters
        self._layouts = _layouts_of(model, layers)
        # Keys tell what kernels want masks to be: a model's first weights may be of another type.
        self._dtype = next(layout.dtype for layout in self._layouts if layout is not None)
        self._graphs: dict[tuple[int, int], Callable[..., Any]] = {}
        self._tried: set[tuple[int, int]] = set()
        self._free: list[Memory] = []
        self._lock = threading.Lock()

    def take(self, capacity: int) -> Memory:
        """A memory for one generation, cleared; [`give_back`] it."""
        with self._lock:
            found = [memory for memory in self._free if memory.capacity == capacity]
            if found:
                self._free.remove(found[-1])
        if not found:
            return Memory(self._layouts, capacity)
        found[-1].clear()
        return found[-1]

    def give_back(self, memory: Memory) -> None:
        """Let another generation have it."""
        with self._lock:
            self._free = [*self._free, memory][-_MOST_FREE:]

    def prepare(self, width: int, capacity: int) -> None:
        """Make a graph that has not been made yet, before anything depends on it.

        Raises:
            ValueError: if the target cannot be compiled.
        """
        if (width, capacity) in self._tried:
            return
        memory = self.take(capacity)
        root = DraftTree.root(torch.zeros(1, dtype=torch.long, device="cpu"), 1)
        self.run(memory, packed(root, width, 0, 0))
        self.give_back(memory)

    def run(
        self, memory: Memory, inputs: torch.Tensor
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """One pass.

        Args:
            memory: what stands before the root, and where the nodes' states go.
            inputs: as [`packed`] gives them.

        Returns:
            logits, (W, vocabulary), and by layer states, (W, hidden), of W rows. On a GPU they may
            be overwritten by the next pass.

        Raises:
            ValueError: if the target cannot be compiled.
        """
        key = (_width_of(inputs), memory.capacity)
        device = memory.never.device
        inputs = inputs.to(device, non_blocking=device.type == "cuda")
        if device.type == "cuda":  # what the last replay gave has been read
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with self._lock:
                if key not in self._graphs:
                    self._graphs[key] = self._made(*key)
                graph = self._graphs[key]
            logits, states = graph(inputs, *memory.tensors)
        except _NOT_COMPILED as error:
            raise ValueError(
                f"`compile` is set, but the target ({self._name}) could not be compiled with "
                f"{self._config.to_dict()}: {str(error).strip().splitlines()[0]} Expected a "
                "model and settings that can be, or compile=False."
            ) from error
        self._tried.add(key)
        return logits, dict(zip(self.layers, states))

    def _made(self, width: int, capacity: int) -> Callable[..., Any]:
        """The graph of a width, made when it is first called."""
        shell, recorder, layers = self._shell, self._recorder, self.layers
        windows = {
            kind: self._window if kind == "sliding_attention" else None
            for kind in self._layer_types
        }
        takes_places, dtype = self._takes_places, self._dtype

        def tree_pass(
            inputs: torch.Tensor,
            keys: Sequence[torch.Tensor],
            values: Sequence[torch.Tensor],
            never: torch.Tensor,
        ) -> tuple[torch.Tensor, list[torch.Tensor]]:
            tokens, depths, ancestors, past, position = _unpacked(inputs, width)
            places = past + torch.arange(width, device=inputs.device)
            masks = {
                kind: _mask(ancestors, depths, past, never, window, dtype)
                for kind, window in windows.items()
            }
            more = {"cache_position": places} if takes_places else {}
            output = shell(
                input_ids=tokens[None],
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                position_ids=(depths + position)[None],
                use_cache=True,
                return_dict=True,
                **{CACHE: cache_of(keys, values, places)},
                **more,
            )
            states, recorder.states = recorder.states, {}
            return output.logits[0], [states[layer][0] for layer in layers]

        return torch.compile(_with_code_of_its_own(tree_pass), **compile_arguments(self._config))


def _with_code_of_its_own(function: types.FunctionType) -> types.FunctionType:
    """The same function for which torch looks among no other's graphs, and counts none of them."""
    code = function.__code__.replace()
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


def packed(tree: DraftTree, width: int, past: int, position: int) -> torch.Tensor:
    """What a pass over a tree differs in from others, in one tensor: one copy to a GPU.

    Rows that no node has see what stands before the tree, and themselves.

    Args:
        tree: on the CPU.
        width: rows of the pass.
        past: tokens in memory.
        position: of the root.

    Returns:
        (W * (W + 2) + 2,) int64, on the CPU: tokens, depths, ancestors, past, position.
    """
    count = len(tree)
    tokens = torch.zeros(width, dtype=torch.long, device="cpu")
    tokens[:count] = tree.tokens
    depths = torch.zeros(width, dtype=torch.long, device="cpu")
    depths[:count] = tree.depths
    ancestors = torch.eye(width, dtype=torch.long, device="cpu")
    ancestors[:count, :count] = tree.ancestors()
    return torch.cat(
        [tokens, depths, ancestors.flatten(), torch.tensor([past, position], device="cpu")]
    )


def _unpacked(inputs: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
    tokens, depths, ancestors, numbers = inputs.split([width, width, width * width, 2])
    return tokens, depths, ancestors.view(width, width).bool(), numbers[0], numbers[1]


def _width_of(inputs: torch.Tensor) -> int:
    # (W + 1)^2 = W (W + 2) + 1
    return int((len(inputs) - 1) ** 0.5) - 1


def _mask(
    ancestors: torch.Tensor,
    depths: torch.Tensor,
    past: torch.Tensor,
    never: torch.Tensor,
    window: int | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(1, 1, W, capacity), additive: what each node may attend to, by arithmetic alone.

    Args:
        ancestors: (W, W) bool.
        depths: (W,) int64.
        past: int64, no dimension: tokens before the root.
        never: (capacity,) bool: padding.
        window: how far back nodes see, with themselves; None for all.
        dtype: of attention scores.
    """
    # Which node's states are at a place; those before the root have negative numbers. (Written by
    # index into a mask that is repeated for all rows, Inductor would write one row for all.)
    node = torch.arange(len(never), device=never.device) - past
    inside = node.clamp(0, len(depths) - 1)
    in_tree = (node >= 0) & (node < len(depths))
    visible = torch.where(in_tree, ancestors[:, inside], node < 0) & ~never
    if window is not None:
        place = torch.where(in_tree, depths[inside], node)  # from the root's on
        visible = visible & (place > depths[:, None] - window)
    lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=never.device)
    return torch.where(visible, torch.zeros_like(lowest), lowest)[None, None]


def _layouts_of(model: PreTrainedModel, layers: Collection[int]) -> list[Layout | None]:
    """What each layer stores, by a pass over one token."""
    device = model.get_input_embeddings().weight.device
    root = DraftTree.root(torch.zeros(1, dtype=torch.long, device="cpu"), 1)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    inputs = root.tokens[None].to(device)
    with TargetSession(model, inputs, GenerationConfig(), {CACHE: cache}, layers) as session:
        session.verify(root)
        session.keep([0])
    return [Layout.of(layer) for layer in cache.layers]


def graphs_for(
    model: PreTrainedModel, layers: Collection[int], config: CompileConfig
) -> TargetGraphs:
    """The target's graphs, made once and again when the target is no longer what it was."""
    key = (tuple(layers), key_of(config), _state(model, layers))
    with _lock:
        kept = _kept.setdefault(model, [])
        found = next((graphs for known, graphs in kept if known == key), None)
        if found is None:
            found = TargetGraphs(model, layers, config)
        kept[:] = [*(pair for pair in kept if pair[1] is not found), (key, found)][-_MOST_KEPT:]
        return found


def _state(model: PreTrainedModel, layers: Collection[int]) -> tuple[object, ...]:
    """Equal to what it was before if a shell of the model that was made then is still one.

    Weights are no part of it: graphs are given those that modules have when they run.
    """
    decoder = model.base_model
    copied = [model, decoder]
    if inner := set(layers) - {LAST}:
        copied += [decoder.layers, *(decoder.layers[layer] for layer in inner)]
    return (
        model.dtype,
        model.device,
        tuple(map(id, model.modules())),
        tuple(
            (name, id(value), tuple(map(id, value.values())) if name.endswith("hooks") else None)
            for module in copied
            for name, value in vars(module).items()
            if name not in _NOT_OF_A_PASS
        ),
    )
