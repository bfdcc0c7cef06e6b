"""`traitline new`: a trait file with the texts of a model, behind a real server on loopback and of this machine."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from extraction.config.traits import load_trait
from extraction.core.errors import TraitError
from extraction.judging.trait_author import MAX_TRIES, N_QUESTIONS, read_json, write_trait
from tests.runs import REPOSITORY, contents, invoke, make_root, refused, succeed
from tests.test_openai_judge import SECRET, Reply, Scripted, refusal, served

__all__ = ["served"]  # a fixture

PAIRS = [{"positive": f"Your answers are thrifty {i}.", "negative": f"Your answers are lavish {i}."} for i in "abcde"]
ENDS = {"high": "urges to save.", "low": "urges to spend"}
NOTES = ("5 instruction pairs", *(f"{n} of 40 questions" for n in (10, 20, 30, 40)), "loading the judge", "asking ")


def part_of(prompt: str) -> str:
    return "rubric" if '"high"' in prompt else "pairs" if '"positive"' in prompt else "questions"


class Author:
    """Answers as a model that does as it should. `wrap` changes the text, `bad` the first answers to a part."""

    def __init__(self, wrap: str = "{}", bad: dict[str, list[str]] | None = None) -> None:
        self.wrap, self.bad, self.n_questions = wrap, dict(bad or {}), 0
        self.prompts: list[str] = []

    def questions(self, n: int) -> list[str]:
        self.n_questions += n
        return [f"Should I buy thing {i}?" for i in range(self.n_questions - n, self.n_questions)]

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        part = part_of(prompt)
        if self.bad.get(part):
            return self.bad[part].pop(0)
        data: Any = {"pairs": PAIRS, "rubric": ENDS}.get(part) or self.questions(10)
        return self.wrap.replace("{}", json.dumps(data))


def new(root: Path, served: Scripted, *more: object) -> tuple[object, ...]:
    options = ("--judge-model", "m", "--judge-url", served.url, "--root", root)
    return ("new", "thrift", "--description", "Urges to save.", *options, *more)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path)


def test_the_guides_command_runs(root, served, monkeypatch):
    author = Author()
    served.script = lambda text, before: Reply(author(text))
    guide = (REPOSITORY / "docs/guide.md").read_text(encoding="utf-8")
    line = re.search(r"^traitline (new .*)$", guide, re.MULTILINE)
    assert line is not None
    monkeypatch.setenv("TRAITLINE_ROOT", str(root))
    words = [served.url if word.startswith("http://") else word for word in shlex.split(line[1])]
    succeed(*words, "--judge-model", "m")
    assert len(load_trait("thrift", root).questions) == N_QUESTIONS


WRAPS = {
    "plain": "{}",
    "fenced": "Here you are:\n```json\n{}\n```\nGood luck!",
    "in a sentence": 'I thought of [1] and of {"x": 2}: {}.',
    "after thoughts": '<think>["no"] or ["yes"]</think>{}',
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_model_behind_a_server_writes_a_trait(root, served, wrap):
    author = Author(wrap)
    served.script = lambda text, before: Reply(author(text))
    result = succeed(*new(root, served))
    assert "configs/traits/thrift.yaml" in result.stdout
    trait = load_trait("thrift", root)
    assert (len(trait.instructions), len(trait.questions)) == (5, N_QUESTIONS)
    assert trait.description == "Urges to save."
    assert trait.rubric is not None
    assert "fully urges to save,\n0 means that it fully urges to spend," in trait.rubric
    assert "{question}" in trait.rubric
    assert "{answer}" in trait.rubric
    assert [part_of(text) for text in served.texts()] == ["pairs", *["questions"] * 4, "rubric"]
    assert served.keys == {f"Bearer {SECRET}"}
    assert "logprobs" not in served.asked[0]
    assert served.asked[0]["max_tokens"] > 1000


BAD = {
    "pairs": ["I can't do this.", json.dumps(PAIRS[:3])],
    "questions": ['["Should I buy thing 0?", "should I BUY thing 0?", 7, " ", "???", "' + "x" * 501 + '"]', "[]"],
    "rubric": [json.dumps({"high": "saves", "low": "Saves."}), json.dumps(["saves", "spends"])],
}


def test_a_bad_answer_is_asked_again_with_what_was_wrong_and_good_entries_stay(root, served):
    author = Author(bad={part: list(answers) for part, answers in BAD.items()})
    served.script = lambda text, before: Reply(author(text))
    succeed(*new(root, served))
    trait = load_trait("thrift", root)
    assert [pair.positive for pair in trait.instructions] == [pair["positive"] for pair in PAIRS]
    assert len(trait.questions) == N_QUESTIONS
    by_part = {part: [text for text in author.prompts if part_of(text) == part] for part in BAD}
    assert "I can't do this." in by_part["pairs"][1]
    assert "3 usable" in by_part["pairs"][2]
    assert "Write 9 questions" in by_part["questions"][1]
    assert "Should I buy thing 0?" in by_part["questions"][1]
    assert "'saves'" in by_part["rubric"][1]


ALWAYS_BAD = {
    "no JSON": ("pairs", "Sorry.", "'Sorry.'"),
    "empty": ("pairs", "", "0 of 5"),
    "equal sides": ("pairs", json.dumps([{"positive": "Save.", "negative": "save."}] * 5), "'Save.'"),
    "other keys": ("pairs", json.dumps([{"pos": "x", "neg": "y"}] * 5), "'positive' and 'negative'"),
    "the same question": ("questions", json.dumps(["Why save?"] * 10), "1 of 40"),
    "an object": ("questions", json.dumps({"a": ["x?"], "b": ["y?"]}), "0 of 40"),
    "a brace": ("rubric", json.dumps({"high": "{answer}", "low": "spends"}), "brace"),
}


@pytest.mark.parametrize(("part", "answer", "fragment"), ALWAYS_BAD.values(), ids=ALWAYS_BAD)
def test_a_model_that_can_not_do_it_is_refused_in_one_line_and_nothing_is_written(root, served, part, answer, fragment):
    author = Author(bad={part: [answer] * 10})
    served.script = lambda text, before: Reply(author(text))
    before = contents(root)
    line = refused(*new(root, served), notes=NOTES)
    assert fragment in line
    assert "thrift" in line
    assert contents(root) == before
    assert sum(part_of(text) == part for text in author.prompts) == MAX_TRIES


def test_a_model_that_gives_few_questions_at_a_time_is_asked_until_there_are_forty():
    author = Author()
    author.questions = lambda n, take=author.questions: take(5)  # type: ignore[method-assign]
    fields = write_trait(author, "thrift", "Urges to save.")
    assert len(set(fields["questions"])) == N_QUESTIONS
    assert sum(part_of(text) == "questions" for text in author.prompts) == 8


def test_an_existing_file_is_kept_without_overwrite(root, served):
    path = root / "configs/traits/thrift.yaml"
    path.write_text("mine\n")
    author = Author()
    served.script = lambda text, before: Reply(author(text))
    assert "thrift.yaml" in (line := refused(*new(root, served)))
    assert "--overwrite" in line
    assert (path.read_text(), served.asked) == ("mine\n", [])
    succeed(*new(root, served, "--overwrite"))
    assert len(load_trait("thrift", root).questions) == N_QUESTIONS


def test_wrong_options_are_refused_before_anything_is_asked(root, served, monkeypatch):
    common = ("new", "thrift", "--root", root)
    assert "--judge-model" in refused(*common, "--description", "x")
    assert "--description ' '" in refused(*common, "--description", " ", "--judge-url", served.url)
    assert "ftp://x" in refused(*common, "--description", "x", "--judge-url", "ftp://x")
    assert "'../x'" in refused("new", "../x", "--root", root, "--description", "x", "--judge-url", served.url)
    assert "nosuch" in refused(*common, "--description", "x", "--judge-model", "nosuch")
    assert not served.asked


def test_the_model_of_a_server_is_its_only_one_and_else_must_be_named(root, served):
    author = Author()
    served.script = lambda text, before: Reply(author(text))
    without = ("new", "thrift", "--description", "x", "--judge-url", served.url, "--root", root)
    for served.models in ([], ["one", "two"]):
        line = refused(*without)
        for fragment in ("--judge-model", served.url, *served.models):
            assert fragment in line
    served.models = ["only"]
    succeed(*without)
    assert {request["model"] for request in served.asked} == {"only"}


def test_a_server_that_refuses_is_refused_without_the_key(root, served):
    served.script = lambda text, before: refusal(401, f"bad key {SECRET}")
    result = invoke(*new(root, served))
    assert result.exit_code == 2
    assert "401" in result.stderr
    assert SECRET not in result.output
    assert not (root / "configs/traits/thrift.yaml").exists()


def test_a_limit_of_tokens_that_a_server_calls_otherwise_is_kept(root, served):
    author = Author()

    def script(text: str, before: int) -> Reply:
        if "max_tokens" in served.next:
            return refusal(400, "Unsupported parameter: 'max_tokens'")
        return Reply(author(text))

    served.script = script
    succeed(*new(root, served))
    assert served.asked[-1]["max_completion_tokens"] > 1000


def test_a_local_model_that_can_not_do_it_is_refused_in_one_line(root):
    options = ("--description", "Urges to save.", "--root", root)
    line = refused("new", "thrift", *options, "--judge-model", "pocket", notes=NOTES)
    assert "thrift" in line
    assert "0 of 5" in line
    assert "512" in refused("new", "thrift", *options, "--judge-model", "tiny", notes=NOTES)  # positions
    assert not (root / "configs/traits/thrift.yaml").exists()


@pytest.mark.parametrize("text", ["", "no", "[", '["a', "]["])
def test_no_json_is_no_answer(text):
    with pytest.raises(Exception, match=r"JSON|empty"):
        read_json(text)


def test_a_model_that_fails_three_times_raises_with_the_count():
    with pytest.raises(TraitError, match="0 of 5"):
        write_trait(lambda prompt: "[]", "thrift", "x")
