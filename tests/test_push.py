"""Uploading to a server on this machine; nothing here reaches the real Hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import RepoCard

from taps_hf.cli import main
from taps_hf.embedded import EMBEDDED_DRAFTERS

from .hub import Hub, local_hub
from .tiny import tiny_drafters

ROOT = Path(__file__).resolve().parent.parent
CARD = "---\nlicense: apache-2.0\n---\nA drafter.\n"
TOKEN = "hf_only_for_this_test"


@pytest.fixture
def hub(monkeypatch) -> Hub:
    with local_hub(TOKEN) as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        # The storage protocol of newer Hubs is spoken by a compiled client; large files go by LFS.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def drafters(tmp_path) -> list[Path]:
    folders = [tmp_path / "drafter-math", tmp_path / "drafter-chat"]
    for folder, drafter in zip(folders, tiny_drafters(2)):
        drafter.save_pretrained(folder)
        (folder / "README.md").write_text(CARD)
        (folder / "notes.txt").write_text("not for others")
    return folders


@pytest.fixture
def clone(tmp_path) -> Path:
    """As much of this repository as the Space is made of, with something beside it."""
    root = tmp_path / "clone"
    shutil.copytree(ROOT / "taps_hf", root / "taps_hf")
    shutil.copytree(ROOT / "hub_cards", root / "hub_cards")
    shutil.copy(ROOT / "app.py", root)
    (root / "taps_hf" / "demo" / "secrets.env").write_text("not for others")
    return root


def test_drafters_and_space_are_uploaded(hub, drafters, clone, capsys):
    arguments = ["push", "someone", "--drafters", *map(str, drafters), "--space", "drafters-demo"]
    assert main([*arguments, "--root", str(clone), "--private"]) == 0
    said = capsys.readouterr()
    assert f"Uploaded {hub.url}/someone/drafter-math\n" in said.out
    assert f"Uploaded {hub.url}/spaces/someone/drafters-demo\n" in said.out
    for folder in drafters:
        files = hub.files[f"models/someone/{folder.name}"]
        assert set(files) == {"README.md", "config.json", "model.safetensors"}
        assert all(content == (folder / name).read_bytes() for name, content in files.items())
    space = hub.files["spaces/someone/drafters-demo"]
    assert space["app.py"] == (ROOT / "app.py").read_bytes()
    assert space["taps_hf/demo/style.css"] == (ROOT / "taps_hf/demo/style.css").read_bytes()
    for folder in EMBEDDED_DRAFTERS.values():
        path = f"hub_cards/{folder}/model.safetensors"
        assert space[path] == (ROOT / path).read_bytes()
    assert not [path for path in space if "secrets" in path or "__pycache__" in path]
    models = RepoCard(space["README.md"].decode()).data.models
    assert models[1:] == ["someone/drafter-math", "someone/drafter-chat"]
    assert hub.repositories["spaces/someone/drafters-demo"]["sdk"] == "gradio"
    for created in hub.repositories.values():  # how it is said depends on huggingface_hub's version
        assert created.get("private") or created.get("visibility") == "private"
    assert hub.authorizations == {f"Bearer {TOKEN}"}
    assert TOKEN not in said.out + said.err
    # What is there already is replaced.
    (drafters[0] / "README.md").write_text(CARD + "Better now.\n")
    assert main(["push", "someone", "--drafters", str(drafters[0])]) == 0
    assert hub.files["models/someone/drafter-math"]["README.md"].endswith(b"Better now.\n")


def test_decoding_is_uploaded_for_those_who_have_not_installed_us(hub, drafters, tmp_path, capsys):
    assert main(["push", "someone", "--custom-generate", "taps"]) == 0
    assert f"Uploaded {hub.url}/someone/taps\n" in capsys.readouterr().out
    files = hub.files["models/someone/taps"]
    assert {"README.md", "custom_generate/generate.py", "custom_generate/requirements.txt"} <= set(
        files
    )
    assert 'custom_generate="someone/taps"' in files["README.md"].decode()
    out = tmp_path / "repository"
    given = ["push", "someone", "--custom-generate", "taps", "--assemble", str(out)]
    assert main(given) == 0
    written = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert set(files) == {name for name in written if not name.startswith(".taps")}
    assert main(["push", "someone", "--custom-generate", "no name"]) == 2


def test_what_is_wrong_is_said_before_anything_is_uploaded(hub, drafters, clone, capsys):
    math, chat = drafters
    (chat / "README.md").write_text("No metadata.\n")
    other = math.parent / "other"
    shutil.copytree(math, other)
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tabs, deep = (shutil.copytree(math, math.parent / name) for name in ("tabs", "deep"))
    (tabs / "README.md").write_text("---\nlicense:\t[x\n---\nA drafter.\n")
    (deep / "config.json").write_text("[" * 100_000)
    empty = math.parent / "empty"
    empty.mkdir()
    space = clone / "hub_cards" / "space" / "README.md"
    space.write_text(space.read_text().replace("sdk: gradio", "sdk: docker"))
    for arguments, message in [
        ([], "Neither `--drafters` nor `--space`"),
        (["--drafters", math / "nowhere"], "has no README.md, config.json, model.safetensors"),
        (["--drafters", empty], "has no README.md, config.json, model.safetensors"),
        (["--drafters", math, chat], "README.md has no metadata"),
        (
            ["--drafters", math, other],
            "is of a 'llama', expected of a 'taps_eagle' or a 'taps_eagle3'",
        ),
        (["--drafters", tabs], "README.md cannot be read"),
        (["--drafters", deep], "config.json is no configuration"),
        (["--drafters", math, math], "folders of the same name"),
        (["--drafters", math, "--space", "no spaces"], "no spaces"),
        (["--drafters", math, "--space", "demo", "--root", empty], "app.py"),
        (["--drafters", math, "--space", "demo", "--root", clone], "sdk 'docker'"),
    ]:
        assert main(["push", "someone", *map(str, arguments)]) == 2
        said = capsys.readouterr()
        assert message in said.err
        assert said.err.count("\n") == 1
    assert main(["push", "some/one", "--drafters", str(math)]) == 2
    assert hub.repositories == {}


def test_no_token_a_wrong_one_and_no_hub(hub, drafters, capsys, monkeypatch, tmp_path):
    command = ["push", "someone", "--drafters", str(drafters[0])]
    monkeypatch.setenv("HF_TOKEN", "hf_somebody_elses")
    assert main(command) == 2
    said = capsys.readouterr()
    assert "401" in said.err
    assert "hf_somebody_elses" not in said.out + said.err
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(command) == 2
    assert "Uploading failed" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert main(command) == 2
    assert "run `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err


def test_the_assembled_folder_runs_by_itself(clone, tmp_path, capsys):
    """With nothing but itself on the path: the Space has no other copy of the package."""
    out = tmp_path / "space"
    assert main(["push", "someone", "--root", str(clone), "--assemble", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    pytest.importorskip("gradio")
    pytest.importorskip("altair")
    program = (
        "import sys; sys.path.insert(0, '.'); import app, taps_hf; print(taps_hf.__file__); "
        "sys.exit(app.main(['--target', 'no/such/folder']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=out, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == str(out / "taps_hf" / "__init__.py")
    assert "The target could not be loaded from 'no/such/folder'" in done.stderr
    assert "Traceback" not in done.stderr
    (out / "notes").write_text("mine")
    assert main(["push", "someone", "--root", str(clone), "--assemble", str(out)]) == 2
    assert "which this command did not write" in capsys.readouterr().err
    assert (out / "notes").read_text() == "mine"

    inside = clone / "hub_cards" / "space" / "new"
    assert main(["push", "someone", "--root", str(clone), "--assemble", str(inside)]) == 2
    assert "which is copied" in capsys.readouterr().err
    assert not inside.exists()


def test_the_space_asks_for_what_the_package_asks_for():
    """But for gradio, which its metadata choose, and what only the embedded target needs."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    demo = [x for x in project["optional-dependencies"]["demo"] if x.startswith("altair")]
    lines = (ROOT / "hub_cards" / "space" / "requirements.txt").read_text().splitlines()
    asked = [line for line in lines if not line.startswith("#")]
    assert sorted(asked) == sorted([*project["dependencies"], *demo])
