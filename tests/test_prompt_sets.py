"""Prompt files in every form, and what is wrong with one said by its line."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    "no known key": ("p.json", '["a", {"words": "b"}]', r"'1': .*is no prompt; .*prompt, instruction, messages"),
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


@pytest.mark.parametrize(("name", "comma"), [("p.csv", ","), ("P.TSV", "\t")])
def test_a_table_is_read_by_its_column_and_never_by_lines(tmp_path: Path, name: str, comma: str) -> None:
    asked = f'Why{comma} "you"?\nReally?'
    rows = [["id", "Question", "system"], ["1", asked, ""], ["", "", ""], ["2", "Who?", "Go."]]
    file = tmp_path / name
    with file.open("w", newline="", encoding="utf-8-sig") as out:
        csv.writer(out, delimiter=comma).writerows(rows)
    found = read_prompt_set(file)
    assert list(found.prompts) == [PromptEntry(asked), PromptEntry("Who?", "Go.")]
    assert found.skipped_blank == 1
    only = written(tmp_path, "only.csv", "anything\nOne\nTwo\n")
    assert [entry.prompt for entry in read_prompt_set(only).prompts] == ["One", "Two"]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("id,words\n1,a\n", "p.csv:1: .*words"),
        ("id,prompt\n1,a\n2,b,c\n", "p.csv:3: 3 "),
        ('prompt\n"a\n', "p.csv:"),
        ("id,prompt\n1, \n", "p.csv:2"),
        ("prompt\n", "p.csv: no prompt"),
        ("", "p.csv:1"),
    ],
)
def test_a_bad_table_is_refused_with_its_line(tmp_path: Path, content: str, place: str) -> None:
    with pytest.raises(TraitError, match=place) as caught:
        read_prompt_set(written(tmp_path, "p.csv", content))
    assert "\n" not in str(caught.value)


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6))
def test_prompts_survive_a_table(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    file = tmp_path_factory.mktemp("table") / "p.csv"
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("prompt", "system"), *rows])
    assert [(entry.prompt, entry.system) for entry in read_prompt_set(file).prompts] == rows


@pytest.mark.parametrize("key", ["question", "text"])
def test_a_prompt_may_be_called_a_question_or_a_text(tmp_path: Path, key: str) -> None:
    file = written(tmp_path, "p.jsonl", json.dumps({key: "Why?", "system": "Go.", "answer": "x"}) + "\n")
    assert list(read_prompt_set(file).prompts) == [PromptEntry("Why?", "Go.")]
