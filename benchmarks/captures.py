"""Measure time and memory of the 24 captures of the studies, as commands in processes of their own.

Three ways: one model load a tier with prompts in batches, the same with one prompt at a time, and a load a prompt.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import run_measured
from benchmarks.workload import in_turn, spread, trained_traits
from extraction.config.experiments import find_root, resolve_model
from extraction.config.prompt_files import read_prompt_set
from extraction.config.traits import load_trait
from extraction.model.loading import read_config
from extraction.storage.experiment_dir import capture_sets
from extraction.storage.token_captures import CaptureSet
from extraction.storage.trait_run import trait_run

MODEL, EXPERIMENT, METHOD = "pocket", "studies", "mean_diff"
MAX_NEW_TOKENS = 50
LAYER = 3  # of tier 3
TIER_2 = {  # trait: its prompt file
    "uncertainty_calibration": "prompts_uncertainty.txt",
    "commitment_strength": "prompts_commitment.txt",
    "cognitive_load": "prompts_cognitive.txt",
    "sycophancy": "prompts_sycophancy.txt",
}
TIER_3 = {
    "uncertainty_calibration": "prompts_tier3_uncertainty.txt",
    "cognitive_load": "prompts_tier3_cognitive.txt",
}
SIDES = {
    "batched": "a load a tier, prompts in batches",
    "serial": "a load a tier, one prompt at a time",
    "reloading": "a load a prompt",
}
MANY_TRAITS = 8
Command = tuple[str, ...]


def captures(
    *,
    repeats: int,
    threads: int,
    say: Callable[[str], None],
    n_prompts: int = 100,
    most: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict[str, Any]:
    """Compare the three ways, greedy, and measure peak memory by number of traits. `most` limits a file's prompts."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        place_vectors(root, trained_traits(find_root())[:MANY_TRAITS], TIER_2)
        common = common_options(root, threads, max_new_tokens)
        return {
            "model": MODEL,
            "max_new_tokens": max_new_tokens,
            "repeats": repeats,
            **race(root, common, repeats, say, most),
            "memory": peak_memory(root, common, n_prompts, say),
        }


def place_vectors(root: Path, *names: Sequence[str] | Mapping[str, str]) -> None:
    """Write random vectors at every layer, as imported runs; their direction does not matter here."""
    config = read_config(resolve_model(MODEL, find_root(), {}))
    shape = (int(config.num_hidden_layers), int(config.hidden_size))
    generator = torch.Generator().manual_seed(0)
    for name in sorted({name for each in names for name in each}):
        run = trait_run(root / "experiments", EXPERIMENT, name)
        header = {"trait": name, "model": MODEL, "method": METHOD, "layers": list(range(shape[0]))}
        with run.lock():
            run.open({"imported": name})
            run.write_vectors(METHOD, {"direction": torch.randn(shape, generator=generator)}, header)


def common_options(root: Path, threads: int, max_new_tokens: int) -> Command:
    """Return the options of all commands; greedy, so that all ways capture the same."""
    options = {
        "--experiment": EXPERIMENT,
        "--root": str(root),
        "--model": MODEL,
        "--method": METHOD,
        "--temperature": "0",
        "--max-new-tokens": str(max_new_tokens),
        "--self-check": "0",
        "--threads": str(threads),
    }
    return tuple(word for pair in options.items() for word in pair)


# --- the race -------------------------------------------------------------------------------------------------------


def race(
    root: Path, common: Command, repeats: int, say: Callable[[str], None], most: int | None = None
) -> dict[str, Any]:
    """Run the three ways in turn, each from nothing, and count the answers that are equal token for token."""
    files = {name: _cut(name, root, most) for name in {*TIER_2.values(), *TIER_3.values()}}
    commands = {side: make(files) for side, make in MAKERS.items()}
    rounds: list[dict[str, tuple[float, dict[str, tuple[int, ...]]]]] = []
    for order in in_turn(list(commands), repeats):
        rounds.append({side: _timed(root, common, commands[side]) for side in order})
        say("  " + ", ".join(f"{side} {found[0]:.1f} s" for side, found in rounds[-1].items()))
    seconds = {side: [each[side][0] for each in rounds] for side in commands}
    answers = {side: [each[side][1] for each in rounds] for side in commands}
    return {
        "captures": len(answers["batched"][0]),
        "tokens": sum(map(len, answers["batched"][0].values())),
        "sides": {
            side: {"title": SIDES[side], "processes": len(commands[side]), **spread(seconds[side])} for side in commands
        },
        "ratios": {
            side: spread([slow / quick for slow, quick in zip(seconds[side], seconds["batched"], strict=True)])
            for side in ("serial", "reloading")
        },
        "equal": {side: _equal(each, answers["reloading"][0]) for side, each in answers.items()},
    }


def _together(files: Mapping[str, Path]) -> list[Command]:
    """Return a command a tier, with all its traits and prompt files."""
    return [
        ("read", "--traits", ",".join(TIER_2), *_named(files, TIER_2)),
        ("internals", "--layer", str(LAYER), "--traits", ",".join(TIER_3), *_named(files, TIER_3)),
    ]


def _named(files: Mapping[str, Path], tier: Mapping[str, str]) -> Iterator[str]:
    for name in tier.values():
        yield from ("--prompts-file", str(files[name]))


def _one_by_one(files: Mapping[str, Path]) -> list[Command]:
    """Return the same commands with one prompt at a time."""
    return [(*command, "--batch-size", "1") for command in _together(files)]


def _reloading(files: Mapping[str, Path]) -> list[Command]:
    """Return a command a prompt, with its own trait."""
    tiers: list[tuple[Command, dict[str, str]]] = [(("read",), TIER_2), (("internals", "--layer", str(LAYER)), TIER_3)]
    return [
        (*command, "--traits", trait, "--prompts", asked.prompt)
        for command, tier in tiers
        for trait, name in tier.items()
        for asked in read_prompt_set(str(files[name])).prompts
    ]


MAKERS = {"batched": _together, "serial": _one_by_one, "reloading": _reloading}


def _timed(root: Path, common: Command, commands: Sequence[Command]) -> tuple[float, dict[str, tuple[int, ...]]]:
    """Run all commands; return their seconds and the answers' tokens by tier and prompt."""
    with _afresh(root):
        started = time.perf_counter()
        for command in commands:
            run_measured([*command, *common], root)
        seconds = time.perf_counter() - started
        return seconds, {key: ids for each in _sets(root) for key, ids in _answers(each).items()}


def _answers(folder: CaptureSet) -> dict[str, tuple[int, ...]]:
    headers = [folder.prompt_header(id) for id in folder.prompt_ids()]
    return {f"{h['tier']}: {h['prompt']}": tuple(h["token_ids"][h["n_prompt"] :]) for h in headers}


def _equal(each: Sequence[Mapping[str, Any]], reference: Mapping[str, Any]) -> list[int]:
    """Return the number of answers equal to those of a load a prompt, in the worst round, and their total."""
    return [min(sum(found.get(key) == said for key, said in reference.items()) for found in each), len(reference)]


def _cut(name: str, root: Path, most: int | None) -> Path:
    """Return the shipped prompt file, or a copy with its first prompts."""
    path = find_root() / "configs" / "prompts" / name
    if most is None:
        return path
    short = root / name
    short.write_text("".join(f"{asked.prompt}\n" for asked in read_prompt_set(str(path)).prompts[:most]))
    return short


def _sets(root: Path) -> list[CaptureSet]:
    return list(capture_sets(root / "experiments", EXPERIMENT))


@contextmanager
def _afresh(root: Path) -> Iterator[None]:
    """Delete the captures after the block."""
    try:
        yield
    finally:
        for found in _sets(root):
            shutil.rmtree(found.path)


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_memory(root: Path, common: Command, n_prompts: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the peak memory of one command over `n_prompts` prompts at all layers, by number of traits."""
    names = trained_traits(find_root())[:MANY_TRAITS]
    path = root / "many.txt"
    path.write_text("".join(f"{question}\n" for question in _questions(names, n_prompts)), encoding="utf-8")
    found = {}
    for n_traits in (1, MANY_TRAITS):
        for attention in (True, False):
            words = ["read", "--traits", ",".join(names[:n_traits]), "--prompts-file", str(path)]
            with _afresh(root):
                peak = run_measured([*words, *([] if attention else ["--no-attention"]), *common], root)
                (folder,) = _sets(root)
                kept = _mib_kept(folder)
            key = f"{n_traits} {'trait' if n_traits == 1 else 'traits'}{'' if attention else ', no attention'}"
            found[key] = {"peak_mib": peak, **kept}
            say(f"  {key}: {peak:.0f} MiB, {kept['projections_mib']:.1f} of them projections")
    return {"prompts": n_prompts, "cells": found}


def _questions(names: Sequence[str], n: int) -> list[str]:
    root = find_root()
    questions = list(
        dict.fromkeys(question for name in names for question in load_trait(name, root, "pocket").questions)
    )
    return [questions[i % len(questions)] for i in range(n)]


def _mib_kept(folder: CaptureSet) -> dict[str, float]:
    """Return the MiB of projections and attention in a set's files."""
    total = dict.fromkeys(("projections_mib", "attention_mib"), 0.0)
    for id in folder.prompt_ids():
        for name, tensor in folder.read_prompt(id)[0].items():
            total[f"{name.partition('.')[0]}_mib"] += tensor.nbytes / 2**20
    return total
