"""A repository for the Hub with which `generate` decodes speculatively where we are not installed.

    model.generate(**inputs, custom_generate="OWNER/NAME", trust_remote_code=True,
                   assistant_models=["OWNER/DRAFTER"])

transformers loads `custom_generate/generate.py` and the modules beside it that it imports, from one
flat folder. So the modules of decoding are written there as they are, under longer names; only the
lines that import each other differ.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from .files import ResultFolder, write_text
from .version import __version__

PACKAGE = Path(__file__).resolve().parent
_ENTRY = "extension"
REQUIREMENTS = (
    "torch>=2.6",
    "transformers>=5.0",
    "safetensors>=0.4.3",
    "huggingface-hub>=1.3",
    "accelerate>=1.1",
)

_GENERATE = '''"""Speculative decoding with several drafters: taps-hf {version}."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # early versions of transformers bring along what is named in this file only
{modules}

try:  # where the package is installed, its classes are those of the drafters at hand
    from taps_hf.extension import speculative_generate
except ImportError:
    from .{entry} import speculative_generate


def generate(model, *args, **kwargs):
    """As `model.generate(..., assistant_models=...)` of taps-hf; the text is plain generate's.

    Args:
        model: the target.
        assistant_models: a drafter, a list of them, or a dictionary from names to them: folders or
            repositories of the Hub, in any format that taps-hf reads.
        strategy, tree, verification, on_cycle, output_draft_trees, compile: as there.
    """
    return speculative_generate(model, *args, **kwargs)
'''
_README = """---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
tags:
- custom_generate
- speculative-decoding
- taps-hf
---

# Speculative decoding with several drafters

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("TARGET")
    model.generate(
        **inputs,
        custom_generate="{name}",
        trust_remote_code=True,
        assistant_models=["DRAFTER", "ANOTHER"],
        strategy="merged",
    )

emits the very text that plain `generate` gives, in fewer passes of the target. Drafters are folders
or repositories: EAGLE-2, HASS and EAGLE-3 heads, whoever trained them, as long as it was for this
target. All arguments are those of `generate` of the package taps-hf, {version}, whose modules of
decoding lie in `custom_generate/`; `strategy` is one of its names.

Needs {requirements}.
"""


def write_repository(out: Path, name: str) -> None:
    """Write the repository's folder.

    Args:
        out: folder to write; if it exists it must be empty, or as this command wrote it earlier.
        name: of the repository, for its card.

    Raises:
        ValueError: if the folder may not be written.
    """
    result = ResultFolder(out, "push --custom-generate")
    with result.writing() as folder:
        fill_repository(folder, name)


def fill_repository(folder: Path, name: str) -> None:
    """Write the repository's files into a folder that is there."""
    inner = folder / "custom_generate"
    inner.mkdir()
    for module in needed(_ENTRY):
        write_text(inner / f"{_flat(module)}.py", flattened(module))
    modules = "\n".join(f"    from .{_flat(module)} import __name__" for module in needed(_ENTRY))
    generate = _GENERATE.format(version=__version__, entry=_flat(_ENTRY), modules=modules)
    write_text(inner / "generate.py", generate)
    write_text(inner / "requirements.txt", "".join(f"{line}\n" for line in REQUIREMENTS))
    card = _README.format(name=name, version=__version__, requirements=", ".join(REQUIREMENTS))
    write_text(folder / "README.md", card)


def needed(entry: str) -> list[str]:
    """A module of the package and all that it imports of it, by dotted names without the package's.

    Packages run with what is in them, so their own files are among them.
    """
    found, waiting = [], [entry]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.append(module)
            waiting += [imported for _, imported in _imports(module)]
    return sorted(found)


def flattened(module: str) -> str:
    """A module's text, which imports its neighbours by their flat names."""
    lines = _file(module).read_text("utf-8").splitlines(keepends=True)
    for line, imported in _imports(module):
        pattern = r"^(\s*)from \.+[\w.]* import"
        lines[line], count = re.subn(pattern, rf"\1from .{_flat(imported)} import", lines[line])
        if not count:
            raise ValueError(f"{_file(module)}:{line + 1} cannot be rewritten: {lines[line]!r}.")
    return "".join(lines)


def _flat(module: str) -> str:
    return "taps_hf__" + module.replace(".", "__")


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imports(module: str) -> list[tuple[int, str]]:
    """Lines (from 0) that import from the package, and the modules that they import from."""
    file, found = _file(module), []
    parts = module.split(".")
    package = parts if file.name == "__init__.py" else parts[:-1]
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            if node.module is None:
                raise ValueError(
                    f"{file}:{node.lineno} imports modules as names, expected `from .module import "
                    "name`: only these can be found in one flat folder."
                )
            found.append((node.lineno - 1, ".".join([*base, node.module])))
    return found
