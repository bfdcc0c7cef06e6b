"""The command line as users type it: by path, as modules, as `traitline`; help, progress, messages and exit codes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from extraction.cli.terminal import Interrupted
from extraction.model.memory import CPU_AUTO_BATCH
from extraction.pipeline import forecast, stages
from extraction.storage.atomic import read_document, write_document
from extraction.storage.run_dir import fingerprint
from tests.forks import Forks, forks
from tests.runs import (
    REPOSITORY,
    contents,
    environment,
    invoke,
    make_root,
    one_refusal,
    refused,
    succeed,
)

STAGE_SCRIPTS = {
    "1_generate_responses": "generate",
    "1_generate_and_extract": "combined",
    "1_generate_batched_simple": "batched",
    "2_extract_activations": "capture",
    "3_extract_vectors": "vectors",
    "4_evaluate_vectors": "validate",
}
HEAVY = ("torch", "transformers", "numpy", "tokenizers", "safetensors")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A fresh root."""
    return make_root(tmp_path)


def python(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """A process of its own, from another folder, without the checkout on its path."""
    env = environment()
    del env["PYTHONPATH"]
    given = {"capture_output": True, "text": True, "env": env, "cwd": "/", "timeout": 120, **options}
    return subprocess.run([sys.executable, *map(str, arguments)], check=False, **given)


# --- every way of typing them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", STAGE_SCRIPTS)
def test_help_by_path_from_anywhere_imports_nothing_heavy(script):
    result = python("-X", "importtime", REPOSITORY / "extraction" / f"{script}.py", "--help")
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in result.stderr.splitlines() if "|" in line}
    assert result.returncode == 0
    assert "extraction" in imported
    assert imported.isdisjoint(HEAVY)
    assert f"Usage: {script}.py [OPTIONS]" in result.stdout
    assert "--experiment NAME" in result.stdout
    assert all(len(line) <= 100 for line in result.stdout.splitlines())


@pytest.mark.parametrize("module", ["extraction", "extraction.cli"])
def test_the_package_as_a_module_is_the_same_program(module):
    by_module, by_group = python("-m", module, "traits", cwd=REPOSITORY), succeed("traits")
    assert (by_module.returncode, by_module.stdout) == (0, by_group.stdout)


def test_help_names_every_command_once_in_a_section_within_80_columns():
    from extraction.cli.commands import SECTIONS, main

    lines = succeed("--help").stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert {f"{title}:" for title in SECTIONS} <= set(lines)
    named = [command.name for commands in SECTIONS.values() for command in commands]
    assert sorted(named) == sorted(main.commands)
    text = " ".join(" ".join(lines).split())
    for command in main.commands.values():
        assert " ".join(command.get_short_help_str(500).split()) in text


def test_every_option_shows_its_default_or_is_required():
    from extraction.cli.commands import main

    for command in main.commands.values():
        for option in command.params:
            shown = option.param_type_name == "argument" or option.required or option.is_flag or option.multiple
            text = option.get_help_record(command.make_context(command.name, [], resilient_parsing=True))
            assert shown or "default: " in " ".join(text), (command.name, option.name)


def test_help_of_the_group_imports_nothing_heavy():
    code = "import sys; from extraction.cli.commands import main\n"
    code += "main(sys.argv[1:], standalone_mode=False); print(*sys.modules)"
    result = python("-c", code, "--help", cwd=REPOSITORY)
    *_, last = result.stdout.splitlines()
    assert {name.split(".")[0] for name in last.split()}.isdisjoint(HEAVY)
    for command in (*STAGE_SCRIPTS.values(), "extract", "verify", "traits"):
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE)


def test_a_door_by_path_from_another_folder_does_the_work(root):
    common = ("--root", root, "--experiment", "demo", "--trait", "calm")
    first = python(REPOSITORY / "extraction/1_generate_batched_simple.py", *common, "--batch_size", "8")
    assert first.returncode == 0, first.stderr
    assert "batch size 8" in first.stdout
    second = python("-m", "extraction.3_extract_vectors", *common, "--layers", "1", cwd=REPOSITORY)
    assert second.returncode == 0, second.stderr
    assert "5 new." in second.stdout


def test_doors_are_the_commands_of_the_group():
    from extraction.cli.commands import main

    for script, command in STAGE_SCRIPTS.items():
        text = (REPOSITORY / "extraction" / f"{script}.py").read_text()
        assert f"{main.commands[command].callback.__name__}()" in text


def test_options_go_by_both_spellings(root):
    dashes = ["--n-examples", "3", "--max-new-tokens", "4", "--batch-size", "2", "--self-check", "0"]
    lines = [word.replace("-", "_").replace("__", "--", 1) if word[0] == "-" else word for word in dashes]
    for experiment, options in (("tiny_a", dashes), ("tiny_b", lines)):
        succeed("batched", "--root", root, "--experiment", experiment, "--trait", "calm", *options)
    one, other = (contents(root / "experiments" / name / "calm" / "responses") for name in ("tiny_a", "tiny_b"))
    assert one == other


@pytest.mark.parametrize(("layers", "count"), [("all", 3), ("1", 1), ("0-1", 2), ("0,2", 2), ("2,0-1", 3)])
def test_layers_in_every_form(root, layers, count):
    options = ("--trait", "calm", "--layers", layers, "--n-examples", "2", "--self-check", "0")
    succeed("batched", "--root", root, "--experiment", "demo", *options)
    receipt = yaml.safe_load((root / "experiments/demo/calm/activations/0000.receipt.json").read_text())
    assert receipt["tensors"]["residual.response_mean"]["shape"][1] == count


def test_an_experiment_without_a_file_takes_its_model_from_its_name_with_a_note(root):
    result = succeed("generate", "--root", root, "--experiment", "tiny_nov20", "--trait", "calm", "--n-examples", "2")
    assert result.stderr.splitlines()[0] == (
        "configs/experiments/tiny_nov20.yaml: no such file: model tiny from the name, the rest by default"
    )


def test_batch_size_auto_is_measured(root):
    result = succeed("batched", "--root", root, "--experiment", "demo", "--batch_size", "auto")
    assert f"batch size {CPU_AUTO_BATCH}" in result.stdout


def test_traits_are_listed():
    out = succeed("traits").stdout
    assert "retrieval_construction\n    " in out


# --- before anything is loaded --------------------------------------------------------------------------------------


def test_a_layer_out_of_range_is_refused_before_weights_are_read_and_leaves_nothing(root):
    (root / "model/model.safetensors").unlink()
    line = refused("extract", "--root", root, "--experiment", "demo", "--layers", "2-3")
    assert "--layers '2-3': layer 3 is out of range; the last layer is 2" in line
    assert contents(root / "experiments") == {}


def test_a_read_only_folder_is_refused_before_torch_is_imported():
    top = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        top.chmod(0o755)
        root = make_root(top)
        (root / "experiments").mkdir(mode=0o555)
        code = (
            "import atexit, os, sys, click.testing\n"
            "import extraction.cli.commands, extraction.pipeline.stages, extraction.cli.summaries\n"
            "atexit.register(lambda: print('torch' in sys.modules))\n"
            "os.getuid() or os.setuid(65534)\n"
            "extraction.cli.commands.main(prog_name='traitline')"
        )
        result = python("-c", code, "extract", "--root", root, "--experiment", "demo", cwd=REPOSITORY)
    finally:
        shutil.rmtree(top)
    assert result.stdout == "False\n"
    line = one_refusal(result.returncode, "", result.stderr)
    assert f"{root}/experiments/demo/calm" in line
    assert "make the folder writable" in line


def test_a_start_that_fails_pins_nothing(root):
    """The remedy is another setting, so the run must not hold on to the one that failed."""
    options = ("extract", "--quick", "--root", root, "--experiment", "demo")
    assert "lower --max-new-tokens" in refused(*options, "--max-new-tokens", "500")
    assert contents(root / "experiments") == {}
    assert invoke("verify", "--root", root).exit_code == 0
    succeed(*options)


# --- runs of older versions -----------------------------------------------------------------------------------------


def test_a_run_without_a_newer_setting_uses_its_default(root):
    """run.json of an older version lacks min_p: the run verifies, goes on and is the same; another value is refused."""
    options = ("--root", root, "--experiment", "demo")
    succeed("batched", *options, "--slice", "1/2")
    run = root / "experiments/demo/calm"
    stored = read_document(run / "run.json", "")
    config = dict(stored["config"], generation=dict(stored["config"]["generation"]))
    assert config["generation"].pop("min_p") == 0
    assert fingerprint(config) == stored["fingerprint"]
    write_document(run / "run.json", {"config": config, "fingerprint": fingerprint(config)})
    assert "generation.min_p was absent" in refused("batched", *options, "--min-p", "0.1")
    succeed("batched", *options)
    succeed("vectors", *options)
    assert invoke("verify", run).exit_code == 0


def test_a_newer_setting_that_is_not_at_its_default_is_part_of_a_runs_identity():
    """The negative control: only the default may be absent."""
    older, newer = {"generation": {"top_k": 0}}, {"generation": {"top_k": 0, "min_p": 0.1}}
    assert fingerprint(older) != fingerprint(newer)
    assert fingerprint(older) == fingerprint({"generation": {"top_k": 0, "min_p": 0.0}})


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "combined", "batched", "extract"])
def test_a_dry_run_prints_plan_and_forecast_and_writes_nothing(root, command):
    options = ("--dry-run", "--gpu-price", "2.5")
    out = succeed(command, "--root", root, "--experiment", "demo", *options).stdout
    assert not (root / "experiments").exists()
    for label in ("model", "traits", "examples", "layers", "tokens", "time", "disk", "memory", "cost"):
        assert re.search(rf"^  {label} +\S", out, re.MULTILINE), out
    size, groups = (1, 3) if command in ("generate", "combined") else (12, 2)
    assert re.search(rf"examples +48 .* 20, {groups} run groups, batch size {size}\b", out)
    assert "480 new" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_extract_tells_at_its_start_of_the_steered_responses_that_a_dry_run_counts(root):
    options = ("extract", "--root", root, "--experiment", "demo", "--trait", "calm,warm", "--samples-per-coef", "2")
    planned = re.search(r"about ([\d,]+) steered", succeed(*options, "--dry-run").stdout)
    lines = succeed(*options).stderr.splitlines()
    (place,) = [i for i, line in enumerate(lines) if "steered responses" in line]
    assert f"about {planned[1]} " in lines[place]
    assert "--quick" in lines[place]
    assert place < lines.index("loading tiny")
    assert "steered responses" not in succeed(*options).stderr  # they are made
    quick = ("--n-examples", "12", "--experiment", "tiny_quick", "--quick")
    assert "steered responses" not in succeed(*options, *quick).stderr
    assert "no steered" in succeed(*options, "--judge", "none", "--dry-run").stdout


@pytest.mark.parametrize("options", [("--dry-run",), ("--quick",)])
def test_an_interrupted_dry_run_names_no_shards(root, monkeypatch, options):
    def stop(*_: object, **__: object) -> None:
        raise Interrupted(2)

    monkeypatch.setattr(forecast, "forecast", stop)
    monkeypatch.setattr(stages, "extract", stop)
    result = invoke("extract", "--root", root, "--experiment", "demo", *options)
    assert (result.exit_code, result.stdout) == (130, "")
    assert ("shards" in result.stderr) == ("--dry-run" not in options)  # the control: a run has shards to keep


def test_a_dry_run_reads_no_weights_and_refuses_the_same_errors(root):
    (root / "model/model.safetensors").unlink()
    succeed("extract", "--root", root, "--experiment", "demo", "--dry-run")
    line = refused("extract", "--root", root, "--experiment", "demo", "--dry-run", "--max-new-tokens", "500")
    assert "lower --max-new-tokens" in line


def test_a_dry_run_of_stage_2(root):
    succeed("generate", "--root", root, "--experiment", "demo")
    before = contents(root / "experiments")
    out = succeed("capture", "--root", root, "--experiment", "demo", "--dry-run").stdout
    assert "new" not in out.partition("tokens")[2].splitlines()[0]
    assert contents(root / "experiments") == before


# --- what is said, and where ----------------------------------------------------------------------------------------

USAGE = [
    (["--nonsense"], "'--nonsense'"),
    (["nonsense"], "'nonsense'"),
    (["extract"], "'--experiment'"),
    (["amplify"], "'--prompts-file'"),
    (["extract", "--experiment"], "'--experiment'"),
    (["extract", "--experiment", "demo", "--n_exampels", "3"], "'--n-examples'"),
    (["extract", "--experiment", "demo", "--threads", "x"], "'x'"),
    (["extract", "--experiment", "demo", "--gpu-price", "-1"], "-1"),
    (["extract", "--experiment", "demo", "--self-check", "-1"], "-1"),
    (["extract", "--experiment", "demo", "extra"], "extra"),
]


@pytest.mark.parametrize(("arguments", "fragment"), USAGE)
def test_a_wrong_option_is_refused_in_one_line(arguments, fragment):
    assert fragment in refused(*arguments)


def test_debug_shows_the_traceback(root):
    from click.testing import CliRunner

    from extraction.cli.commands import main
    from extraction.core.errors import ConfigError

    options = ["generate", "--root", str(root), "--experiment", "demo", "--layers", "x", "--debug"]
    assert isinstance(CliRunner().invoke(main, options).exception, ConfigError)


def test_control_characters_in_names_do_not_reach_the_terminal(root):
    assert r"\x1b[31m" in refused("extract", "--root", root, "--experiment", "demo", "--trait", "\x1b[31mred")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Where processes come from."""
    with forks(tmp_path_factory.mktemp("forks")) as running:
        yield running


def on_a_terminal(server: Forks, *arguments: object, columns: int = 80) -> tuple[int, str]:
    """Return the exit code, and the bytes sent to stderr's terminal of that many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = server.start(*arguments, stderr=Path(os.ttyname(theirs)))
    sent = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.05)[0]:
            sent += os.read(ours, 65536)
    os.close(theirs)
    os.close(ours)
    return process.wait(), sent.decode()


def test_a_terminal_gets_one_bar_of_its_width(server, root):
    code, sent = on_a_terminal(
        server, "extract", "--quick", "--root", root, "--experiment", "demo", "--max-new-tokens", "60"
    )
    assert code == 0, sent
    frames = [frame for frame in re.split(r"[\r\n]+", sent.replace("\x1b[A", "")) if frame.strip()]
    bars = [frame for frame in frames if " examples |" in frame]
    assert len(bars) > 1
    assert all(len(frame) <= 80 for frame in frames), frames
    assert re.search(r"calm: generating and capturing: \d+/48 examples \|.*\|, (\d+ s left, )?[\d,]+ tokens/s", sent)
    assert re.search(r"48/48 examples \|.*\|, 0 s left, ", bars[-1]), bars[-1]


def test_no_terminal_gets_lines_without_control_characters(server, root):
    process = server.start("extract", "--quick", "--root", root, "--experiment", "demo")
    assert process.wait() == 0
    out, err = process.stdout, process.stderr
    assert all(line.isprintable() for line in (out + err).split("\n")), (out, err)
    loading, check, progress = err.splitlines()
    assert loading == "loading tiny"
    assert check.startswith("self-check: 2 examples alone and in a batch agree within ")
    assert progress == "calm: generating and capturing: 48 examples"


def test_a_closed_stdout_is_no_traceback():
    many = "from extraction.cli.commands import main\nfor _ in range(300): main(['traits'], standalone_mode=False)"
    shell = f'"{sys.executable}" -c "{many}" | head -1; exit ${{PIPESTATUS[0]}}'
    options = {"capture_output": True, "text": True, "env": environment(), "cwd": REPOSITORY}
    result = subprocess.run(["bash", "-c", shell], **options, check=False)
    assert result.stderr == "", result.stderr
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) == 1
