"""Prompt files in every form, and what is wrong with one said by its line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from extraction.config.prompt_files import PromptEntry, read_prompt_set
from extraction.core.errors import TraitError

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
]
ENTRIES = [
    ("Hello", PromptEntry("Hello")),
    ({"prompt": "Hello", "id": 7}, PromptEntry("Hello")),
    ({"prompt": "Hello", "system": "Be brief."}, PromptEntry("Hello", "Be brief.")),
    ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, PromptEntry("Add.\n\n1 and 2")),
    ({"instruction": "Sing.", "input": ""}, PromptEntry("Sing.")),
    ({"messages": CONVERSATION}, PromptEntry("Hello", "Be brief.")),
    ({"messages": CONVERSATION[1:2]}, PromptEntry("Hello")),
]


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_prompt_a_line(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbfOne\r\n\r\n  \nTwo \xe2\x80\xa8 still two\nOne\n[not JSON"
    found = read_prompt_set(written(tmp_path, "prompts.txt", content))
    assert [asked.prompt for asked in found.prompts] == ["One", "Two \u2028 still two", "One", "[not JSON"]
    assert (found.skipped_blank, found.n_duplicates) == (2, 1)


@pytest.mark.parametrize("name", ["prompts.jsonl", "PROMPTS.JSONL", "prompts.ndjson"])
def test_an_object_a_line(tmp_path: Path, name: str) -> None:
    lines = "\ufeff" + "\r\n\n".join(json.dumps(entry) for entry, _ in ENTRIES) + "\n"
    found = read_prompt_set(written(tmp_path, name, lines))
    assert list(found.prompts) == [asked for _, asked in ENTRIES]
    assert found.skipped_blank == len(ENTRIES) - 1


def test_a_list(tmp_path: Path) -> None:
    found = read_prompt_set(written(tmp_path, "prompts.json", "\ufeff" + json.dumps([entry for entry, _ in ENTRIES])))
    assert list(found.prompts) == [asked for _, asked in ENTRIES]


BROKEN: dict[str, tuple[str, str | bytes, str]] = {
    "empty text": ("p.txt", "", "no prompt"),
    "blank text": ("p.txt", "\n \n", "no prompt"),
    "empty lines": ("p.jsonl", "\n\n", "no prompt"),
    "empty list": ("p.json", "[]", "no prompt"),
    "NUL": ("p.txt", "a\nb\0c\n", "p.txt:2: holds a NUL"),
    "invalid UTF-8": ("p.txt", b"good\nb\xff\n", r"p.txt:2: invalid UTF-8 at byte 6"),
    "invalid UTF-8 in JSON": ("p.json", b'["\xff"]', "invalid UTF-8 at byte 2"),
    "no JSON in a line": ("p.jsonl", '"a"\nhello\n', "p.jsonl:2: not JSON"),
    "no JSON": ("p.json", "[1", "not JSON"),
    "an object": ("p.json", '{"prompt": "a"}', "not a list"),
    "a number": ("p.jsonl", "3\n", "p.jsonl:1: 3 is no prompt"),
    "no known key": ("p.json", '["a", {"text": "b"}]', r"'1': .*is no prompt; .*prompt, instruction, messages"),
    "prompt is a number": ("p.jsonl", '{"prompt": 3}', "'prompt': 3 is not text"),
    "blank prompt": ("p.jsonl", '{"prompt": " "}', "empty"),
    "surrogate": ("p.jsonl", '{"prompt": "\\ud800"}', "no text"),
    "NUL in JSON": ("p.jsonl", '{"prompt": "a\\u0000"}', "no text"),
    "two turns": ("p.json", json.dumps([{"messages": CONVERSATION + CONVERSATION[1:2]}]), "roles are"),
    "no turns": ("p.json", '[{"messages": []}]', "roles are"),
    "turns of numbers": ("p.json", '[{"messages": [1]}]', "no list of messages"),
    "turn without content": ("p.json", '[{"messages": [{"role": "user"}]}]', "messages.0.content"),
    "deep": ("p.json", "[" * 100_000, "not JSON"),
    "a long line": ("p.txt", "x" * 1_100_000, "p.txt:1: a line of more than"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    name, content, pattern = BROKEN[case]
    with pytest.raises(TraitError, match=pattern) as caught:
        read_prompt_set(written(tmp_path, name, content))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl"])
def test_only_regular_files_are_opened(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    (tmp_path / f"folder.{suffix}").mkdir()
    for name, word in (("pipe", "pipe"), ("folder", "folder"), ("absent", "no such file")):
        with pytest.raises(TraitError, match=word):
            read_prompt_set(tmp_path / f"{name}.{suffix}")
