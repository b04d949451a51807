"""The model card of a drafter: what a reader of the Hub needs to know about how it was trained."""

from __future__ import annotations

import platform
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData

from .. import __version__
from ..drafters.configuration_feature import FeatureDrafterConfig
from ..drafters.modeling_eagle3 import Eagle3Drafter
from ..drafters.modeling_feature import FeatureDrafter
from .conversations import DataSource
from .objectives import get_objective
from .options import TrainOptions

# Where a run reads and writes, and what its speed only depends on: of no use to others.
_NOT_OF_THE_RECIPE = {"out", "features", "threads", "report_to", "license"}


def provenance(device: torch.device) -> dict[str, str]:
    """The versions and the kind of device a run used."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "taps-hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": f"{device.type} ({kind})",
    }


def model_card(drafter: FeatureDrafter, record: dict[str, Any]) -> ModelCard:
    """The card of a drafter that was trained here.

    Args:
        drafter: the model.
        record: `training.json` of its run: `options`, `measured`, `examples`, `answer_tokens` and
            `provenance`.
    """
    config, options = drafter.config, record["options"]
    target = config.target_name_or_path or "a target without a name"
    is_folder = Path(target).is_dir()
    target = Path(target).name if is_folder else target
    data = ModelCardData(
        base_model=None if is_folder else config.target_name_or_path,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=options.get("license"),
        tags=["speculative-decoding", config.backbone, "taps-hf"],
    )
    millions = sum(p.numel() for p in drafter.parameters()) / 1e6
    scored = config.draft_vocab_size or config.vocab_size
    versions = ", ".join(f"{name} {value}" for name, value in record["provenance"].items())
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {get_objective(options["objective"]).title} drafter for {target}

A one-layer draft model ({millions:.1f} million parameters) for `taps-hf`, with which its target
emits several tokens per pass; the text stays the target's own. {_holds(drafter)},
scores {scored:,} of the target's {config.vocab_size:,} tokens, and looks back over {_seen(config)}.

    import taps_hf
    drafter = taps_hf.{type(drafter).__name__}.from_pretrained("FOLDER OR HUB NAME")
    target.generate(**inputs, assistant_models=[drafter])

## Training

{record["examples"]:,} examples with {record["answer_tokens"]:,} tokens of answers; another
{100 * options["held_out"]:g} % of the rows was held out. All options that are not the defaults of
`taps-hf train` (kept in a file they are its `--recipe`):

```yaml
{_recipe(options)}```

{versions}.

## Measured on held-out rows

Of drafts of {options["eval_depth"]} tokens, replayed at every position. Top-1: how often the first
token is right; deep acceptance: how often the last one is, of the drafts right until there.

{_measured(record["measured"])}
"""
    )


def _holds(drafter: FeatureDrafter) -> str:
    if isinstance(drafter, Eagle3Drafter):
        layers = ", ".join(map(str, drafter.config.layer_ids))
        return f"It reads the target's hidden states {layers}, has an LM head but no embedding"
    return "It holds neither embedding nor LM head"


def _seen(config: FeatureDrafterConfig) -> str:
    window = config.context_window
    return "the whole context" if window is None else f"{window:,} tokens (`context_window`)"


def _recipe(options: dict[str, Any]) -> str:
    defaults = vars(TrainOptions(data=["-"], out="-"))
    known = {item.name for item in fields(TrainOptions)} - _NOT_OF_THE_RECIPE
    changed = {k: v for k, v in options.items() if k in known and v != defaults[k]}
    for name, value in changed.items():
        if name in ("data", "eval_data"):
            changed[name] = [_public(text) for text in value]
        elif name in ("target", "chat_template", "init_from"):
            changed[name] = _public(value)
    return yaml.safe_dump(changed, sort_keys=False)


def _public(source: str) -> str:
    """A source without the folder it lay in, which is of no use to others."""
    return Path(source).name if Path(DataSource.parse(source).name).exists() else source


def _measured(measured: dict[str, float]) -> str:
    sources = [name.removesuffix("_top_1") for name in measured if name.endswith("_top_1")]
    lines = ["| source | top-1 | deep acceptance | accepted length |", "| --- | --- | --- | --- |"]
    for name in sources:
        top_1, deep, length = (
            measured[f"{name}_{kind}"] for kind in ("top_1", "deep_acceptance", "accepted_length")
        )
        lines.append(f"| {name} | {top_1:.3f} | {deep:.3f} | {length:.2f} |")
    return "\n".join(lines)
