"""Which of transformers' causal models can have drafters: writes docs/families.md.

    python -m benchmarks.families [FAMILY ...] [--output docs/families.md]

A tiny random model of every family in transformers' mapping of causal models generates greedily
in float32: plainly, with one drafter, with two. A family *works* where all give the same tokens.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import taps_hf
from taps_hf import EagleDrafter
from taps_hf.drafters.ensemble import groups_of
from taps_hf.files import check_writable, write_text

VOCAB = 32
_MOST_PARAMETERS = 80_000_000
_LAYERS = 2
_LONGEST_REASON = 200
# Sizes by the names that families have for them; those a family lacks are left out.
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "num_hidden_layers": _LAYERS,
    "num_layers": _LAYERS,
    "n_layer": _LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "kv_channels": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "rotary_dim": 4,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
# What a family that has none by default does without; other sizes are needed where they are known.
_LEFT_OUT = {"sliding_window", "kv_channels", "q_lora_rank", "shared_intermediate_size"}


@dataclass(frozen=True)
class Outcome:
    """What a family's tiny model did.

    Args:
        family: its `model_type`.
        verdict: "works", "refused", "wrong" or "not tried".
        together: whether two drafters ran as one; None unless it works.
        layer: the `model_type` of the drafter's layer; None unless one was made.
        reason: why it does not work, in one line.
    """

    family: str
    verdict: str
    together: bool | None = None
    layer: str | None = None
    reason: str = ""


def tiny_config(family: str) -> PretrainedConfig:
    """A family's configuration in miniature: whatever its default one calls a size, made small."""
    kind = CONFIG_MAPPING[family]
    full = kind().to_dict()
    sizes = {name: value for name, value in _SIZES.items() if name in full}
    for name in _LEFT_OUT & sizes.keys():
        if full[name] is None:
            del sizes[name]
    ids = [name for name, value in full.items() if name.endswith("_token_id") and value is not None]
    sizes |= {name: VOCAB - 1 - i for i, name in enumerate(ids)}
    if "kv_lora_rank" in full:  # latent attention has as many keys as queries
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    layers = full.get("num_hidden_layers")
    for name, value in full.items():  # lists with an entry a layer
        if isinstance(value, list) and layers and len(value) == layers:
            sizes[name] = value[-_LAYERS:]
    if full.get("first_k_dense_replace"):
        sizes["first_k_dense_replace"] = 1
    return kind(**sizes)


def tiny_model(family: str) -> PreTrainedModel:
    """A random model of a family.

    Raises:
        ValueError: if it is not tiny, or not to be made or run without a tokenizer, image or sound.
    """
    config = tiny_config(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"its small configuration has {size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, None)
    return model


def _generate(model: PreTrainedModel, **kwargs) -> list[int]:
    ids = torch.arange(3, 12)[None]
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=16,
        **kwargs,
    )[0].tolist()


def _one_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip().replace("|", "/")
    text = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def outcome(family: str) -> Outcome:
    """Try one family."""
    try:
        default = CONFIG_MAPPING[family]()
        if default.is_encoder_decoder:
            return Outcome(family, "refused", reason="an encoder-decoder model")
        if default.get_text_config(decoder=True) is not default:
            return Outcome(family, "refused", reason="not text only")
        model = tiny_model(family)
        plain = _generate(model)
    except Exception as error:  # whatever a family's own code raises is why it was not tried
        return Outcome(family, "not tried", reason=_one_line(error))
    try:
        drafters = [EagleDrafter.from_target(model).eval() for _ in range(2)]
        layer = drafters[0].config.layer_config["model_type"]
        tree = taps_hf.DynamicTree(depth=4, top_k=6, num_nodes=24)
        for asked in (drafters[:1], drafters):
            found = _generate(model, assistant_models=asked, strategy="merged", tree=tree)
            if found != plain:
                same = sum(a == b for a, b in zip(plain, found))
                reason = f"with {len(asked)}: {same} of {len(plain)} tokens are plain's"
                return Outcome(family, "wrong", layer=layer, reason=reason)
    except ValueError as error:
        return Outcome(family, "refused", reason=_one_line(error))
    except Exception as error:  # a fault of ours: it belongs in the table, not in a traceback
        return Outcome(family, "wrong", reason=_one_line(error))
    return Outcome(family, "works", len(groups_of(drafters)) == 1, layer)


_TITLE = "# Families"


def table(outcomes: Sequence[Outcome]) -> str:
    """The page that says what every family does, as Markdown."""
    works = [x for x in outcomes if x.verdict == "works"]
    lines = [
        _TITLE,
        "",
        "Which causal models of transformers can have drafters, found out with a tiny random model",
        "of each by `python -m benchmarks.families --output docs/families.md` (transformers",
        f"{transformers.__version__}). *Works* means: greedily in float32, the tokens with one",
        "drafter and with two are those of plain `generate`.",
        "",
        f"## Works: {len(works)}",
        "",
        "Several that do not run *as one* run one after the other: same output, slower drafts.",
        "The layer of a target with a mixture of experts is a dense one, of the family named here;",
        "`EagleDrafter.from_target(target, dense=False)` makes one with experts.",
        "",
        "| family | drafter's layer | several |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| {x.family} | {x.layer} | {'as one' if x.together else 'one after the other'} |"
        for x in works
    ]
    sections = {
        "refused": ("Refused", "With a `ValueError` before any pass of the target."),
        "wrong": ("Wrong", "Faults that are known: something else than a `ValueError`, or tokens."),
        "not tried": (
            "Not tried",
            "No tiny model of it could be made, or run by plain `generate`.",
        ),
    }
    for verdict, (title, text) in sections.items():
        these = [x for x in outcomes if x.verdict == verdict]
        if these:
            lines += [
                "",
                f"## {title}: {len(these)}",
                "",
                text,
                "",
                "| family | why |",
                "| --- | --- |",
            ]
            lines += [f"| {x.family} | {x.reason} |" for x in these]
    return "\n".join(lines) + "\n"


def _quiet() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Try families, print what happens and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="model types (default: all)")
    parser.add_argument("--output", type=Path, help="the Markdown file to write")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    options = parser.parse_args(arguments)
    if options.output is not None:
        check_output(options.output)
    families = options.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    outcomes = []
    with ProcessPoolExecutor(
        options.jobs, mp_context=get_context("spawn"), initializer=_quiet
    ) as pool:
        for found in pool.map(outcome, families):
            print(found, flush=True)
            outcomes.append(found)
    if options.output:
        write_text(options.output, table(outcomes))


def check_output(file: Path) -> None:
    """Raise `ValueError` unless a file is yet unused, or begins as the table does."""
    check_writable(file)
    if file.exists() and not file.read_bytes().startswith(_TITLE.encode() + b"\n"):
        raise ValueError(f"{file} holds something else; expected an earlier table, or a new name.")


if __name__ == "__main__":
    main()
