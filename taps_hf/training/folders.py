"""What a training run uses on this disk, and what there it may not replace or delete."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..files import ResultFolder, check_apart, check_begun
from ..loading import EMBEDDED
from .conversations import DataSource
from .features import FeatureStore
from .options import TrainOptions

OPTIONS = "options.json"  # marks the folder of a run's checkpoints
_WORK = ".checkpoints"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def check_folders(options: TrainOptions) -> tuple[ResultFolder, Path]:
    """The folder of the result, and that of the checkpoints, in which old ones are deleted.

    Raises:
        ValueError: unless they, and those of features, hold nothing but what earlier runs wrote
            there, and nothing that the run uses lies in the first two.
    """
    used = _used_paths(options)
    result = ResultFolder(Path(options.out), "train", used)
    work = result.folder.with_name(result.folder.name + _WORK)
    for folder in (result.folder, *result.folder.parents):
        if folder.name.startswith("checkpoint-") and folder.parent.name.endswith(_WORK):
            raise ValueError(
                f"`out` is {options.out}, in {folder.parent}, where a run deletes old checkpoints; "
                "expected a folder elsewhere."
            )
    check_apart(used, work, "where old checkpoints are deleted")
    check_begun(work, OPTIONS)
    # Trainer takes all of these for checkpoints.
    kept = sorted(p.name for p in work.glob("checkpoint-*") if not _CHECKPOINT.fullmatch(p.name))
    if kept:
        raise ValueError(
            f"{work} holds {', '.join(kept)}; expected nothing there but what training wrote, "
            "which deletes old checkpoints."
        )
    for store in options.features:
        check_begun(Path(store), FeatureStore.MARKER)
    return result, work


def _used_paths(options: TrainOptions) -> dict[str, list[str]]:
    """What a run reads, as far as it is on this disk, and where it keeps features."""
    names = {
        "data": [DataSource.parse(text).name for text in options.data],
        "eval_data": [DataSource.parse(text).name for text in options.eval_data],
        "target": [options.target] if options.target != EMBEDDED else [],
        "init_from": [options.init_from],
        "chat_template": [options.chat_template],
    }
    found = {key: [x for x in given if x and Path(x).exists()] for key, given in names.items()}
    return {**found, "features": options.features}


def last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that was written to its end; its state is written last."""
    found = filter(None, (_CHECKPOINT.fullmatch(path.name) for path in work.iterdir()))
    for match in sorted(found, key=lambda match: int(match[1]), reverse=True):
        folder = work / match[0]
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, json.JSONDecodeError):
            continue
        return str(folder)
    return None
