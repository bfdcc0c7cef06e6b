"""Documents: every command has the options that are written, quick ones run, and the table of settings is current."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from extraction.cli import commands as cli
from extraction.config.settings import EXPERIMENT_SETTINGS, MODEL_SETTINGS
from extraction.core.names import is_safe_name
from tests.runs import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
STAGE_SCRIPTS = {
    "1_generate_responses": "generate",
    "1_generate_and_extract": "combined",
    "1_generate_batched_simple": "batched",
    "2_extract_activations": "capture",
    "3_extract_vectors": "vectors",
    "4_evaluate_vectors": "validate",
    "run_experiment": "amplify",
    "capture_tier2": "read",
    "capture_tier3": "internals",
}
RUN = {"traits", "verify"}


def commands() -> list[list[str]]:
    """Return the arguments of every command, also those of stage scripts, as `traitline` takes them."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                words = shlex.split(line)
                if words[0] == "traitline":
                    found.append(words[1:])
                elif words[0] == "python" and words[1].startswith(("extraction/", "experiments/")):
                    assert (REPOSITORY / words[1]).exists(), line
                    found.append([STAGE_SCRIPTS[Path(words[1]).stem], *words[2:]])
    return found


def test_the_documents_hold_commands():
    assert len(commands()) > 7


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_documented_command_has_those_options(words):
    command = cli.main.commands[words[0]]
    context = command.make_context(words[0], words[1:])
    assert context.params


@pytest.mark.parametrize(
    "words", [words for words in commands() if words[0] in RUN or "--dry-run" in words], ids=" ".join
)
def test_a_documented_command_that_is_quick_runs(words, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAITLINE_ROOT", str(tmp_path))
    (tmp_path / "experiments").mkdir()
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 0, result.output


def test_a_wrong_option_is_noticed():
    with pytest.raises(Exception, match="No such option"):
        cli.main.commands["extract"].make_context("extract", ["--experiment", "pocket", "--no-such-thing"])


def settings_table():
    """Return the table of settings that docs/guide.md has."""
    rows = ["| key in a file | option | default | values | what it does |", "|---|---|---|---|---|"]
    for setting in (*EXPERIMENT_SETTINGS.values(), *MODEL_SETTINGS.values()):
        if setting.path == "model":
            continue
        option = f"`{setting.flag}`" if setting.option.on_command_line else ""
        if setting.name == "traits":
            option = "`--traits`"
        of_model = setting.path.startswith("model.")
        key = f"`{setting.path.removeprefix('model.')}`" + (" (model)" if of_model else "")
        default = "false" if setting.default is False else setting.default_text
        rows.append(f"| {key} | {option} | {default} | {setting.values} | {setting.help} |")
    return "\n".join(rows)


def test_the_guides_table_of_settings_is_that_of_the_program():
    guide = (REPOSITORY / "docs/guide.md").read_text(encoding="utf-8")
    assert settings_table() in guide, f"put this table into docs/guide.md:\n{settings_table()}"
    for setting in EXPERIMENT_SETTINGS.values():
        assert f"| `{setting.path}`" in guide or setting.path == "model"


def test_every_setting_of_the_command_line_is_an_option_of_extract():
    options = {option for parameter in cli.main.commands["extract"].params for option in parameter.opts}
    assert {s.flag for s in EXPERIMENT_SETTINGS.values() if s.option.on_command_line} <= options


@pytest.mark.parametrize("target", ["extract", "test"])
def test_the_two_commands_are_targets_of_the_makefile(target):
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("variables", "experiment"),
    [
        ({}, "pocket"),
        ({"MODEL": "pocket"}, "pocket"),
        ({"MODEL": "pocket", "EXPERIMENT": "mine"}, "mine"),
        ({"MODEL": "gemma_2b"}, "gemma_2b"),
        ({"MODEL": "Qwen/Qwen2.5-7B-Instruct"}, "qwen2.5-7b-instruct"),
        ({"MODEL": "Qwen/Qwen2.5-7B-Instruct", "EXPERIMENT": "first"}, "first"),
        ({"MODEL": "/a folder/It's {mine}; é/"}, "it_s__mine"),
        ({"MODEL": "./some/Model.Q4.gguf"}, "model.q4"),
        ({"MODEL": "x/" + "y" * 80}, "y" * 64),
        ({"MODEL": "../.."}, "model"),
    ],
)
def test_make_extract_names_a_run_after_its_model(tmp_path, variables, experiment):
    """The recipe is run with `echo` in place of traitline."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("python", "traitline"):
        (tmp_path / ".venv/bin" / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / ".venv/.installed-report,lora").touch()
    command = ["make", "extract", *(f"{name}={value}" for name, value in variables.items())]
    environment = {"PATH": os.environ["PATH"]}
    made = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    words = made.stdout.splitlines()
    assert words[words.index("--experiment") + 1] == experiment
    assert is_safe_name(experiment)
