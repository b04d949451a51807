"""`taps-hf convert` and `taps-hf export`: drafters from the formats of others, and to them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from .checks import COUNT, named_paths
from .drafters.configuration_eagle import tokenizer_fingerprint
from .drafters.modeling_feature import FeatureDrafter
from .embedded import EMBEDDED_TARGET, load_embedded_tokenizer
from .ends import load_ends
from .files import ResultFolder, write_text
from .formats.composed import check_composed, compose
from .formats.composition import PER_TOKEN, Composition, Drafting, Routing
from .formats.load import OURS, is_ours, read_drafter
from .formats.reading import EXTRA
from .formats.writing import ENGINES, check_read_back, write, written_as
from .formats.written import Written
from .loading import EMBEDDED, load_drafter
from .validation import check_drafter

_DTYPES = ("float32", "bfloat16", "float16")
_SERVED = {
    "eagle": "the code of its paper reads this folder (`--ea-model-path`)",
    "sglang": "python -m sglang.launch_server --model {target} "
    "--speculative-algorithm {algorithm} --speculative-draft-model-path FOLDER "
    "--speculative-num-steps 5 --speculative-eagle-topk 8 --speculative-num-draft-tokens 32{map}",
    "vllm": "vllm serve {target} --speculative-config "
    '\'{{"method": "{method}", "model": "FOLDER", "num_speculative_tokens": 3}}\'',
}
_SERVED["speculators"] = _SERVED["vllm"]  # vLLM reads both
_SERVED["llama.cpp"] = (
    "python convert_hf_to_gguf.py TARGET_FOLDER --outfile TARGET.gguf\n"
    "    python convert_hf_to_gguf.py FOLDER --target-model-dir TARGET_FOLDER "
    "--outfile DRAFTER.gguf\n"
    "    llama-server -m TARGET.gguf -md DRAFTER.gguf --spec-type draft-eagle3"
)


def convert(
    source: str,
    out: Path,
    target: PreTrainedModel,
    layer_ids: list[int] | None = None,
    norm_output: bool | None = None,
    fingerprint: str | None = None,
) -> tuple[FeatureDrafter, list[str]]:
    """Write somebody's drafter in our format, weights as they were saved.

    Args:
        source: folder or Hub name.
        out: folder to write.
        target: that it is for.
        layer_ids, norm_output: as [`read_drafter`].
        fingerprint: of the target's tokenizer.

    Returns:
        the drafter, and notes for the user.

    Raises:
        ValueError: if it cannot be read, is ours already, or does not fit the target.
        OSError: if there is none.
    """
    used = {"source": [source]} if Path(source).exists() else {}
    result = ResultFolder(out, "convert", used)
    if is_ours(source) is not None:
        raise ValueError(f"{source} is in our format already, expected one in another.")
    drafter, notes = read_drafter(
        source, target, pickles=True, layer_ids=layer_ids, norm_output=norm_output
    )
    drafter.to(target.get_input_embeddings().weight.device)
    check_drafter(source, drafter, target)
    if drafter.config.tokenizer_fingerprint is None:
        drafter.config.tokenizer_fingerprint = fingerprint
    with result.writing() as folder:
        drafter.save_pretrained(folder)
        write_text(folder / "README.md", str(_card(drafter, source, notes)))
    return drafter, notes


def export(
    drafter: FeatureDrafter,
    out: Path,
    target: PreTrainedModel,
    to: str,
    dtype: torch.dtype | None = None,
    source: str | Path | None = None,
) -> list[str]:
    """Write a drafter as an engine reads it, read that back, and compare.

    Args:
        drafter: the drafter.
        out: folder to write.
        target: that it is for.
        to: one of [`ENGINES`].
        dtype: of the weights, by default the drafter's.
        source: where the drafter lies, so that it is not written over.

    Returns:
        notes for the user.

    Raises:
        ValueError: if the engine cannot serve it, with the reason.
    """
    used = {"drafter": [source]} if source is not None and Path(source).exists() else {}
    result = ResultFolder(out, "export", used)
    check_drafter(str(source or drafter.name_or_path), drafter, target)
    written = written_as(to, drafter, target, dtype)
    with result.writing() as folder:
        write(written, folder)
        check_read_back(folder, drafter, target, drafter.dtype if dtype is None else dtype)
        write_text(folder / "README.md", _served(drafter, to, written.notes))
    return written.notes


def export_composed(
    drafters: Mapping[str, FeatureDrafter],
    out: Path,
    target: PreTrainedModel,
    drafting: Drafting = PER_TOKEN,
    dtype: torch.dtype | None = None,
    sources: Mapping[str, str | Path] | None = None,
) -> list[str]:
    """Write several drafters as one folder, which vLLM serves with our plugin: docs/serving.md.

    Args:
        drafters: by name; with one alone the folder serves that one, with its draft vocabulary
            and biases, for which vLLM's own EAGLE drafters have no place.
        out: folder to write.
        target: that they are for.
        drafting: how they draft together.
        dtype: of the weights, by default the first drafter's.
        sources: where drafters lie, so that they are not written over.

    Returns:
        notes for the user.

    Raises:
        ValueError: if they do not fit the target or each other, saying which, and why.
    """
    used = [path for path in (sources or {}).values() if Path(path).exists()]
    result = ResultFolder(out, "export", {"compose": used})
    for name, drafter in drafters.items():
        check_drafter(name, drafter, target)
    written = compose(drafters, target, drafting, dtype)
    with result.writing() as folder:
        write(written, folder)
        check_composed(folder, drafters)
        write_text(folder / "README.md", _served_composed(written, target))
    return written.notes


def _card(drafter: FeatureDrafter, source: str, notes: list[str]) -> ModelCard:
    config = drafter.config
    name, target = Path(source).name, config.target_name_or_path or "a target without a name"
    data = ModelCardData(
        base_model=None if Path(target).is_dir() else config.target_name_or_path,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["speculative-decoding", config.backbone, "taps-hf"],
    )
    said = "".join(f"- {note}\n" for note in notes) or "- nothing\n"
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {name}, for taps-hf

A drafter for {Path(target).name if Path(target).is_dir() else target}, converted from {name} with
`taps-hf convert`: its weights as they were, without copies of the target's embedding and head.

    import taps_hf
    target.generate(**inputs, assistant_models=["FOLDER OR HUB NAME"])

What its files left open or contradicted:

{said}"""
    )


def _served(drafter: FeatureDrafter, to: str, notes: list[str]) -> str:
    new = drafter.has_own_head
    command = _SERVED[to].format(
        target=drafter.config.target_name_or_path or "TARGET",
        algorithm="EAGLE3" if new else "EAGLE",
        method="eagle3" if new else "eagle",
        map=""
        if new or drafter.draft_token_ids is None
        else " --speculative-token-map FOLDER/token_map.pt",
    )
    said = "".join(f"- {note}\n" for note in notes)
    return f"# A drafter for {to}\n\nWritten by `taps-hf export`.\n\n    {command}\n\n{said}"


def _served_composed(written: Written, target: PreTrainedModel) -> str:
    composition = Composition.of(written.config[EXTRA])
    command = _SERVED["vllm"].format(
        target=target.config.name_or_path or "TARGET", method=composition.method
    )
    said = "".join(f"- {note}\n" for note in written.notes)
    return (
        f"# Drafters for vLLM: {', '.join(composition.names)}\n\nWritten by `taps-hf export "
        '--compose`; needs the plugin (`pip install "taps-hf[vllm]"`).\n\n'
        f"    {command}\n\n{said}"
    )


def add_convert(commands: argparse._SubParsersAction) -> None:
    """Add `taps-hf convert`."""
    parser = commands.add_parser(
        "convert",
        help="write somebody's EAGLE, HASS, TAPS or EAGLE-3 head in our format",
        description="Formats are recognised; pickles (pytorch_model.bin) are read as tensors only.",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub name")
    parser.add_argument("--target", required=True, help=f"folder, Hub name, or {EMBEDDED}")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--layer-ids",
        type=int,
        nargs="+",
        metavar="L",
        help="which hidden_states of the target an EAGLE-3 head reads, if its file is not believed",
    )
    parser.add_argument(
        "--norm-output",
        choices=["true", "false"],
        help="whether an EAGLE-3 head feeds itself normalised states, if its file is not believed",
    )
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    target = load_ends(options.target, torch.bfloat16)
    norm_output = None if options.norm_output is None else options.norm_output == "true"
    fingerprint = None
    if options.target == EMBEDDED:
        fingerprint = tokenizer_fingerprint(load_embedded_tokenizer())
    drafter, notes = convert(
        options.source, options.out, target, options.layer_ids, norm_output, fingerprint
    )
    for note in notes:
        print(f"Note: {note}.")
    print(f"Wrote {options.out}: {drafter.config.backbone}, {_size(drafter)}")


def _size(drafter: FeatureDrafter) -> str:
    millions = sum(p.numel() for p in drafter.parameters()) / 1e6
    scored = f"{drafter.num_scored_tokens} of {drafter.config.vocab_size} tokens"
    reads = ""
    if drafter.has_own_head:
        reads = f", reading hidden_states {drafter.config.layer_ids}"
    return f"{millions:.1f} million weights, scoring {scored}{reads}"


def add_export(commands: argparse._SubParsersAction) -> None:
    """Add `taps-hf export`."""
    parser = commands.add_parser(
        "export",
        help="write a drafter as the papers' code, SGLang, vLLM or llama.cpp read it",
        description="What the engine cannot serve is refused, and what was written is read back.",
    )
    parser.add_argument(
        "drafter", metavar="DRAFTER", nargs="?", help="folder or Hub name, in our format"
    )
    parser.add_argument("--to", required=True, choices=list(ENGINES))
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--target", help="folder, Hub name, or embedded (default: what the drafter was trained for)"
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: the drafter's)")
    parser.add_argument(
        "--compose",
        nargs="+",
        metavar="NAME=DRAFTER",
        help="instead of DRAFTER: several in one folder, for vLLM with our plugin",
    )
    parser.add_argument(
        "--routing",
        choices=get_args(Routing),
        help="with --compose: whose tokens are proposed, the surest drafter's for each token "
        "(default), in each draft (faster on a CPU), or in each request",
    )
    parser.add_argument(
        "--stop-below",
        type=float,
        metavar="P",
        help="with --compose: on a CPU drafts end when none of a batch is as likely as this to be "
        f"right to its end (default: {Drafting.stop_below}; 0: never)",
    )
    parser.add_argument(
        "--lookup",
        action=argparse.BooleanOptionalAction,
        help="with --compose: on a CPU drafts also come from what a request's own text says "
        "(default: with --routing draft)",
    )
    parser.add_argument(
        "--draft-vocab",
        type=int,
        metavar="N",
        help="with --compose: each drafter scores the first N of its tokens only",
    )
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    if (options.drafter is None) == (options.compose is None):
        raise ValueError(
            f"`drafter` is {options.drafter!r} and `compose` {options.compose}, expected one of "
            "the two: DRAFTER, or --compose NAME=DRAFTER ..."
        )
    if options.compose is not None:
        _export_composed(options)
        return
    for argument in ("routing", "stop_below", "lookup", "draft_vocab"):
        if (value := getattr(options, argument)) is not None:
            raise ValueError(f"`{argument}` is {value!r}, which is for `--compose`.")
    kind = is_ours(options.drafter)
    if kind is None:
        raise ValueError(f"{options.drafter} is not in our format, expected what `convert` writes.")
    drafter = OURS[kind].from_pretrained(options.drafter, dtype="auto").eval()
    target = _target_of(options.target, drafter)
    for note in export(drafter, options.out, target, options.to, _dtype(options), options.drafter):
        print(f"Note: {note}.")
    print(f"Wrote {options.out} for {options.to}; read back, it scores the same")


def _export_composed(options: argparse.Namespace) -> None:
    if options.to != "vllm":
        raise ValueError(f"`to` is {options.to!r}, expected vllm: no other engine composes.")
    if options.draft_vocab is not None and options.draft_vocab not in COUNT:
        raise ValueError(f"`draft_vocab` is {options.draft_vocab}, expected {COUNT}.")
    paths = named_paths(options.compose, "compose")
    for path in paths.values():
        if is_ours(path) is None:
            raise ValueError(f"{path} is not in our format, expected what `convert` writes.")
    if options.target is None:
        raise ValueError("`target` is missing, expected the one that the drafters are for.")
    target = load_ends(options.target, torch.float32)
    drafters = {name: load_drafter(path, target, name=name) for name, path in paths.items()}
    for name, drafter in drafters.items():
        if options.draft_vocab is not None:
            _cut(name, drafter, options.draft_vocab)
    asked = {name: getattr(options, name) for name in ("routing", "stop_below", "lookup")}
    drafting = Drafting(**{name: value for name, value in asked.items() if value is not None})
    for note in export_composed(drafters, options.out, target, drafting, _dtype(options), paths):
        print(f"Note: {note}.")
    print(f"Wrote {options.out} for vLLM: {', '.join(drafters)}, routed by {drafting.routing}")


def _cut(name: str, drafter: FeatureDrafter, scored: int) -> None:
    """Leave a drafter the first so many of the tokens that it scores, if it can."""
    if drafter.has_own_head:
        raise ValueError(
            f"`draft_vocab` is {scored}, but drafter {name!r} ({type(drafter).__name__}) has a "
            "head of its own; expected drafters that use the target's."
        )
    drafter.score_only(scored)


def _target_of(name: str | None, drafter: FeatureDrafter) -> PreTrainedModel:
    name = name or drafter.config.target_name_or_path
    if name is None:
        raise ValueError("The drafter names no target, expected `--target`.")
    return load_ends(EMBEDDED if name == EMBEDDED_TARGET else name, torch.float32)


def _dtype(options: argparse.Namespace) -> torch.dtype | None:
    return None if options.dtype is None else getattr(torch, options.dtype)
