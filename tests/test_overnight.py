"""The overnight scripts: calls, exit codes, and that a killed run ends with the bytes of an undisturbed one.

Calls, logs and signals are tested with a shell program in Python's place; the rest with the real scripts, on a tiny
model.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from extraction.config.prompt_files import read_prompt_set
from extraction.storage.experiment_dir import capture_sets, verify_tree
from tests.runs import REPOSITORY, contents, environment, make_root
from tests.warm import warm_python

TIER_2 = {"uncertainty": 8, "commitment": 4, "cognitive": 4, "sycophancy": 4}
TIER_3 = {"tier3_uncertainty": 2, "tier3_cognitive": 2}
TRAITS = "uncertainty_calibration,commitment_strength,cognitive_load,sycophancy"
BATCHED, UNBATCHED, SPEED = "overnight_experiments_batched.sh", "overnight_experiments.sh", "test_batching_speed.sh"
RECORDING = """#!/usr/bin/env bash
printf '%s\\0' "$@" $'\\n' >>"$0.calls"
echo $$ >"$0.pid"
for option in "$@"; do
    case $option in
        */capture_tier2.py) tier=2 ;;
        */capture_tier3.py) tier=3 ;;
    esac
done
eval "${FAKE:-}"
echo "did tier ${tier:-0}"
"""


# Prompt files


@pytest.mark.parametrize(("name", "count"), [*TIER_2.items(), *TIER_3.items()])
def test_prompt_files_hold_the_stated_numbers_of_prompts(name: str, count: int) -> None:
    found = read_prompt_set(REPOSITORY / f"configs/prompts/prompts_{name}.txt")
    assert len(found.prompts) == count
    assert (found.skipped_blank, found.n_duplicates) == (0, 0)
    assert all(asked.prompt.isascii() and asked.prompt.strip() == asked.prompt for asked in found.prompts)


def test_no_prompt_is_asked_in_two_files() -> None:
    files = [read_prompt_set(REPOSITORY / f"configs/prompts/prompts_{name}.txt") for name in TIER_2 | TIER_3]
    prompts = [asked.prompt for found in files for asked in found.prompts]
    assert len(set(prompts)) == len(prompts) == 24


# Scripts, with a recording program in Python's place


class Checkout:
    """A checkout with a space in its name, in which Python only writes down what it is called with."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "a check out"
        shutil.copytree(REPOSITORY / "experiments", self.path / "experiments", ignore=lambda _, names: {
            name for name in names if not name.endswith(".sh")
        })  # fmt: skip
        shutil.copytree(REPOSITORY / "configs/prompts", self.path / "configs/prompts")
        self.elsewhere = folder / "else where"
        self.elsewhere.mkdir()
        self.python = folder / "py thon"
        self.python.write_text(RECORDING)
        self.python.chmod(0o755)
        self.run_folder = self.path / "experiments/pocket"

    @property
    def log(self) -> Path:
        return self.run_folder / "captures/overnight.log"

    def command(self, script: str, *arguments: str, **changes: str) -> dict[str, Any]:
        """Return the command that starts a script."""
        env = {**environment(**changes), "PYTHON": changes.get("PYTHON", str(self.python))}
        return {"args": [str(self.path / "experiments" / script), *arguments], "env": env, "cwd": self.elsewhere}

    def run(self, script: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a script to its end."""
        return subprocess.run(
            **self.command(script, *arguments, **changes), capture_output=True, text=True, check=False, timeout=60
        )

    def calls(self) -> list[list[str]]:
        """The arguments of every call."""
        path = Path(f"{self.python}.calls")
        return [call.split("\0")[:-1] for call in path.read_text().split("\n\0")[:-1]] if path.exists() else []

    def has_vectors(self, *traits: str, method: str = "probe") -> None:
        """Let traits have vectors and a card."""
        for trait in traits:
            (self.run_folder / trait / "vectors").mkdir(parents=True)
            for name in (f"{method}.safetensors", f"{method}.receipt.json", "card.json"):
                (self.run_folder / trait / "vectors" / name).touch()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def option(call: list[str], name: str) -> list[str]:
    """The values of an option, in order."""
    return [call[i + 1] for i, word in enumerate(call) if word == name]


def test_the_batched_night_loads_the_model_twice(checkout: Checkout) -> None:
    checkout.has_vectors(*TRAITS.split(","))
    result = checkout.run(BATCHED, "--png", "--batch-size", "4")
    assert (result.returncode, result.stderr) == (0, "")
    tier_2, tier_3 = checkout.calls()
    assert tier_2[0] == str(checkout.path / "extraction/capture_tier2.py")
    assert tier_3[0] == str(checkout.path / "extraction/capture_tier3.py")
    for call, names in ((tier_2, TIER_2), (tier_3, TIER_3)):
        files = [str(checkout.path / f"configs/prompts/prompts_{name}.txt") for name in names]
        assert option(call, "--prompts-file") == files
        assert option(call, "--experiment") == ["pocket"]
        assert option(call, "--traits") == [TRAITS]
        assert option(call, "--method") == ["probe"]
        assert option(call, "--max-new-tokens") == ["50"]
        assert option(call, "--temperature") == ["0.7"]
        assert option(call, "--batch-size") == ["4"]
        assert {"--keep-going", "--png"} <= set(call)
        assert "--model" not in call
    assert option(tier_3, "--layer") == ["auto"]
    assert "--layer" not in tier_2
    assert "tier 2: 4 prompt files: ok after" in checkout.log.read_text()
    assert result.stdout.count("did tier") == 2


def test_the_other_night_makes_a_call_for_every_prompt(checkout: Checkout) -> None:
    checkout.has_vectors(*TRAITS.split(","))
    result = checkout.run(UNBATCHED)
    assert (result.returncode, result.stderr) == (0, "")
    files = [read_prompt_set(REPOSITORY / f"configs/prompts/prompts_{name}.txt") for name in TIER_2 | TIER_3]
    calls = checkout.calls()
    assert [option(call, "--prompts") for call in calls] == [[a.prompt] for found in files for a in found.prompts]
    assert [call[0][-4] for call in calls] == ["2"] * 20 + ["3"] * 4
    assert len(set(map(len, calls[:20]))) == 1
    assert checkout.log.read_text().count(": ok after") == 24


def test_settings_and_the_roots_own_prompts_are_taken(checkout: Checkout, tmp_path: Path) -> None:
    root = tmp_path / "my root"
    (root / "configs/prompts").mkdir(parents=True)
    odd = ["-n $HOME `id` \"a\" 'b' \\n *", "\tlast, without an end"]
    (root / "configs/prompts/prompts_uncertainty.txt").write_text(f"{odd[0]}\r\n\n   \n{odd[1]}")
    changes = {"EXPERIMENT": "mine", "TRAITS": "calm, brave", "METHOD": "pca", "MAX_TOKENS": "100", "LAYER": "3"}
    changes |= {"TEMPERATURE": "0", "MODEL": "other model", "LOG": str(tmp_path / "logs/a log")}
    assert checkout.run(UNBATCHED, "--root", str(root), **changes).returncode == 0
    extracts, tier_2, tier_3 = checkout.calls()[:2], checkout.calls()[2:-4], checkout.calls()[-4:]
    code = 'from extraction.cli.commands import main; main(prog_name="traitline")'
    for call, trait in zip(extracts, ("calm", "brave"), strict=True):
        assert call == [
            "-c",
            code,
            "extract",
            "--experiment",
            "mine",
            "--model",
            "other model",
            "--trait",
            trait,
            "--quick",
        ]
    assert [option(call, "--prompts")[0] for call in tier_2[:2]] == odd
    assert len(tier_2) == 2 + 12
    for call in [*tier_2, *tier_3]:
        wanted = {"--method": "pca", "--max-new-tokens": "100", "--temperature": "0", "--model": "other model"}
        assert {name: option(call, name) for name in wanted} == {name: [value] for name, value in wanted.items()}
        assert option(call, "--root") == [str(root)]
    assert option(tier_3[0], "--layer") == ["3"]
    assert not checkout.log.exists()
    assert (tmp_path / "logs/a log").exists()


def test_a_failed_step_does_not_end_the_night(checkout: Checkout) -> None:
    checkout.has_vectors(*TRAITS.split(",")[:3])
    result = checkout.run(BATCHED, FAKE='[ "${tier:-0}" = 3 ] || { echo "traitline: no luck" >&2; exit 4; }')
    assert result.returncode == 1
    assert [call[0][-16:] for call in checkout.calls()[1:]] == ["capture_tier2.py", "capture_tier3.py"]
    for text in (result.stdout, checkout.log.read_text()):
        assert re.search(r"^step +result +seconds$", text, re.MULTILINE)
        assert re.search(r"^vectors of sycophancy +failed \(4\) +\d+$", text, re.MULTILINE)
        assert re.search(r"^tier 2: 4 prompt files +failed \(4\) +\d+$", text, re.MULTILINE)
        assert re.search(r"^tier 3: 2 prompt files +ok +\d+$", text, re.MULTILINE)
        assert "tier 2: 4 prompt files: FAILED with exit code 4" in text
        assert "traitline: no luck" in text
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in result.stdout.splitlines()[:6])


def test_a_prompt_file_that_is_missing_fails_by_name(checkout: Checkout) -> None:
    checkout.has_vectors(*TRAITS.split(","))
    (checkout.path / "configs/prompts/prompts_cognitive.txt").unlink()
    result = checkout.run(UNBATCHED)
    assert result.returncode == 1
    assert len(checkout.calls()) == 20
    assert re.search(r"^tier 2: prompts_cognitive.txt +failed", result.stdout, re.MULTILINE)
    assert f"{checkout.path}/configs/prompts/prompts_cognitive.txt" in result.stdout


def test_a_log_is_gone_on_with(checkout: Checkout) -> None:
    for _ in range(2):
        checkout.run(BATCHED)
    assert checkout.log.read_text().count("All steps done") == 2


def test_a_stopped_extraction_is_resumed(checkout: Checkout) -> None:
    checkout.has_vectors("calm", "brave", "kind")
    (checkout.run_folder / "calm/vectors/probe.receipt.json").unlink()
    (checkout.run_folder / "captures").mkdir()
    (checkout.run_folder / "captures/.extracting-kind").touch()
    traits = {"TRAITS": "calm,brave,kind"}
    assert checkout.run(BATCHED, **traits, FAKE='[ "$3" != extract ] || exit 1').returncode == 1
    assert [option(call, "--trait") for call in checkout.calls()[:-2]] == [["calm"], ["kind"]]
    (checkout.run_folder / "calm/vectors/probe.receipt.json").touch()
    assert checkout.run(BATCHED, **traits).returncode == 0
    assert [option(call, "--trait") for call in checkout.calls()[4:-2]] == [["calm"], ["kind"]]
    assert checkout.run(BATCHED, **traits).returncode == 0
    assert len(checkout.calls()) == 4 + 4 + 2


REFUSED = [
    ({"EXPERIMENT": "../x"}, "'../x'"),
    ({"EXPERIMENT": "a b"}, "'a b'"),
    ({"PYTHON": "/nowhere/python"}, "/nowhere/python"),
    ({"TRAITLINE_ROOT": "/nowhere"}, "TRAITLINE_ROOT"),
]


@pytest.mark.parametrize(
    ("script", "changes", "problem"),
    [(script, *case) for script in (BATCHED, UNBATCHED, SPEED) for case in REFUSED]
    + [(BATCHED, {"LOG": "/dev/null/log"}, "/dev/null/log")],
)
def test_a_script_that_can_not_start_prints_one_line(
    checkout: Checkout, script: str, changes: dict, problem: str
) -> None:
    result = checkout.run(script, **changes)
    assert result.returncode == 2
    assert re.search(rf"^{script}: .*{re.escape(problem)}", result.stderr, re.MULTILINE)
    assert checkout.calls() == []
    assert not checkout.log.exists()


@pytest.mark.parametrize(
    ("script", "number", "code", "fake"),
    [
        (BATCHED, signal.SIGTERM, 143, "trap 'echo got TERM; exit 143' TERM"),
        (UNBATCHED, signal.SIGHUP, 129, "trap 'echo got HUP; exit 129' HUP"),
        (UNBATCHED, signal.SIGINT, 130, "trap 'echo got TERM; exit 143' TERM"),  # SIGINT is ignored in the background
        (BATCHED, signal.SIGTERM, 143, "trap '' TERM; echo got nothing"),
    ],
)
def test_a_signal_is_handed_on_and_ends_the_night(
    checkout: Checkout, script: str, number: int, code: int, fake: str
) -> None:
    checkout.has_vectors(*TRAITS.split(","))
    steps = checkout.path / "experiments/overnight_steps.sh"
    steps.write_text(steps.read_text().replace("GRACE=5", "GRACE=1"))
    ready = checkout.elsewhere / "ready"
    fake += f"; touch '{ready}'; while :; do sleep 0.02; done"
    command = checkout.command(script, FAKE=fake)
    before = signal.signal(number, signal.SIG_DFL)  # what is ignored here, as under nohup, no child could hear
    try:
        process = subprocess.Popen(**command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(number, before)
    with process:
        until(ready.exists)
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert f"Stopped by {signal.Signals(number).name}" in out
    assert re.search(r"got (TERM|HUP|nothing)", checkout.log.read_text())
    assert len(checkout.calls()) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path(f"{checkout.python}.pid").read_text()), 0)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_speed_of_batching_is_printed_in_four_lines(checkout: Checkout, tmp_path: Path) -> None:
    checkout.has_vectors(*TRAITS.split(","))
    before = contents(checkout.path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    result = checkout.run(SPEED, "--batch-size", "4", FAKE="sleep 0.2", TMPDIR=str(scratch))
    assert (result.returncode, result.stderr) == (0, "")
    shape = r"Unbatched \(3 calls\):  (\S+) s\nBatched \(1 call\):  (\S+) s\nSpeedup:  (\S+)x\nTime saved:  (\S+) s\n"
    found = re.fullmatch(shape, result.stdout)
    assert found, result.stdout
    unbatched, batched, speedup, saved = map(float, found.groups())
    assert 0.6 <= unbatched < 3
    assert 0.2 <= batched < 1
    assert speedup == pytest.approx(unbatched / batched, rel=0.4)
    assert saved == pytest.approx(unbatched - batched, abs=0.11)
    calls = checkout.calls()
    assert [len(option(call, "--prompts")) for call in calls] == [1, 1, 1, 1, 3]
    assert [prompt for call in calls[1:4] for prompt in option(call, "--prompts")] == option(calls[4], "--prompts")
    assert all(Path(option(call, "--root")[0]).is_relative_to(scratch) for call in calls)
    assert contents(checkout.path) == before
    assert list(scratch.iterdir()) == []


def test_an_unmeasured_speed_is_not_printed(checkout: Checkout, tmp_path: Path) -> None:
    checkout.has_vectors(*TRAITS.split(","))
    result = checkout.run(SPEED, FAKE="echo traitline: no luck; exit 2", TMPDIR=str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert "traitline: no luck" in result.stderr


@pytest.mark.parametrize("script", sorted((REPOSITORY / "experiments").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_run_on_the_bash_that_macs_have(script: Path) -> None:
    text = script.read_text()
    arrays = r'"\$\{(COMMON|OWN_MODEL|names|PROMPTS|TIER_\d_FILES|TIMES|options)\[@\]\}"'  # never empty
    newer = r"mapfile|readarray|declare -A|local -[nA]|wait -n|EPOCH|\$\{\w+(,,|\^\^|@Q)|&>>|\|&|\bdate \S*%N"
    assert not re.search(newer, text)
    assert not re.search(r'(?<!\+)"\$\{\w+\[@\]\}"', re.sub(arrays, "", text))  # an error under set -u, where empty
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert os.access(script, os.X_OK) == text.startswith("#!")


# Whole runs, with the real scripts on a tiny model


class Night:
    """A root with a tiny model and small prompt files, and the batched script, run by a warm Python."""

    def __init__(self, root: Path, python: Path, script: str = BATCHED) -> None:
        self.root, self.python, self.script = make_root(root), python, script
        (self.root / "configs/prompts").mkdir()
        for name in TIER_2 | TIER_3:
            (self.root / f"configs/prompts/prompts_{name}.txt").write_text(f"Why {name}?\nWho?\n")

    def command(self, **changes: str) -> dict[str, Any]:
        settings = {"EXPERIMENT": "demo", "TRAITS": "calm", "MAX_TOKENS": "20", "TRAITLINE_ROOT": str(self.root)}
        env = environment(**{**settings, "PYTHON": str(self.python), **changes})
        arguments = ["--save-json", "--batch-size", "1", "--shard-size", "1", "--self-check", "0"]
        return {"args": [REPOSITORY / "experiments" / self.script, *arguments], "env": env, "cwd": "/"}

    def run(self, code: int = 0, **changes: str) -> str:
        """Run to the end; returns stdout."""
        result = subprocess.run(**self.command(**changes), capture_output=True, text=True, check=False, timeout=120)
        assert (result.returncode, result.stderr) == (code, ""), result.stdout + result.stderr + self.log
        return result.stdout

    def kill_when(self, condition: Callable[[], bool]) -> None:
        """Run a night whose processes are all killed as soon as a file exists."""
        with subprocess.Popen(**self.command(), stdout=subprocess.DEVNULL, process_group=0) as process:
            until(lambda: condition() or process.poll() is not None)
            assert process.poll() is None, self.log
            os.killpg(process.pid, signal.SIGKILL)

    @property
    def log(self) -> str:
        return (self.root / "experiments/demo/captures/overnight.log").read_text()

    def files(self) -> dict[str, bytes]:
        """Return the files of the night without its log."""
        found = contents(self.root / "experiments")
        return {name: data for name, data in found.items() if not name.endswith("overnight.log")}

    def count(self, pattern: str) -> int:
        return len(list((self.root / "experiments/demo").glob(pattern)))


@pytest.fixture(scope="module")
def python() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder, warm_python(Path(folder)) as program:
        yield program


@pytest.fixture(scope="module")
def quiet(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Night:
    """A run that was not interrupted."""
    night = Night(tmp_path_factory.mktemp("quiet"), python)
    night.run()
    return night


KILLS = {
    "while vectors are made": ("calm/activations/*.receipt.json", 1),
    "in the midst of vectors": ("calm/vectors/probe.receipt.json", 1),
    "in the first set": ("captures/tier2-*/prompts/*.receipt.json", 1),
    "in the third set": ("captures/tier2-*/prompts/*.receipt.json", 5),
    "at the dynamics": ("captures/tier2-*/dynamics.json", 1),
    "in tier 3": ("captures/tier3-*/prompts/*.receipt.json", 3),
}


def test_a_night_killed_again_and_again_ends_as_a_quiet_one(quiet: Night, tmp_path: Path) -> None:
    night = Night(tmp_path, quiet.python)
    for pattern, count in KILLS.values():
        night.kill_when(lambda pattern=pattern, count=count: night.count(pattern) >= count)
        assert night.files() != quiet.files()
    night.run()
    assert night.files().keys() == quiet.files().keys()
    assert [name for name, data in quiet.files().items() if night.files()[name] != data] == []
    assert verify_tree(night.root / "experiments") == []


def test_a_quiet_night_makes_every_set(quiet: Night) -> None:
    sets = capture_sets(quiet.root / "experiments", "demo")
    assert [re.sub("-[0-9a-f]{8}$", "", folder.path.name) for folder in sets] == sorted(
        [*(f"tier2-prompts_{name}" for name in TIER_2), *(f"tier3-prompts_{name}" for name in TIER_3)]
    )
    assert [folder.prompt_ids() for folder in sets] == [["p0000", "p0001"]] * 6
    assert all((folder.path / "prompts/p0001.json").exists() for folder in sets)
    assert quiet.log.count("+ ") == 3


def test_a_second_start_finds_nothing_to_do(quiet: Night) -> None:
    before, said = quiet.files(), quiet.log
    started = time.monotonic()
    out = quiet.run()
    assert time.monotonic() - started < 20
    assert "loading" not in quiet.log.removeprefix(said)
    assert "vectors of" not in out
    assert quiet.files() == before


def test_failed_steps_are_reported_and_the_others_run(quiet: Night, tmp_path: Path) -> None:
    night = Night(tmp_path / "root", quiet.python)
    shutil.copytree(quiet.root / "experiments/demo/calm", night.root / "experiments/demo/calm")
    (night.root / "configs/prompts/prompts_commitment.txt").write_bytes(b"\xff\n")
    (night.root / "configs/prompts/prompts_tier3_uncertainty.txt").write_text("\n")
    out = night.run(1, TRAITS="calm,nobody")
    for line in ("vectors of nobody +failed", "tier 2: 4 prompt files +failed", "tier 3: 2 prompt files +failed"):
        assert re.search(rf"^{line} \(\d\) +\d+$", out, re.MULTILINE), out
    for word in ("nobody", "prompts_commitment.txt", "prompts_tier3_uncertainty.txt"):
        assert re.search(rf"^traitline: .*{word}", night.log, re.MULTILINE) or word in night.log
    names = {
        re.sub("-[0-9a-f]{8}$", "", folder.path.name) for folder in capture_sets(night.root / "experiments", "demo")
    }
    assert names == {"tier2-prompts_uncertainty", "tier2-prompts_cognitive", "tier2-prompts_sycophancy"} | {
        "tier3-prompts_tier3_cognitive"
    }
    assert all(len(folder.prompt_ids()) == 2 for folder in capture_sets(night.root / "experiments", "demo"))


def test_both_nights_read_the_same(quiet: Night, tmp_path: Path) -> None:
    found = []
    for script in (BATCHED, UNBATCHED):
        night = Night(tmp_path / script, quiet.python, script)
        shutil.copytree(quiet.root / "experiments/demo/calm", night.root / "experiments/demo/calm")
        for path in (night.root / "configs/prompts").iterdir():
            path.write_text(path.read_text().partition("\n")[0])
        night.run(TEMPERATURE="0", MAX_TOKENS="8")
        sets = capture_sets(night.root / "experiments", "demo")
        read = [folder.read_prompt(id) for folder in sets for id in folder.prompt_ids()]
        found.append({(header["tier"], header["prompt"]): (tensors, header) for tensors, header in read})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 6
    for key, (tensors, header) in found[0].items():
        others, other = found[1][key]
        assert header["token_ids"] == other["token_ids"]
        assert tensors.keys() == others.keys()
        assert all(torch.allclose(tensor, others[name], atol=1e-4) for name, tensor in tensors.items())
