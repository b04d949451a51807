"""`taps-hf push`: uploads drafters, and the demo as a Space, to the Hub.

Everything is checked before anything is uploaded. The token is the one that `hf auth login` or
HF_TOKEN gives; it is neither an argument, nor printed, nor kept.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import HfApi, RepoCard, get_token
from huggingface_hub.errors import HTTPError  # of the HTTP library that huggingface_hub is using
from huggingface_hub.utils import validate_repo_id

from .bundle import fill_repository, write_repository
from .checks import parse_json
from .embedded import EMBEDDED_DRAFTERS
from .files import ResultFolder
from .formats.load import OURS

_DRAFTER_FILES = ("README.md", "config.json", "model.safetensors")
_CARDS = "hub_cards"


@dataclass(frozen=True)
class PushOptions:
    """What is uploaded.

    Args:
        owner: user or organisation on the Hub.
        drafters: folders; each becomes the repository of its own name.
        space: name of the Space; None uploads none.
        root: a clone of this repository, whose demo the Space runs.
        private: whether new repositories are private.
        custom_generate: name of the repository with which `generate` decodes speculatively where
            this package is not installed (`bundle`); None uploads none.
    """

    owner: str
    drafters: Sequence[Path] = ()
    space: str | None = None
    root: Path = Path()
    private: bool = False
    custom_generate: str | None = None


def push(options: PushOptions) -> list[str]:
    """Upload drafters and Space; what is on the Hub already is replaced.

    Returns:
        the addresses of the repositories.

    Raises:
        ValueError: for names, folders or files that are wrong, or no token; nothing is uploaded.
        OSError: if the Hub refuses something or cannot be reached.
    """
    names = [folder.resolve().name for folder in options.drafters]
    if not names and options.space is None and options.custom_generate is None:
        raise ValueError(
            "Neither `--drafters` nor `--space` was given, nor `--custom-generate`; expected one "
            "or more."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"`--drafters` has folders of the same name: {', '.join(names)}.")
    repo_ids = [f"{options.owner}/{name}" for name in (*names, options.space) if name is not None]
    decoding = options.custom_generate
    for repo_id in (*repo_ids, *([] if decoding is None else [f"{options.owner}/{decoding}"])):
        validate_repo_id(repo_id)
    for folder in options.drafters:
        check_drafter_folder(folder)
    if options.space is not None:
        check_demo(options.root)
    if get_token() is None:
        raise ValueError("There is no token for the Hub; run `hf auth login`, or set HF_TOKEN.")
    try:
        return _upload(HfApi(), options, repo_ids)
    except HTTPError as error:
        raise OSError(f"Uploading failed: {error}") from error


def check_drafter_folder(folder: Path) -> None:
    """Raise `ValueError` unless a folder holds a drafter with its card."""
    missing = [name for name in _DRAFTER_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} has no {', '.join(missing)}; expected a drafter with its card.")
    try:
        kind = parse_json((folder / "config.json").read_bytes())["model_type"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'config.json'} is no configuration of a model.") from None
    if kind not in OURS:
        expected = " or ".join(f"a {known!r}" for known in OURS)
        raise ValueError(f"{folder / 'config.json'} is of a {kind!r}, expected of {expected}.")
    if not _metadata(folder / "README.md"):
        raise ValueError(f"{folder / 'README.md'} has no metadata, expected YAML at its beginning.")


def check_demo(root: Path) -> None:
    """Raise `ValueError` unless `root` holds all that the Space is made of."""
    needed = [root / "app.py", root / "taps_hf" / "demo"]
    needed += [root / _CARDS / "space" / name for name in ("README.md", "requirements.txt")]
    missing = [str(path) for path in needed if not path.exists()]
    if missing:
        raise ValueError(
            f"`--root` has no {', '.join(missing)}; expected a clone of the repository of taps-hf."
        )
    for folder in EMBEDDED_DRAFTERS.values():
        check_drafter_folder(root / _CARDS / folder)
    data = _metadata(root / _CARDS / "space" / "README.md")
    if data.get("sdk") != "gradio" or data.get("app_file") != "app.py" or "title" not in data:
        raise ValueError(
            f"{root / _CARDS / 'space' / 'README.md'} has sdk {data.get('sdk')!r}, app_file "
            f"{data.get('app_file')!r} and title {data.get('title')!r}; expected 'gradio', "
            "'app.py' and a title."
        )


def _metadata(card: Path) -> dict[str, object]:
    try:
        return RepoCard.load(card).data.to_dict()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{card} cannot be read: {error}; expected YAML at its beginning."
        ) from error


def assemble_space(root: Path, out: Path, models: Sequence[str] = ()) -> None:
    """Write the folder of the Space: the demo, the package and the drafters it starts with.

    Args:
        root: a clone of this repository.
        out: folder to write; if it exists it must be empty, or as this command wrote it earlier.
        models: repositories on the Hub to name in the Space's metadata, beside those it has.

    Raises:
        ValueError: if the clone is incomplete, or the folder may not be written or would be copied
            into itself.
    """
    for copied in (root / "taps_hf", root / _CARDS):
        if out.resolve().is_relative_to(copied.resolve()):
            raise ValueError(f"{out} is in {copied}, which is copied; expected a folder elsewhere.")
    result = ResultFolder(out, "push --assemble")
    check_demo(root)
    with result.writing() as folder:
        _fill_space(root, folder, models)


def _fill_space(root: Path, out: Path, models: Sequence[str]) -> None:
    shutil.copytree(root / _CARDS / "space", out, dirs_exist_ok=True)
    shutil.copy(root / "app.py", out)
    # Of the package and the drafters only what belongs to them, whatever else lies about there.
    for path in sorted((root / "taps_hf").rglob("*")):
        if path.suffix in (".py", ".css"):
            target = out / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    for folder in EMBEDDED_DRAFTERS.values():
        (out / _CARDS / folder).mkdir(parents=True)
        for name in _DRAFTER_FILES:
            shutil.copy(root / _CARDS / folder / name, out / _CARDS / folder)
    card = RepoCard.load(out / "README.md")
    card.data.models = list(dict.fromkeys([*(card.data.get("models") or ()), *models]))
    card.save(out / "README.md")


def _upload(api: HfApi, options: PushOptions, repo_ids: Sequence[str]) -> list[str]:
    message = "Upload by taps-hf push"
    addresses = []
    for folder, repo_id in zip(options.drafters, repo_ids):
        addresses.append(str(api.create_repo(repo_id, private=options.private, exist_ok=True)))
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(_DRAFTER_FILES),
            commit_message=message,
        )
    if options.custom_generate is not None:
        repo_id = f"{options.owner}/{options.custom_generate}"
        with tempfile.TemporaryDirectory() as temporary:
            fill_repository(Path(temporary), repo_id)
            addresses.append(str(api.create_repo(repo_id, private=options.private, exist_ok=True)))
            api.upload_folder(repo_id=repo_id, folder_path=temporary, commit_message=message)
    if options.space is not None:
        *drafters, repo_id = repo_ids
        with tempfile.TemporaryDirectory() as temporary:
            _fill_space(options.root, Path(temporary), drafters)
            url = api.create_repo(
                repo_id,
                repo_type="space",
                space_sdk="gradio",
                private=options.private,
                exist_ok=True,
            )
            addresses.append(str(url))
            api.upload_folder(
                repo_id=repo_id, repo_type="space", folder_path=temporary, commit_message=message
            )
    return addresses


def add_push(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "push",
        help="upload drafters and the demo to the Hub",
        description="Upload drafters to OWNER/<folder's name>, and the demo as a Space. The token "
        "is that of `hf auth login` or HF_TOKEN.",
    )
    parser.add_argument("owner", metavar="OWNER", help="user or organisation")
    parser.add_argument("--drafters", nargs="+", type=Path, default=[], metavar="FOLDER")
    parser.add_argument("--space", metavar="NAME", help="also upload the demo, as OWNER/NAME")
    parser.add_argument(
        "--root", type=Path, default=Path(), help="clone of this repository (default: here)"
    )
    parser.add_argument(
        "--custom-generate",
        metavar="NAME",
        help="also upload a repository for generate(custom_generate=OWNER/NAME), which runs where "
        "this package is not installed",
    )
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    parser.add_argument(
        "--assemble",
        type=Path,
        metavar="FOLDER",
        help="upload nothing, write the Space's folder (with "
        "--custom-generate: of that repository)",
    )
    parser.set_defaults(run=_push)


def _push(options: argparse.Namespace) -> None:
    given = {k: v for k, v in vars(options).items() if k not in ("run", "assemble")}
    if options.assemble is not None and options.custom_generate is not None:
        write_repository(options.assemble, f"{options.owner}/{options.custom_generate}")
        print(f"Wrote {options.assemble}; try it with `custom_generate={str(options.assemble)!r}`")
        return
    if options.assemble is not None:
        assemble_space(options.root, options.assemble)
        print(f"Wrote {options.assemble}; try it with `python {options.assemble / 'app.py'}`")
        return
    for address in push(PushOptions(**given)):
        print(f"Uploaded {address}")
