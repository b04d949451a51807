"""Nothing half written, and nothing of anybody else's lost."""

from __future__ import annotations

import ctypes
import errno
import json
from pathlib import Path

import pytest

from taps_hf.files import (
    ResultFolder,
    check_apart,
    check_begun,
    cut_off,
    digest_of_file,
    hold,
    read_json,
    starts_like,
    whole,
    write_json,
    write_text,
)

from .saved import tree_of


def result(folder: Path, content: str, command: str = "train") -> None:
    """What a command writes."""
    with ResultFolder(folder, command).writing() as new:
        (new / "config.json").write_text(content)
        (new / "inner").mkdir()
        (new / "inner" / "model").write_text(content * 2)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "a.json"
    write_json(file, {"a": 1})
    assert read_json(file, "anything") == {"a": 1}

    def half() -> None:
        with whole(file) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        half()
    assert tree_of(file.parent) == {"a.json": b'{\n  "a": 1\n}\n'}


def test_temporary_names_are_nobodys(tmp_path):
    others = [tmp_path / name for name in ("a.tmp", "a.txt.tmp", "a.old", "a.partial")]
    for other in others:
        other.write_text("mine")
    write_text(tmp_path / "a.txt", "text")
    assert [other.read_text() for other in others] == ["mine"] * 4
    assert (tmp_path / "a.txt").read_text() == "text"


def test_files_are_readable_by_those_who_may_read_new_files(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "whole", "")
    modes = [(tmp_path / name).stat().st_mode for name in ("plain", "whole")]
    assert modes[0] == modes[1]


def test_json_that_is_none_is_named(tmp_path):
    for content in ("{", "[1]", "[" * 100_000):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match=r"a\.json .*expected the settings"):
            read_json(tmp_path / "a.json", "the settings")


def test_a_result_is_written_and_replaced_by_the_same_command(tmp_path):
    out = tmp_path / "folder" / "out"
    result(out, "a")
    result(out, "b")
    assert (out / "config.json").read_text() == "b"
    assert (out / "inner" / "model").read_text() == "bb"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def _foreign_file(out: Path) -> None:
    result(out, "a")
    (out / "notes.txt").write_text("mine")


def _changed_file(out: Path) -> None:
    result(out, "a")
    (out / "config.json").write_text("mine")


def _link_inside(out: Path) -> None:
    result(out, "a")
    (out / "inner" / "model").unlink()
    (out / "inner" / "model").symlink_to(out / "config.json")


def _folder_inside(out: Path) -> None:
    result(out, "a")
    (out / "empty").mkdir()


def _without_manifest(out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text("{}")


def _hidden(out: Path) -> None:
    (out / ".git").mkdir(parents=True)


def _other_command(out: Path) -> None:
    result(out, "a", "average")


def _file(out: Path) -> None:
    out.write_text("mine")


def _symlink(out: Path) -> None:
    result(out.with_name("real"), "a")
    out.symlink_to(out.with_name("real"))


def _dangling(out: Path) -> None:
    out.symlink_to(out.with_name("nowhere"))


def _broken_manifest(out: Path) -> None:
    result(out, "a")
    (out / ".taps-hf.json").write_text('{"command": "train", "files": ["config.json"]}')


REFUSED = {
    "holds notes.txt": _foreign_file,
    "holds config.json, which was changed": _changed_file,
    "holds inner/model": _link_inside,
    "holds empty": _folder_inside,
    "holds other things": _without_manifest,
    "holds other things (": _hidden,
    "written by `average`": _other_command,
    "is a file": _file,
    "is a symbolic link": _symlink,
    "is a symbolic link;": _dangling,
    "no .taps-hf.json": _broken_manifest,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_others_wrote_is_refused_and_stays(tmp_path, message):
    out = tmp_path / "out"
    REFUSED[message](out)
    before = tree_of(tmp_path)
    with pytest.raises(ValueError, match=r"expected") as error:
        ResultFolder(out, "train")
    assert message in str(error.value)
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize("out", [".", "..", "../here", "../../here/.."])
def test_the_current_folder_and_those_around_it_are_refused(tmp_path, monkeypatch, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match=r"current folder or one around it|symbolic link"):
        ResultFolder(Path(out), "train")


def test_a_result_that_fails_leaves_the_old_one(tmp_path):
    out = tmp_path / "out"
    result(out, "a")
    before = tree_of(tmp_path)

    def half() -> None:
        with ResultFolder(out, "train").writing() as new:
            (new / "inner").mkdir()
            (new / "inner" / "model").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        half()
    assert tree_of(tmp_path) == before


@pytest.fixture(params=["in one step", "in several"])
def exchange(request, monkeypatch):
    """With what the system has for it, and without."""
    if request.param == "in several":
        monkeypatch.setattr(ctypes, "CDLL", lambda *_: object())


@pytest.mark.usefixtures("exchange")
def test_only_the_new_result_is_left(tmp_path):
    for content in ("a", "b"):
        result(tmp_path / "out", content)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (tmp_path / "out" / "inner" / "model").read_text() == content * 2


@pytest.mark.usefixtures("exchange")
def test_what_changes_at_the_last_moment_stays(tmp_path, monkeypatch):
    out = tmp_path / "out"
    result(out, "a")
    check = ResultFolder.check
    checks = []

    def then_changed(folder: ResultFolder) -> bool:
        found = check(folder)
        checks.append(found)
        if len(checks) == 2:  # the one just before names are exchanged
            (out / "notes").write_text("mine")
        return found

    monkeypatch.setattr(ResultFolder, "check", then_changed)
    with pytest.raises(ValueError, match=r"holds notes.* The new result lies in") as error:
        result(out, "b")
    assert (out / "notes").read_text() == "mine"
    assert (out / "config.json").read_text() == "a"
    (beside,) = (path for path in tmp_path.iterdir() if path != out)
    assert str(beside) in str(error.value)
    assert (beside / "config.json").read_text() == "b"


@pytest.mark.usefixtures("exchange")
def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    out, file = tmp_path / "out", tmp_path / "file"
    result(out, "a")
    write_text(file, "a")
    before = tree_of(tmp_path)
    monkeypatch.setattr("os.fsync", full)
    for write in (lambda: result(out, "b"), lambda: write_text(file, "b")):
        with pytest.raises(OSError, match="No space left"):
            write()
        assert tree_of(tmp_path) == before


def test_a_folder_that_cannot_be_replaced_stays_beside_the_new_one(tmp_path, monkeypatch):
    out = tmp_path / "out"
    result(out, "a")
    before = tree_of(out)
    rename = Path.rename

    def failing(path: Path, other: Path) -> Path:
        if other == out and (path / "config.json").read_text() == "b":
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(path, other)

    monkeypatch.setattr(ctypes, "CDLL", lambda *_: object())
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ValueError, match=r"Permission denied.* The new result lies in") as error:
        result(out, "b")
    assert tree_of(out) == before
    (beside,) = (path for path in tmp_path.iterdir() if path != out)
    assert str(beside) in str(error.value)
    assert (beside / "config.json").read_text() == "b"


def test_who_takes_the_name_meanwhile_keeps_it(tmp_path, monkeypatch):
    """Where names change in several steps: nothing is lost, and it is said where all of it lies."""
    out = tmp_path / "out"
    result(out, "a")
    before, rename = tree_of(out), Path.rename

    def then_taken(path: Path, other: Path) -> Path:
        found = rename(path, other)
        if path == out:
            out.mkdir()
            (out / "notes").write_text("mine")
        return found

    monkeypatch.setattr(ctypes, "CDLL", lambda *_: object())
    monkeypatch.setattr(Path, "rename", then_taken)
    with pytest.raises(ValueError, match=r"The earlier result lies in .* The new result") as error:
        result(out, "b")
    assert (out / "notes").read_text() == "mine"
    one, other = (path for path in tmp_path.iterdir() if path != out)
    earlier, new = (one, other) if tree_of(one) == before else (other, one)
    assert tree_of(earlier) == before
    assert (new / "config.json").read_text() == "b"
    assert str(earlier) in str(error.value)
    assert str(new) in str(error.value)


def test_what_a_run_uses_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    for path in (out, out / "features", tmp_path / "other" / ".." / "out" / "x"):
        with pytest.raises(ValueError, match=r"`features` is .*, which `out` would replace"):
            ResultFolder(out, "train", {"features": [path]})
    ResultFolder(out, "train", {"features": [tmp_path / "out-2", tmp_path]})
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(ValueError, match="where it is lost; expected one elsewhere"):
        check_apart({"data": [tmp_path / "link" / "rows"]}, out, "where it is lost")


def test_places_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for refuse in (
        lambda: ResultFolder(tmp_path / "file" / "out", "train"),
        lambda: ResultFolder(tmp_path / "file" / "a" / "out", "train"),
        lambda: check_begun(tmp_path / "file" / "a", "settings.json"),
        lambda: check_begun(tmp_path / "link" / "a", "settings.json"),
    ):
        with pytest.raises(ValueError, match=r"cannot be made: .* is no folder"):
            refuse()
    monkeypatch.setattr("os.access", lambda *_: False)
    for refuse in (
        lambda path: ResultFolder(path, "train"),
        lambda path: check_begun(path, "settings.json"),
    ):
        with pytest.raises(ValueError, match="is read-only here"):
            refuse(tmp_path / "new")


def test_long_names_can_be_written(tmp_path):
    name = "\u4e2d" * 80 + ".png"  # 244 bytes
    write_text(tmp_path / name, "a")
    assert tree_of(tmp_path) == {name: b"a"}


def test_what_comes_to_lie_there_during_the_work_stays(tmp_path):
    out = tmp_path / "out"
    result(out, "a")

    def disturbed() -> None:
        with ResultFolder(out, "train").writing() as new:
            (new / "config.json").write_text("new")
            (out / "notes").write_text("mine")

    with pytest.raises(ValueError, match="holds notes") as error:
        disturbed()
    assert (out / "notes").read_text() == "mine"
    assert (out / "config.json").read_text() == "a"
    beside = next(path for path in tmp_path.iterdir() if path.name.startswith("out-"))
    assert (beside / "config.json").read_text() == "new"
    assert str(beside) in str(error.value)


def test_a_manifest_cannot_have_others_files_removed(tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    result(out, "a")
    other.write_text("mine")
    manifest = json.loads((out / ".taps-hf.json").read_text())
    manifest["files"]["../other"] = digest_of_file(other)
    manifest["files"][str(other)] = digest_of_file(other)
    (out / ".taps-hf.json").write_text(json.dumps(manifest))
    result(out, "b")
    assert other.read_text() == "mine"
    assert (out / "config.json").read_text() == "b"


def test_folders_that_grow_are_known_by_their_marker(tmp_path):
    folder = tmp_path / "out"
    check_begun(folder, "settings.json")
    folder.mkdir()
    check_begun(folder, "settings.json")
    with hold(folder / "lock"):  # a run that was refused leaves no more than this
        check_begun(folder, "settings.json")
    with whole(folder / "settings.json") as temporary:  # as another process of the run has it
        temporary.write_text("{}")
        check_begun(folder, "settings.json")
    (folder / "settings.json").unlink()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"no settings\.json"):
        check_begun(folder, "settings.json")
    (folder / "settings.json").write_text("{}")
    check_begun(folder, "settings.json")
    with pytest.raises(ValueError, match="is no folder"):
        check_begun(folder / "thesis.tex", "settings.json")


def test_one_process_holds_a_place(tmp_path):
    with hold(tmp_path / "lock"), pytest.raises(ValueError, match="held by another"):
        hold(tmp_path / "lock")
    hold(tmp_path / "lock").close()


def test_only_what_we_left_half_written_is_cut_off(tmp_path):
    file = tmp_path / "rows"

    def is_ours(line: bytes) -> bool:
        return starts_like(line, b'{"ours"')

    for tail in (b"", b'{"ours": 2', b'{"o', b'{"ours": 2}\n{"ours'):
        file.write_bytes(b'{"ours": 1}\n' + tail)
        cut_off(file, 12, is_ours)
        assert file.read_bytes() == b'{"ours": 1}\n'
    for tail in (b"a letter", b'{"ours": 2}\n{"yours": 1}\n'):
        file.write_bytes(b'{"ours": 1}\n' + tail)
        with pytest.raises(ValueError, match="did not write"):
            cut_off(file, 12, is_ours)
        assert file.read_bytes() == b'{"ours": 1}\n' + tail
