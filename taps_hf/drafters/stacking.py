"""Several drafters of one shape as one module: stacked weights, one pass.

Row d of a batch runs through drafter d. What a drafter's modules do between their linear layers
(attention, rotary embedding, residuals) is the same for all and runs as for any batch. Not every
family's layer allows that (experts, attention sinks, state in a module's own parameters): which
do is read from the modules, and every stack is tried once against its drafters before it is used.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from transformers import DynamicCache

from ..masks import additive

if TYPE_CHECKING:
    from .modeling_feature import FeatureDrafter

_Made = TypeVar("_Made")


class StackedLinear(nn.Module):
    """D linear layers: row d of the input meets weight d.

    Args:
        layers: of the same shape.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        # Stored as (D, in, out), which a batched product reads in order.
        self.weight = torch.stack([layer.weight.detach().t() for layer in layers]).contiguous()
        self.bias = None
        if layers[0].bias is not None:
            self.bias = torch.stack([layer.bias.detach() for layer in layers])[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(D, ..., out) from (D, ..., in)."""
        rows = x if x.dim() == 3 else x.flatten(1, -2)
        if self.bias is None:
            found = torch.bmm(rows, self.weight)
        else:
            found = torch.baddbmm(self.bias, rows, self.weight)
        return found if x.dim() == 3 else found.view(*x.shape[:-1], -1)


class _RowWise(nn.Module):
    """D modules with vectors of their own (norms), each on its row."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.rows = list(modules)  # a plain list: they belong to the drafters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(D, ...) from (D, ...)."""
        if len(x) != len(self.rows):
            raise ValueError(f"The input has {len(x)} rows, expected {len(self.rows)}.")
        return torch.cat([module(x[d : d + 1]) for d, module in enumerate(self.rows)])


class _Broadcast(nn.Module):
    """D norms whose code does nothing but arithmetic: their vectors meet the rows at once.

    Torch's own norms take no vectors with rows; whether a family's do is tried ([`agrees`]).
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self._first = modules[0]
        self._vectors = {  # (D, size)
            name: None if value is None else torch.stack([m._parameters[name] for m in modules])
            for name, value in modules[0]._parameters.items()
        }
        self._by_dim: dict[int, nn.Module] = {}  # the norm with these vectors, by its input's shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(D, ..., size) from (D, ..., size)."""
        if x.dim() not in self._by_dim:
            shell = copy.copy(self._first)
            shell.__dict__["_parameters"] = {
                name: None if v is None else v.view(len(v), *[1] * (x.dim() - 2), -1)
                for name, v in self._vectors.items()
            }
            self._by_dim[x.dim()] = shell
        return self._by_dim[x.dim()](x)

    def agrees(self, apart: _RowWise) -> bool:
        """Whether it gives what the norms do, each on its row."""
        like = next(value for value in self._vectors.values() if value is not None)
        x = torch.randn(
            len(like), 2, like.shape[1], generator=torch.Generator().manual_seed(0), device="cpu"
        )
        x = x.to(like)
        try:
            return torch.allclose(self(x), apart(x))
        except (RuntimeError, TypeError, ValueError):
            return False


def _stacked(modules: Sequence[nn.Module]) -> nn.Module:
    first = modules[0]
    if type(first) is nn.Linear:
        return StackedLinear(modules)
    if _has_own(first):
        apart, together = _RowWise(modules), _Broadcast(modules)
        return together if together.agrees(apart) else apart
    shell = copy.copy(first)  # shares everything but the modules inside
    shell.__dict__["_modules"] = {
        name: None if child is None else _stacked([module._modules[name] for module in modules])
        for name, child in first._modules.items()
    }
    return shell


def _has_own(module: nn.Module) -> bool:
    return any(value is not None for value in module._parameters.values())


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a function of one tensor with vectors as its only parameters."""
    takes = inspect.signature(module.forward).parameters.values()
    needed = [parameter for parameter in takes if parameter.default is inspect.Parameter.empty]
    return (
        not module._modules
        and all(value is None or value.dim() == 1 for value in module._parameters.values())
        and len(needed) == 1
        and needed[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    )


def _alike(modules: Sequence[nn.Module], are_drafters: bool = False) -> bool:
    """Whether modules are built alike, of nothing but what [`stack`] knows how to stack."""
    first = modules[0]
    for module in modules:
        changed = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        if type(module) is not type(first) or changed:
            return False
        shapes = [
            {name: None if x is None else (x.shape, x.dtype) for name, x in m._parameters.items()}
            for m in (module, first)
        ]
        if shapes[0] != shapes[1] or module._modules.keys() != first._modules.keys():
            return False
    if type(first) is nn.Linear:
        return True
    if _has_own(first):
        return _is_norm(first)
    # Saved buffers are weights of some kind; those of the drafter itself are the head's affair.
    saved = first._buffers.keys() - first._non_persistent_buffers_set
    if not are_drafters and any(first._buffers[name] is not None for name in saved):
        return False
    for name in first._modules:
        children = [module._modules[name] for module in modules]
        present = [child for child in children if child is not None]
        if present and (len(present) < len(children) or not _alike(children)):
            return False
    return True


def stack(drafters: Sequence[FeatureDrafter]) -> nn.Module:
    """A module that is called as a drafter is and runs drafter d on row d of the batch.

    It holds a copy of the drafters' linear layers as they are now.

    Args:
        drafters: two or more with equal [`stacking_key`]s.
    """
    return _stacked(drafters)


def _agrees(stacked: nn.Module, drafters: Sequence[FeatureDrafter]) -> bool:
    """Whether a stack computes what its drafters do: on a context, then on two nodes of a tree."""
    first = drafters[0]
    width, device, dtype = first.config.hidden_size, first.device, first.dtype
    generator = torch.Generator().manual_seed(0)
    count = len(drafters)
    slots, nodes = count + 1, count + 2  # no dimension is as long as another by chance
    # The target's features for the context, predictions for the nodes.
    runs = [
        [
            torch.randn(count, n, size, generator=generator, device="cpu").to(device, dtype)
            for size in (width, read)
        ]
        for n, read in ((slots, first.feature_size), (nodes, width))
    ]
    mask = torch.cat(
        [torch.ones(nodes, slots, device="cpu"), torch.eye(nodes, device="cpu")], dim=1
    ).bool()[None, None]
    mask = mask.to(device)
    if first.trunk.config._attn_implementation == "eager":
        mask = additive(mask, dtype)

    positions = (torch.arange(slots, device="cpu"), torch.full((nodes,), slots, device="cpu"))

    def run(module: nn.Module, rows: slice) -> torch.Tensor:
        cache = DynamicCache(config=first.trunk.config)
        found = []
        for (embeds, features), at, seen in zip(runs, positions, (None, mask)):
            read = features[rows]
            found.append(
                module(
                    inputs_embeds=embeds[rows],
                    features=read if found else module.fuse(read),
                    attention_mask=seen,
                    position_ids=at[None].to(device),
                    past_key_values=cache,
                ).last_hidden_state
            )
        hidden = torch.cat(found, dim=1)
        if first.has_own_head:
            hidden = torch.cat([hidden, module.scores(hidden)], dim=2)
        return hidden.float()

    try:
        together = run(stacked, slice(None))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False  # the family's code does something with its modules that a stack does not do
    apart = torch.cat([run(drafter, slice(d, d + 1)) for d, drafter in enumerate(drafters)])
    if together.shape != apart.shape:
        return False
    # Another order of sums rounds differently; another row's weights give something else entirely.
    error = (together - apart).flatten(1).norm(dim=1)
    bound = 8 * torch.finfo(dtype).eps ** 0.75 * apart.flatten(1).norm(dim=1)
    return bool((error <= bound).all())


def stacking_key(drafter: FeatureDrafter) -> tuple[object, ...]:
    """Only drafters with equal keys can be stacked."""
    config = drafter.config
    return (
        repr(sorted(config.layer_config.items())),
        repr([getattr(config, name) for name in config.shape_fields]),
        config.draft_vocab_size,
        config.window,
        drafter.trunk.config._attn_implementation,
        drafter.dtype,
        drafter.device,
    )


@dataclass(frozen=True)
class _Kept:
    """What was made of some modules.

    Args:
        modules: weak references, so that it lives no longer than the first of them to go.
        state: see [`state_of`].
        made: the stack or head; None where none can be made.
    """

    modules: list[weakref.ref[nn.Module]]
    state: object
    made: object


# The most recently used last. More than these would be for drafters in ever other combinations.
_kept: OrderedDict[tuple, _Kept] = OrderedDict()
_MOST_KEPT = 16
_SAMPLE = 1024
_lock = threading.Lock()


def kept_stack(drafters: Sequence[FeatureDrafter]) -> nn.Module | None:
    """[`stack`], made once for these drafters and again when their weights have changed.

    Returns:
        None if these drafters cannot be stacked.
    """
    return keep("stack", drafters, lambda: _tried_stack(drafters))


@torch.no_grad()
def _tried_stack(drafters: Sequence[FeatureDrafter]) -> nn.Module | None:
    if not _alike(drafters, are_drafters=True):
        return None
    stacked = stack(drafters)
    return stacked if _agrees(stacked, drafters) else None


def state_of(modules: Sequence[nn.Module]) -> list[tuple]:
    """Equal to what it was before if no tensor of the modules is another or was changed.

    A tensor's version counts the changes, but not those through `.data` or of tensors made under
    inference mode. So a sample of the numbers is looked at too: an optimiser's step, a load or an
    average changes nearly all.
    """
    found = []
    for x in (x for module in modules for x in (*module.parameters(), *module.buffers())):
        version = 0 if x.is_inference() else x._version
        sample = b""
        if not x.is_meta:
            flat = x.detach().reshape(-1)
            flat = flat[:: max(len(flat) // _SAMPLE, 1)].contiguous().cpu()
            sample = flat.view(torch.uint8).numpy().tobytes()
        found.append((x.data_ptr(), version, hash(sample)))
    return found


def keep(kind: str, modules: Sequence[nn.Module], make: Callable[[], _Made]) -> _Made:
    """What `make` gives, or gave when none of the modules' tensors was another."""
    state = state_of(modules)
    key = (kind, *map(id, modules))

    def forget(_: weakref.ref[nn.Module]) -> None:
        # Without the lock: the garbage collector may come while this thread has it.
        _kept.pop(key, None)

    with _lock:
        kept = _kept.get(key)
        if kept is None or kept.state != state:
            kept = _Kept([weakref.ref(module, forget) for module in modules], state, make())
        _kept[key] = kept
        _kept.move_to_end(key)
        while len(_kept) > _MOST_KEPT:
            _kept.popitem(last=False)
        return kept.made
