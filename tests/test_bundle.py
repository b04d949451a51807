"""`custom_generate` from a folder, in a process that cannot import the package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import taps_hf
from taps_hf import bundle
from taps_hf.bundle import REQUIREMENTS, flattened, needed, write_repository

from .formats import foreign

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import sys
import torch

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "taps_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from transformers import AutoModelForCausalLM

target, repository, *drafters = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(target)
prompt = torch.arange(1, 8)[None]
ours = {"custom_generate": repository, "trust_remote_code": True, "assistant_models": drafters}
for seed in (None, 4):
    given = {"max_new_tokens": 12, "do_sample": seed is not None, "pad_token_id": 0}
    outputs = []
    for more in ({}, {**ours, "strategy": "merged", "return_dict_in_generate": True}):
        torch.manual_seed(seed or 0)
        outputs.append(model.generate(prompt, **given, **more))
    assert torch.equal(outputs[0], outputs[1].sequences)
    print(outputs[1].draft_trace.drafters, outputs[1].draft_trace.num_target_passes)
try:
    model.generate(prompt, **{**ours, "assistant_models": None})
except ValueError as error:
    print(error)
assert "taps_hf" not in sys.modules
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repositories") / "taps"
    write_repository(folder, "somebody/taps")
    return folder


def test_it_decodes_without_the_package(repository, tmp_path, monkeypatch):
    foreign.target().save_pretrained(tmp_path / "target")
    drafters = [
        foreign.write(tmp_path / "two", foreign.eagle(), foreign.EAGLE_CONFIG),
        foreign.write(tmp_path / "three", foreign.eagle3(), foreign.EAGLE3_CONFIG),
    ]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "target"), str(repository), *drafters],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("('two', 'three')") == 2
    assert "`assistant_models` was not given" in done.stdout


def test_where_the_package_is_installed_it_runs(repository, tmp_path):
    """So that drafters that are there as objects are of the classes that it knows."""
    target = foreign.target()
    drafter = taps_hf.EagleDrafter.from_target(target).eval()
    prompt = torch.arange(1, 8)[None]
    given = {"max_new_tokens": 8, "do_sample": False}
    plain = target.generate(prompt, **given)
    found = target.generate(
        prompt,
        **given,
        custom_generate=str(repository),
        trust_remote_code=True,
        assistant_models=drafter,
        return_dict_in_generate=True,
    )
    assert torch.equal(found.sequences, plain)
    assert type(found) is taps_hf.SpeculativeDecoderOnlyOutput


def test_everything_that_is_imported_is_there(repository):
    inner = repository / "custom_generate"
    files = {path.name for path in inner.iterdir()}
    for path in inner.glob("*.py"):
        for name in re.findall(r"^\s*from \.(\S+) import", path.read_text(), flags=re.MULTILINE):
            assert f"{name}.py" in files, (path, name)
    # Decoding alone: nothing that trains, measures drafters or shows them.
    assert not [name for name in files if re.search("__(training|evaluation|demo|cli)", name)]


def test_requirements_are_the_packages():
    text = (ROOT / "pyproject.toml").read_text()
    (known,) = re.findall(r"^dependencies = \[$(.*?)^\]$", text, flags=re.MULTILINE | re.DOTALL)
    assert re.findall('"(.*)"', known) == list(REQUIREMENTS)


def test_modules_that_a_flat_folder_cannot_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "PACKAGE", tmp_path)
    (tmp_path / "one.py").write_text("from . import two\n")
    with pytest.raises(ValueError, match=r"one.py:1 imports modules as names"):
        needed("one")
    (tmp_path / "one.py").write_text("x = 1; from .two import y\n")
    with pytest.raises(ValueError, match=r"one.py:1 cannot be rewritten"):
        flattened("one")
