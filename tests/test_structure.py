"""The package's structure: import contracts, stage scripts, light imports, and README's tree."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

from tests.runs import REPOSITORY, environment

PACKAGE = REPOSITORY / "extraction"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))
SCRIPTS = [path for path in PACKAGE.glob("*.py") if path.name[0].isdigit() or path.name.startswith("capture_tier")]
HEAVY = {"torch", "transformers", "numpy", "safetensors", "tqdm", "fastapi", "matplotlib"}


def test_imports_keep_their_contracts(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    ["from extraction.pipeline.stages import extract", "from extraction.storage.atomic import digest", "import tqdm"],
)
def test_a_wrong_import_breaks_a_contract(tmp_path, wrong):
    files = {path.relative_to(REPOSITORY): path.read_text() for path in SOURCES}
    module = Path("extraction/model/hooks.py")
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(
            text.replace("from contextlib", f"{wrong}\nfrom contextlib", 1) if path == module else text
        )
    (tmp_path / "setup.cfg").write_text((REPOSITORY / "setup.cfg").read_text())
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    env = environment() | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "BROKEN" in result.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_stage_script_holds_options_and_one_call(path):
    tree = ast.parse(path.read_text())
    assert len(path.read_text().splitlines()) <= 20
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    first = tree.body[3]  # after the docstring and two imports of the standard library
    assert isinstance(first, ast.If)
    assert "sys.path[0] = str(Path(__file__).resolve().parent.parent)" in ast.unparse(first)


def test_hooks_are_registered_in_one_module():
    registering = [
        path
        for path in SOURCES
        if "register_forward" in path.read_text() or "register_module_forward" in path.read_text()
    ]
    assert [path.relative_to(PACKAGE).as_posix() for path in registering] == ["model/hooks.py"]


def test_commands_and_their_checks_import_nothing_heavy():
    light = [
        "cli.commands",
        "cli.terminal",
        "config.experiments",
        "config.traits",
        "storage.trait_run",
        "pipeline.plan",
    ]
    light += ["pipeline.stages", "judging.registry", "judging.filtering", "model.chat_template", "model.hooks"]
    code = f"import sys; import {', '.join('extraction.' + name for name in light)}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True, cwd="/"
    )
    assert {name.partition(".")[0] for name in result.stdout.split()}.isdisjoint(HEAVY)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("**/__init__.py")), ids=lambda path: path.parent.name)
def test_a_package_has_a_docstring_and_exports_existing_names(path):
    name = ".".join(path.parent.relative_to(REPOSITORY).parts)
    module = importlib.import_module(name)
    assert module.__doc__
    for export in getattr(module, "__all__", ()):
        assert getattr(module, export) is not None
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


def test_every_pooling_has_a_running_form():
    from extraction.activations.pooled import ACCUMULATORS
    from extraction.core.pooling import POOLINGS

    assert set(POOLINGS) == set(ACCUMULATORS)


# --- README's tree --------------------------------------------------------------------------------------------------

PATH = re.compile(r"Makefile|LICENSE|(\.?[\w-]+/)+|(\.?[\w-]+/)*\.?[\w-]+(\.[\w-]+)+")
UNTRACKED = {".git", ".venv", "build", "dist", "__pycache__"}


def tree_block() -> list[str]:
    """The lines of README's tree."""
    after = re.split(r"^## .*tree.*$", (REPOSITORY / "README.md").read_text(), flags=re.MULTILINE | re.IGNORECASE)[1]
    return after.split("```")[1].splitlines()[1:]


def named(block: list[str]) -> Iterator[Path]:
    """The paths that a tree names: by indentation, several on a line where they stand at its start."""
    folders: list[tuple[int, Path]] = [(-1, Path())]
    for line in block:
        indent = len(line) - len(line.lstrip())
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        for word in line.split():
            if not PATH.fullmatch(word):
                break
            path = folders[-1][1] / word
            yield path
            if word.endswith("/"):
                folders.append((indent, path))


def test_readmes_tree_is_on_the_disk():
    paths = list(named(tree_block()))
    assert len(paths) > 20
    assert [str(path) for path in paths if not (REPOSITORY / path).exists()] == []


def test_the_disk_is_in_readmes_tree():
    said = {str(path).rstrip("/") for path in named(tree_block())}
    top = {
        path.name
        for path in REPOSITORY.iterdir()
        if path.name not in UNTRACKED and not re.search(r"_cache$|\.egg-info$|^\.hypothesis$|^\.git", path.name)
    }
    entries = {f"extraction/{path.name}" for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert sorted((top | entries) - said) == []
