"""Reading EAGLE-3 heads: the original's, SpecForge's (SGLang), NVIDIA's, speculators' (vLLM).

Names differ by `midlayer` or `layers.0`, and flags by dialect. Two things have no single meaning:
ids of layers count outputs where SGLang reads them and `hidden_states` elsewhere, and `norm_output`
is what engines understand by it. Both can be overruled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..drafters.configuration_eagle3 import Eagle3DrafterConfig, default_layer_ids
from .checkpoint import Checkpoint
from .layer_fields import flag, llama_fields
from .reading import Found, Target, ours_in
from .tensors import check_copy, check_tensors, check_vocabulary

_LEGACY_NORMS = ("aux_norm_low", "aux_norm_mid", "aux_norm_high")
_OPTIONAL = ("embed_tokens.weight", "d2t", "t2d", "verifier_norm.weight", "verifier_lm_head.weight")


def read(
    checkpoint: Checkpoint,
    target: Target,
    layer_ids: Sequence[int] | None = None,
    norm_output: bool | None = None,
) -> Found:
    """What an EAGLE-3 checkpoint says, for our drafter.

    Args:
        checkpoint: headers and tensors.
        target: that it is for.
        layer_ids: which `hidden_states` of the target it reads, instead of what its file says.
        norm_output: see [`Eagle3DrafterConfig`], instead of what its file says.

    Raises:
        ValueError: naming file, tensor, found and expected.
    """
    layer = _layer_name(checkpoint)
    settings, where = _settings(checkpoint), str(checkpoint.config_file)
    notes: list[str] = []
    fields = _layer_fields(checkpoint, settings, layer, target)
    ids = _layer_ids(checkpoint, target, notes) if layer_ids is None else list(layer_ids)
    names = _names(checkpoint, layer)
    head = checkpoint.headers.get("lm_head.weight")
    if head is not None and len(head.shape) != 2:
        raise ValueError(
            f"{checkpoint.where('lm_head.weight')} is {head}, expected a matrix: a row for each "
            "token that is scored."
        )
    scored = target.vocab_size if head is None else head.shape[0]
    flags = _flags(checkpoint, settings, names)
    if norm_output is not None:
        flags["norm_output"] = norm_output
    expected = _expected(checkpoint, fields, names, flags, len(ids), scored)
    check_tensors(checkpoint, expected, _OPTIONAL)
    if fields["hidden_size"] != target.hidden_size:
        raise ValueError(
            f"{where} has `hidden_size` {fields['hidden_size']}, but the target's is "
            f"{target.hidden_size}: the head was made for another target, or is not as wide as "
            "its own, which is not supported."
        )
    if flags["norm_output"] and norm_output is None and "speculators_version" not in settings:
        notes.append(
            "config.json has `norm_output`, read as engines read it (normalised states are fed "
            "back); trainers may have meant that the head sees a norm: compare acceptance with "
            "`norm_output` false"
        )
    if "embed_tokens.weight" in checkpoint.headers:
        check_copy(checkpoint, "embed_tokens.weight", target.embedding, "embedding")
    tokens = _token_ids(checkpoint, scored, target, notes)
    state = {new: checkpoint.tensor(old) for old, new in names.items()}
    if head is None:
        notes.append("there is no lm_head.weight: a copy of the target's head was taken")
        state["lm_head.weight"] = target.head.weight.detach().cpu().to(state["fc.weight"].dtype)
    if tokens is not None:
        order = tokens.argsort()  # as the format has them; a file may not
        state["draft_token_ids"] = tokens[order]
        state["lm_head.weight"] = state["lm_head.weight"][order]
    ours = Eagle3DrafterConfig(
        layer_config=fields,
        hidden_size=fields["hidden_size"],
        vocab_size=target.vocab_size,
        layer_ids=ids,
        draft_vocab_size=None if tokens is None else len(tokens),
        target_name_or_path=target.name,
        **ours_in(checkpoint.config),
        **flags,
    )
    return Found(ours, state, notes)


def _layer_name(checkpoint: Checkpoint) -> str:
    """`midlayer.` or `layers.0.`; raises for heads that are built in other ways."""
    headers = checkpoint.headers
    if "mask_hidden" in headers:
        raise ValueError(
            f"{checkpoint.where('mask_hidden')}: P-EAGLE heads propose all tokens in one pass, "
            "which is not supported; expected an EAGLE-3 head."
        )
    deeper = sorted(name for name in headers if name.startswith("layers.1."))
    if deeper:
        raise ValueError(
            f"{checkpoint.where(deeper[0])}: heads of several layers are not supported, expected "
            "one."
        )
    found = [p for p in ("midlayer.", "layers.0.") if any(n.startswith(p) for n in headers)]
    if len(found) != 1:
        raise ValueError(
            f"{checkpoint.config_file.parent} has tensors of {' and '.join(found) or 'no layer'}, "
            "expected those of midlayer.* or of layers.0.*."
        )
    if "fc.weight" not in headers or f"{found[0]}hidden_norm.weight" not in headers:
        missing = "fc.weight" if "fc.weight" not in headers else f"{found[0]}hidden_norm.weight"
        raise ValueError(
            f"{checkpoint.where(missing)} is missing: heads that read the target's last state only "
            "(`use_aux_hidden_state` false) are not supported."
        )
    if "fc.bias" in headers:
        raise ValueError(f"{checkpoint.where('fc.bias')}: EAGLE-3's projection has no bias.")
    return found[0]


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration, that of speculators' layer laid flat."""
    config = dict(checkpoint.config)
    inner = config.pop("transformer_layer_config", None)
    return config if not isinstance(inner, Mapping) else {**inner, **config}


def _layer_fields(
    checkpoint: Checkpoint, settings: Mapping[str, Any], layer: str, target: Target
) -> dict[str, Any]:
    headers, where = checkpoint.headers, str(checkpoint.config_file)
    types = settings.get("layer_types")
    if types not in (None, [], ["full_attention"]):
        raise ValueError(
            f"{where} has `layer_types` {types!r}, expected ['full_attention']: heads that attend "
            "to a window only are not supported."
        )
    family = "qwen3" if f"{layer}self_attn.q_norm.weight" in headers else "llama"
    fields = llama_fields(settings, where, family, target.max_positions)
    biased = [f"{layer}self_attn.{name}_proj.bias" in headers for name in "qkvo"]
    if any(biased) and not all(biased):
        raise ValueError(
            f"{checkpoint.config_file.parent} has biases of some of q_proj, k_proj, v_proj and "
            "o_proj, expected all or none."
        )
    return {**fields, "attention_bias": all(biased)}


def _names(checkpoint: Checkpoint, layer: str) -> dict[str, str]:
    """Ours, by those in the file, of all tensors that become weights."""
    names = {}
    for name in checkpoint.headers:
        if name in _OPTIONAL:
            continue
        new = name.replace(layer, "trunk.layers.0.", 1) if name.startswith(layer) else name
        for i, legacy in enumerate(_LEGACY_NORMS):
            new = new.replace(f"{legacy}.", f"fc_norm.{i}.")
        names[name] = new
    return names


def _flags(
    checkpoint: Checkpoint, settings: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, bool]:
    """The dialect. Of norms that have tensors these tell as well as flags."""
    inner, where = settings.get("eagle_config"), str(checkpoint.config_file)
    said = {**(inner if isinstance(inner, Mapping) else {}), **settings}
    of_features = any(new.startswith("fc_norm.") for new in names.values())
    return {
        "norm_before_residual": flag(said, "norm_before_residual", where),
        "norm_before_fc": "input_norm.weight" in checkpoint.headers
        or flag(said, "norm_before_fc", where),
        "fc_norm": of_features or flag(said, "fc_norm", where) or flag(said, "use_aux_norm", where),
        "norm_output": flag(said, "norm_output", where),
    }


def _expected(
    checkpoint: Checkpoint,
    fields: Mapping[str, Any],
    names: Mapping[str, str],
    flags: Mapping[str, bool],
    features: int,
    scored: int,
) -> dict[str, tuple[int, ...]]:
    """Shapes by the names in the file."""
    width, middle, size = fields["hidden_size"], fields["intermediate_size"], fields["head_dim"]
    queries, keys = fields["num_attention_heads"] * size, fields["num_key_value_heads"] * size
    layer = "trunk.layers.0."
    ours = {
        "fc.weight": (width, features * width),
        "norm.weight": (width,),
        f"{layer}input_layernorm.weight": (width,),
        f"{layer}hidden_norm.weight": (width,),
        f"{layer}post_attention_layernorm.weight": (width,),
        f"{layer}self_attn.q_proj.weight": (queries, 2 * width),
        f"{layer}self_attn.k_proj.weight": (keys, 2 * width),
        f"{layer}self_attn.v_proj.weight": (keys, 2 * width),
        f"{layer}self_attn.o_proj.weight": (width, queries),
        f"{layer}mlp.gate_proj.weight": (middle, width),
        f"{layer}mlp.up_proj.weight": (middle, width),
        f"{layer}mlp.down_proj.weight": (width, middle),
    }
    if "lm_head.weight" in checkpoint.headers:
        ours["lm_head.weight"] = (scored, width)
    if fields["model_type"] == "qwen3":
        ours |= {f"{layer}self_attn.{name}_norm.weight": (size,) for name in "qk"}
    if fields["attention_bias"]:
        rows = {"q": queries, "k": keys, "v": keys, "o": width}
        ours |= {f"{layer}self_attn.{name}_proj.bias": (n,) for name, n in rows.items()}
    if flags["norm_before_fc"]:
        ours["input_norm.weight"] = (features * width,)
    if flags["fc_norm"]:
        ours |= {f"fc_norm.{i}.weight": (width,) for i in range(features)}
    theirs = {new: old for old, new in names.items()}
    prefix = next(old[: -len("hidden_norm.weight")] for old in names if "hidden_norm" in old)
    return {theirs.get(new, new.replace(layer, prefix)): shape for new, shape in ours.items()}


def _layer_ids(checkpoint: Checkpoint, target: Target, notes: list[str]) -> list[int]:
    """Which `hidden_states` are read. Ids of `eagle_config` count the layers that give them."""
    config = checkpoint.config
    plain = config.get("eagle_aux_hidden_state_layer_ids")
    inner = config.get("eagle_config")
    inner = inner.get("eagle_aux_hidden_state_layer_ids") if isinstance(inner, Mapping) else None
    found = plain if plain is not None else inner
    if found is None:
        return default_layer_ids(target.num_layers)
    whole = isinstance(found, Sequence) and all(type(layer) is int for layer in found)
    ids = [layer + (plain is None) for layer in found] if whole else []
    if not ids or not all(1 <= layer <= target.num_layers for layer in ids):
        raise ValueError(
            f"{checkpoint.config_file} has `eagle_aux_hidden_state_layer_ids` {found!r}, expected "
            f"layers of the target, which has {target.num_layers}."
        )
    if plain is None:
        notes.append(
            f"layers {found} of `eagle_config` were read as SGLang reads them, as the outputs of "
            f"these layers (hidden_states {ids}); vLLM would read hidden_states {found}: if little "
            "is accepted, try these with `layer_ids`"
        )
    return ids


def _token_ids(
    checkpoint: Checkpoint, scored: int, target: Target, notes: list[str]
) -> torch.Tensor | None:
    """(K,) int64 tokens of the head's rows, in their order; None if they are the target's own."""
    headers = checkpoint.headers
    said = checkpoint.config.get("draft_vocab_size")
    if said is not None and said != scored:
        raise ValueError(
            f"{checkpoint.config_file} has `draft_vocab_size` {said!r}, but the head scores "
            f"{scored} tokens."
        )
    ids = None
    if "d2t" in headers:
        if headers["d2t"].shape != (scored,) or headers["d2t"].is_floating:
            raise ValueError(
                f"{checkpoint.where('d2t')} is {headers['d2t']}, expected integers [{scored}], one "
                "for each row of the head."
            )
        ids = torch.arange(scored) + checkpoint.tensor("d2t").long()
    if "t2d" in headers:
        ids = _agreed(checkpoint, ids, scored, target, notes)
    if ids is None:
        if scored != target.vocab_size:
            raise ValueError(
                f"{checkpoint.where('d2t')} is missing: lm_head.weight scores {scored} tokens, the "
                f"target has {target.vocab_size}, and nothing says which they are."
            )
        return None
    if ids.min() < 0 or ids.max() >= target.vocab_size or len(ids.unique()) < len(ids):
        raise ValueError(
            f"{checkpoint.where('d2t')} gives tokens from {int(ids.min())} to {int(ids.max())}, "
            f"{len(ids.unique())} of {len(ids)} distinct; expected distinct ones of the target's "
            f"{target.vocab_size} (offsets: token i of the drafter is i + d2t[i])."
        )
    whole = scored == target.vocab_size and bool((ids == torch.arange(scored)).all())
    return None if whole else ids


def _agreed(
    checkpoint: Checkpoint,
    ids: torch.Tensor | None,
    scored: int,
    target: Target,
    notes: list[str],
) -> torch.Tensor:
    """What d2t and t2d say together, or t2d alone."""
    if len(checkpoint.headers["t2d"].shape) != 1 or not checkpoint.headers["t2d"].shape[0]:
        raise ValueError(
            f"{checkpoint.where('t2d')} is {checkpoint.headers['t2d']}, expected a truth value for "
            "each token of the target's."
        )
    chosen = checkpoint.tensor("t2d").bool()
    check_vocabulary(checkpoint, len(chosen), target.vocab_size, "the tensor t2d")
    if ids is None:
        found = chosen.nonzero().flatten()
        if len(found) != scored:
            raise ValueError(
                f"{checkpoint.where('t2d')} chooses {len(found)} tokens, expected {scored}, one "
                "for each row of the head."
            )
        notes.append("there is no d2t: the tokens are those of t2d, in ascending order")
        return found
    if chosen.all():  # as it is made where nobody filled it in
        return ids
    inside = ids[(ids >= 0) & (ids < len(chosen))]
    if len(inside) < len(ids) or not chosen[inside].all() or int(chosen.sum()) != len(ids):
        raise ValueError(
            f"{checkpoint.where('d2t')} and t2d do not name the same tokens ({len(ids)} and "
            f"{int(chosen.sum())}): expected offsets in d2t, token i of the drafter being i + "
            "d2t[i]."
        )
    return ids
