"""The house: floors, doors, owners and sizes, read off the source; and README's tree."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import REPOSITORY, environment

PACKAGE = REPOSITORY / "extraction"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "pocket" not in path.parts)
DOORS = [path for path in SOURCES if path.name[0].isdigit() or path.name.startswith("capture_tier")]
MAINS = [path for path in SOURCES if path.name == "__main__.py"]
ROOMS = [path for path in SOURCES if path not in [*DOORS, *MAINS] and path.name != "__init__.py"]

# A module imports from lower floors only; `decoding`, `vectors` and `report` are one room each.
FLOORS = [
    ("errors", "records", "proportions", "cores", "background", "pace", "ragged"),
    ("schema", "hooks", "atomic", "slots", "devices", "linears", "pooling", "rubrics", "phrases"),
    ("payloads", "pinned", "slices", "adapters", "detectors", "http_client"),
    ("configs", "store"),
    ("models", "traits", "prompts", "judges", "capture_store"),
    (
        "sites",
        "attention",
        "mixture",
        "decoding",
        "kept",
        "jobs",
        "steering",
        "report",
        "pairs",
        "prompt_sets",
        "shelf",
    ),
    ("capture", "internals", "grouped", "forecast", "continuations"),
    ("teacher", "vectors", "rows", "readings", "seats"),
    ("partners", "bursts"),
    ("running",),
    ("utils_batch", "likelihood", "exchange"),
    ("runners", "self_check", "steered", "local_judge", "openai_judge", "lda", "helix"),
    ("judging", "sweep", "trials", "serving", "queues"),
    ("evidence", "preview", "fitting", "study"),
    ("validating", "reporting", "monitoring"),
    ("stages",),
    ("summary", "terminal"),
    ("options", "capture_summary"),
    ("server_options", "capture_options"),
    ("cli",),
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
SPEAKERS = {"terminal", "options", "server_options", "capture_options", "cli"}
FILE_NAMES = re.compile(r"\.(jsonl|safetensors|lock|tmp)\b|\.receipt|card\.json|run\.json")
OWNERS = {"store", "atomic", "shelf", "pinned", "capture_store"}


def name_of(path: Path) -> str:
    """A module's name inside the package: `store`, `vectors.methods`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def room_of(path: Path) -> str:
    """The room that a module is, or is in."""
    return name_of(path).partition(".")[0]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that is imported from the package, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.startswith("extraction"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "extraction":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = (REPOSITORY / whole.replace(".", "/")).with_suffix(".py").exists()
                yield (whole, "") if is_module else (str(node.module), alias.name)


def faults_of_imports(room: str, tree: ast.AST) -> list[str]:
    """What a room imports that it may not."""
    faults = []
    for module, name in imported(tree):
        other = module.removeprefix("extraction").removeprefix(".").partition(".")[0]
        if other and other != room and FLOOR[other] >= FLOOR[room]:
            faults.append(f"{room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})")
        if name.startswith("_") and name != "__version__":
            faults.append(f"{room} imports the private {module}.{name}")
    return faults


def texts(tree: ast.AST) -> Iterator[str]:
    """Every string of a module that is no docstring."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def called(tree: ast.AST) -> set[str]:
    """The names of everything that is called."""
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in functions}


def modules(tree: ast.AST) -> set[str]:
    """The names of all modules that are imported."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


def test_every_room_has_its_floor():
    assert {room_of(path) for path in ROOMS} == set(FLOOR)


@pytest.mark.parametrize("path", ROOMS, ids=name_of)
def test_no_room_imports_from_its_own_floor_or_above_or_what_is_private(path):
    assert faults_of_imports(room_of(path), tree_of(path)) == []


def test_a_wrong_import_is_found():
    assert faults_of_imports("store", ast.parse("def f():\n    from extraction.stages import extract")) == [
        "store (floor 3) imports stages (floor 15)"
    ]
    assert faults_of_imports("store", ast.parse("from extraction.atomic import _sealed")) == [
        "store imports the private extraction.atomic._sealed"
    ]
    assert faults_of_imports("stages", ast.parse("from extraction import cli")) != []


@pytest.mark.parametrize("path", [*SOURCES, *sorted((REPOSITORY / "tests").glob("*.py"))], ids=lambda path: path.name)
def test_nobody_imports_by_a_bare_name_or_a_private_one(path):
    tree = tree_of(path)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert modules(tree).isdisjoint({room_of(room) for room in ROOMS})
    assert not [name for _, name in imported(tree) if name.startswith("_") and name != "__version__"]


@pytest.mark.parametrize("path", DOORS, ids=lambda path: path.name)
def test_a_door_holds_nothing(path):
    tree = tree_of(path)
    assert len(path.read_text().splitlines()) <= 60
    assert {module for module, _ in imported(tree)} == {"extraction.cli"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    first = tree.body[3]  # after the docstring and two imports of the standard library
    assert isinstance(first, ast.If)
    assert "sys.path[0] = str(Path(__file__).resolve().parent.parent)" in ast.unparse(first)


@pytest.mark.parametrize("path", MAINS, ids=name_of)
def test_what_runs_with_m_holds_nothing(path):
    tree = tree_of(path)
    assert {module for module, _ in imported(tree)} == {"extraction.cli"}
    assert len(tree.body) == 3  # a docstring, an import, a call
    assert called(tree) == {"serve_command"}


def test_hooks_have_one_caller():
    callers = {
        name_of(path)
        for path in SOURCES
        if called(tree_of(path))
        & {"register_forward_hook", "register_forward_pre_hook", "register_module_forward_hook"}
    }
    assert callers == {"hooks"}


def cuda_named(tree: ast.AST) -> list[str]:
    """Every use of torch.cuda and torch.mps, however it is imported."""
    named = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [*(text for text in named if text in KINDS), *(name for name in modules(tree) if name.startswith(KINDS))]


KINDS = ("torch.cuda", "torch.mps")
NAME_CUDA = {"devices"}  # what runs on CUDA alone; elsewhere, Apple's devices and ROCm would go wrong unseen


@pytest.mark.parametrize("path", [path for path in SOURCES if name_of(path) not in NAME_CUDA], ids=name_of)
def test_cuda_is_named_in_few_places(path):
    assert cuda_named(tree_of(path)) == []


def test_cuda_elsewhere_is_found():
    assert cuda_named(ast.parse("import torch\nx = torch.cuda.is_available()")) == ["torch.cuda"]
    assert cuda_named(ast.parse("from torch.cuda import synchronize")) == ["torch.cuda"]


def loads_of(tree: ast.AST) -> list[str]:
    """Every call of torch.load or numpy.load."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [ast.unparse(call) for call in calls if ast.unparse(call.func) in ("torch.load", "numpy.load", "np.load")]


def test_pickles_are_read_in_one_place_and_never_run():
    loads = {name_of(path): loads_of(tree_of(path)) for path in SOURCES if loads_of(tree_of(path))}
    assert set(loads) == {"exchange.torch_files", "exchange.array_files"}
    assert all("weights_only=True" in call for call in loads["exchange.torch_files"])
    assert all("allow_pickle=False" in call for call in loads["exchange.array_files"])
    assert not [path.name for path in SOURCES if modules(tree_of(path)) & {"pickle", "dill", "joblib"}]


def test_a_loaded_pickle_is_found():
    assert loads_of(ast.parse("x = torch.load(path, weights_only=False)")) == ["torch.load(path, weights_only=False)"]


@pytest.mark.parametrize("path", [path for path in SOURCES if name_of(path) not in OWNERS], ids=lambda path: path.name)
def test_file_names_have_one_owner(path):
    assert [text for text in texts(tree_of(path)) if FILE_NAMES.search(text)] == []


def test_a_file_name_elsewhere_is_found():
    tree = ast.parse('"""About run.json."""\npath = folder / f"{name}.jsonl"')
    assert [text for text in texts(tree) if FILE_NAMES.search(text)] == [".jsonl"]


@pytest.mark.parametrize("path", [p for p in ROOMS if room_of(p) not in SPEAKERS], ids=name_of)
def test_rooms_return_and_doors_speak(path):
    tree = tree_of(path)
    assert called(tree).isdisjoint({"print", "echo", "secho", "basicConfig"})
    assert modules(tree).isdisjoint({"tqdm", "click", "logging"})


def test_the_doors_and_what_they_check_import_neither_torch_nor_transformers():
    light = ["cli", "terminal", "configs", "schema", "traits", "store", "jobs", "kept", "judges", "judging"]
    light += ["prompts", "runners", "stages", "summary", "errors", "records", "pooling", "hooks", "atomic"]
    code = f"import sys; import {', '.join('extraction.' + name for name in light)}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True, cwd="/"
    )
    assert {name.partition(".")[0] for name in result.stdout.split()}.isdisjoint(
        {"torch", "transformers", "numpy", "safetensors", "tqdm"}
    )


def lengths() -> list[tuple[int, str]]:
    """Lines of every function, without its docstring."""
    found = []
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                start = node.body[0]
                has_docstring = isinstance(start, ast.Expr) and isinstance(start.value, ast.Constant)
                said = (start.end_lineno or 0) - start.lineno + 1 if has_docstring else 0
                found.append(((node.end_lineno or 0) - node.lineno + 1 - said, f"{name_of(path)}.{node.name}"))
    return sorted(found)


def test_functions_are_short_and_files_are_read_in_one_sitting():
    sizes = [length for length, _ in lengths()]
    assert statistics.median(sizes) <= 10
    assert statistics.quantiles(sizes, n=10)[-1] <= 30
    assert lengths()[-1][0] <= 60, lengths()[-3:]
    files = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert max(files.values()) <= 520, files


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_everything_public_says_what_it_is(path):
    tree = tree_of(path)
    public = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert ast.get_docstring(tree) or not tree.body
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_words_that_two_rooms_know_agree():
    from extraction import capture, configs, devices, pooling, sites

    assert configs.SITES == sites.SITES
    assert configs.SPREADS == devices.SPREADS
    assert {*configs.POOLINGS, "response_first"} == set(pooling.POOLINGS) == set(capture.ACCUMULATORS)


# --- README's tree --------------------------------------------------------------------------------------------------

PATH = re.compile(r"Makefile|LICENSE|(\.?[\w-]+/)+|(\.?[\w-]+/)*\.?[\w-]+(\.[\w-]+)+")
UNTRACKED = {".git", ".venv", "build", "dist", "__pycache__"}


def tree_block() -> list[str]:
    """The lines of README's tree."""
    path = REPOSITORY / "README.md"
    if not path.exists() or "@@TREE@@" in path.read_text():
        pytest.skip("README.md is not written yet")
    after = re.split(r"^## .*tree.*$", path.read_text(), flags=re.MULTILINE | re.IGNORECASE)[1]
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
    rooms = {f"extraction/{path.name}" for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert sorted((top | rooms) - said) == []


def test_a_tree_is_read_by_indentation():
    block = ["extraction/        the package", "  cli.py  terminal.py   options", "    deep/  x", "configs/  inputs"]
    assert [str(path) for path in named(block)] == [
        "extraction",
        "extraction/cli.py",
        "extraction/terminal.py",
        "extraction/deep",
        "configs",
    ]
