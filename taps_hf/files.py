"""Writing files so that nothing is ever half written, and nothing of anybody else's is lost.

A file is written under a name of its own and then takes its place. A folder of results carries a
manifest of what was written into it, and by which command: only a folder that still holds exactly
that is ever replaced, by the same command, as a whole.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_MANIFEST = ".taps-hf.json"
_BLOCK = 1 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' renameat2


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A path to write, which takes the name of `file` when the block ends well.

    If it does not, `file` is as it was and the path is gone. A symbolic link is written through.
    """
    file = file.resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(file)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file whole, in UTF-8."""
    with whole(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file whole."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def read_json(file: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: naming the file, if it holds anything else than `what`.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}), expected {what}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected {what}.")
    return found


def hold(file: Path) -> IO[bytes]:
    """Be the only process that writes, for as long as the returned file is open.

    Args:
        file: what is written to, or stands for it; made if it does not exist.

    Raises:
        ValueError: if another process holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(
            f"{file} is held by another process that writes there; expected a place of one's own."
        ) from None
    return lock


def check_begun(folder: Path, marker: str) -> None:
    """Check that a folder that grows from run to run may be written to.

    Args:
        folder: where results are collected.
        marker: name of the file that every folder of this kind has from its beginning.

    Raises:
        ValueError: unless the folder has its marker, is empty, or does not exist, and can be
            written to.
    """
    check_writable(folder)
    if folder.is_dir():
        # Another process of the same run may be about to write the marker.
        unfinished = f".{Path(marker).stem}."
        names = [path.name for path in folder.iterdir()]
        others = any(name != "lock" and not name.startswith(unfinished) for name in names)
        if others and not (folder / marker).is_file():
            raise ValueError(
                f"{folder} holds other things (it has no {marker}); expected an empty folder, one "
                "that this command has begun, or a name yet unused."
            )
    elif folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder} is no folder; expected one, or a name yet unused.")


def check_writable(path: Path) -> None:
    """Raise `ValueError` unless a path, or what there is of the folders above it, can be written.

    For what is written at the end of long work: permissions and the like are known before.
    """
    found = path.absolute()
    while not os.path.lexists(found):
        found = found.parent
    if found != path.absolute() and not found.is_dir():
        raise ValueError(f"{path} cannot be made: {found} is no folder.")
    if found.exists() and not os.access(found, os.W_OK):
        raise ValueError(f"{path} cannot be written: {found} is read-only here.")


def check_apart(used: Mapping[str, Iterable[str | Path]], folder: Path, why: str) -> None:
    """Check that what a run uses does not lie where it writes.

    Args:
        used: paths that are read, or written by other means, by argument.
        folder: where none of them may lie.
        why: what would happen to it there.

    Raises:
        ValueError: naming the path that does.
    """
    for argument, paths in used.items():
        for path in paths:
            if Path(path).resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"`{argument}` is {path}, in {folder}, {why}; expected one elsewhere."
                )


def cut_off(file: Path, size: int, is_ours: Callable[[bytes], bool]) -> None:
    """Cut a file of lines to `size` bytes: what a stopped run left half written.

    Args:
        file: that was appended to.
        size: bytes that are known to be whole.
        is_ours: whether a line, maybe cut short, is one that the command writes.

    Raises:
        ValueError: if something else stands there; nothing is cut then.
    """
    with file.open("r+b") as written:
        written.seek(size)
        for line in written:
            if not is_ours(line):
                raise ValueError(
                    f"{file} has something after byte {size} that this command did not write; "
                    "expected the file as it was left. Nothing was changed."
                )
        written.truncate(size)


def starts_like(line: bytes, start: bytes) -> bool:
    """Whether a line, maybe cut short, begins with `start`."""
    return line.startswith(start) or start.startswith(line)


def digest_of_file(file: Path, size: int | None = None) -> str:
    """Hexadecimal SHA-256 of a file's first `size` bytes, by default of all."""
    found = hashlib.sha256()
    left = file.stat().st_size if size is None else size
    with file.open("rb") as opened:
        while left > 0 and (block := opened.read(min(_BLOCK, left))):
            found.update(block)
            left -= len(block)
    return found.hexdigest()


class ResultFolder:
    """A folder that one command writes as a whole.

    Args:
        folder: where the result is to lie.
        command: name of the command that writes it.
        used: paths that the run reads, or writes by other means, by argument.

    Raises:
        ValueError: if the folder may not be written, now or by the time the result is there: it is
            a file or a symbolic link, the folder one stands in or one around it, holds what the run
            uses, or anything but an earlier result of the same command, unchanged.
    """

    def __init__(
        self, folder: Path, command: str, used: Mapping[str, Iterable[str | Path]] | None = None
    ) -> None:
        # Of links on the way there is nothing to fear; one at the end may be swapped for a folder.
        self.folder = folder.absolute().parent.resolve() / folder.absolute().name
        if folder.name in ("", ".."):
            self.folder = folder.resolve()
        self.command = command
        check_writable(_beside(self.folder))
        check_apart(used or {}, self.folder, "which `out` would replace")
        self.check()

    def check(self) -> bool:
        """Whether there is an earlier result to replace; raises as the class says."""
        folder = self.folder
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            kind = "a symbolic link" if folder.is_symlink() else "a file"
            raise ValueError(f"{folder} is {kind}; expected a folder, or a name yet unused.")
        here = Path.cwd().resolve()
        if folder == here or folder in here.parents:
            raise ValueError(
                f"{folder} is the current folder or one around it; expected a folder of its own."
            )
        if not folder.exists() or not any(folder.iterdir()):
            return False
        reason = self._not_replaceable(folder)
        if reason:
            raise ValueError(
                f"{folder} {reason}; expected a name yet unused, an empty folder, or an earlier "
                f"result of `{self.command}` as it was written."
            )
        return True

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A new folder to fill, which takes the place of the result when the block ends well.

        Should something else have come to lie there in the meantime, or the folder not be
        replaceable for another reason, what is there stays, and the new result is left beside it.

        Raises:
            ValueError: saying where it lies, then.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        new = _beside(self.folder)
        new.mkdir()
        try:
            yield new
            written = {}
            for file in _files(new):
                _sync(file)
                written[_relative(file, new)] = digest_of_file(file)
            write_json(new / _MANIFEST, {"command": self.command, "files": written})
        except BaseException:
            _remove(new, [*_files(new)])
            raise
        try:
            replaces = self.check()
            if replaces:
                self._swap(new)
            else:
                new.rename(self.folder)  # the name is free, or that of an empty folder
        except (ValueError, OSError) as error:
            beside = self.folder.with_name(f"{self.folder.name}-{uuid.uuid4().hex[:8]}")
            new.rename(beside)
            raise ValueError(f"{error} The new result lies in {beside}.") from error
        _sync(self.folder.parent)
        if replaces:  # which has the other name now
            _remove(new, [*_files(new)])

    def _swap(self, new: Path) -> None:
        """Let the new result and the old one change names, if the old one may be replaced."""
        _exchange(new, self.folder)
        # Looked at once more, now that nobody knows its name: it may have changed just before.
        if (reason := self._not_replaceable(new)) is not None:
            _exchange(new, self.folder)
            raise ValueError(f"{self.folder} {reason}; it was changed just now.")

    def _not_replaceable(self, folder: Path) -> str | None:
        """Why what lies there must not be replaced; None if it may."""
        if folder.is_symlink():
            return "is a symbolic link"
        manifest = _manifest(folder)
        if manifest is None:
            return f"holds other things (it has no {_MANIFEST} of ours)"
        if manifest["command"] != self.command:
            return f"was written by `{manifest['command']}`"
        known = manifest["files"]
        for path in sorted(folder.rglob("*")):
            name = _relative(path, folder)
            if path.is_dir() and not path.is_symlink():
                ours = any(other.startswith(f"{name}/") for other in known)
            else:
                ours = path.is_file() and not path.is_symlink() and name in (*known, _MANIFEST)
            if not ours:
                return f"holds {name}, which this command did not write"
            if name in known and digest_of_file(path) != known[name]:
                return f"holds {name}, which was changed since it was written"
        return None


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What was written into a folder, if it says so."""
    try:
        found = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        known = isinstance(found["command"], str) and isinstance(found["files"], dict)
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return found if known else None


def _beside(path: Path) -> Path:
    """An unused name in the same folder, hidden; it has the same suffix, by which pictures go."""
    return path.with_name(f".{path.stem[-50:]}.{uuid.uuid4().hex}{path.suffix}")


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Let two folders change names: in one step where the system can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    names = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old))
    if rename is not None and rename(*names, _RENAME_EXCHANGE) == 0:
        return
    # Elsewhere, and on file systems that cannot, for a moment nothing has the old one's name.
    aside = _beside(old)
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException as error:
        try:
            aside.rename(old)
        except OSError:  # somebody has taken the name in that moment
            raise OSError(f"{error}. The earlier result lies in {aside}.") from error
        raise
    aside.rename(new)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _remove(folder: Path, files: list[Path]) -> None:
    """Remove these files of a folder, and the folder unless anything else is in it."""
    for file in files:
        file.unlink(missing_ok=True)
    inner = [path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()]
    for path in [*sorted(inner, reverse=True), folder]:
        if not any(path.iterdir()):
            path.rmdir()
