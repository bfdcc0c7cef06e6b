"""Threads are as many as the cores that a process is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from extraction.core import cpus
from tests.runs import environment

ALLOWED = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100000 100000\n", 1),
        ("50000 100000\n", 1),
        (f"{ALLOWED * 100000} 100000\n", ALLOWED),
        (f"{(ALLOWED + 3) * 100000} 100000\n", ALLOWED),
        ("max 100000\n", ALLOWED),
        ("nonsense\n", ALLOWED),
        ("", ALLOWED),
        (None, ALLOWED),
    ],
)
def test_a_quota_counts_where_it_is_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, expected: int
) -> None:
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(cpus, "QUOTA_V2", tmp_path / "cpu.max")
    monkeypatch.setattr(cpus, "QUOTA_V1", (tmp_path / "quota", tmp_path / "period"))
    assert cpus.usable_cores() == expected


def test_the_older_form_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "QUOTA_V2", tmp_path / "absent")
    monkeypatch.setattr(cpus, "QUOTA_V1", (tmp_path / "quota", tmp_path / "period"))
    (tmp_path / "period").write_text("100000\n")
    (tmp_path / "quota").write_text("-1\n")
    assert cpus.usable_cores() == ALLOWED
    (tmp_path / "quota").write_text("100000\n")
    assert cpus.usable_cores() == 1


@pytest.mark.parametrize(("given", "expected"), [({}, ALLOWED), ({"OMP_NUM_THREADS": "1"}, 1)])
def test_torch_uses_the_given_threads_else_the_usable_cores(given: dict[str, str], expected: int) -> None:
    program = (
        "from extraction.cli.arguments import prepare; prepare(None); import torch; print(torch.get_num_threads())"
    )
    settings = {key: value for key, value in environment().items() if key != "OMP_NUM_THREADS"} | given
    done = subprocess.run([sys.executable, "-c", program], env=settings, capture_output=True, text=True, check=True)
    assert int(done.stdout) == (expected if given else cpus.usable_cores())
