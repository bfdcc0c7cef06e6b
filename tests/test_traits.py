"""Traits: validation of files, and the examples that are made from a trait."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extraction.config import experiments
from extraction.config.traits import (
    list_traits,
    load_trait,
    load_trait_sets,
    make_examples,
    parse_trait_list,
    trait_fingerprint,
    trait_from_yaml,
    trait_notes,
)
from extraction.core.errors import TraitError
from extraction.core.records import InstructionPair, NaturalPrompt, Trait

SHIPPED = Path(experiments.__file__).resolve().parent.parent

GOOD = {
    "name": "t",
    "description": "A trait.",
    "instructions": [{"positive": "Be warm.", "negative": "Be cold."}, {"positive": "Smile.", "negative": "Frown."}],
    "questions": ["How are you?", "What is rain?", "Why?"],
    "rubric": "Rate {answer} to {question} from 0 to 100, or REFUSAL.",
    "markers": {"positive": ["dear", "re:\\bkind\\w*"], "negative": ["whatever"]},
}
NATURAL = {
    "name": "t",
    "description": "A trait.",
    "positive_prompts": ["What a day!", {"prompt": "Go on.", "system": "Be glad."}, "Third."],
    "negative_prompts": ["Oh no.", "Go on."],
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "configs/traits").mkdir(parents=True)
    monkeypatch.setattr(experiments, "PACKAGE", tmp_path / "elsewhere" / "extraction")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_trait(root, data, name="t"):
    """Write a trait file, one top-level key a line (JSON is YAML)."""
    text = data if isinstance(data, str) else "".join(f"{key}: {json.dumps(value)}\n" for key, value in data.items())
    (root / "configs/traits" / f"{name}.yaml").write_text(text, encoding="utf-8")
    return name


def refusal(call, *args):
    with pytest.raises(TraitError) as caught:
        call(*args)
    message = str(caught.value)
    assert message.isprintable(), message
    return message


def instructed(n_pairs, n_questions):
    pairs = tuple(InstructionPair(f"do {i}", f"don't {i}") for i in range(n_pairs))
    return Trait(name="t", description="d", instructions=pairs, questions=tuple(f"q {i}?" for i in range(n_questions)))


def natural(n_positive, n_negative):
    positive, negative = (
        tuple(NaturalPrompt(f"{side} {i}") for i in range(n)) for side, n in (("good", n_positive), ("bad", n_negative))
    )
    return Trait(name="t", description="d", positive_prompts=positive, negative_prompts=negative)


# --- reading --------------------------------------------------------------------------------------------------------


def test_an_instructed_trait_reads_as_written(root):
    trait = load_trait(write_trait(root, GOOD), root)
    assert trait.instructions[1] == InstructionPair("Smile.", "Frown.")
    assert trait.questions == ("How are you?", "What is rain?", "Why?")
    assert trait.markers is not None
    assert trait.markers.positive == ("dear", "re:\\bkind\\w*")
    assert not trait.is_natural
    assert list_traits(root) == ("t",)


def test_a_natural_trait_reads_as_written(root):
    trait = load_trait(write_trait(root, NATURAL), root)
    assert trait.is_natural
    assert trait.positive_prompts[1] == NaturalPrompt("Go on.", "Be glad.")
    assert trait.negative_prompts[1] == NaturalPrompt("Go on.")


def test_block_scalars_are_read_without_their_last_line_end(root):
    write_trait(
        root,
        "name: t\ndescription: >\n  folded\n  text\ninstructions:\n  - positive: |\n      one\n      two\n"
        "    negative: three\nquestions: [no]\n",
    )
    trait = load_trait("t", root)
    assert (trait.description, trait.instructions[0].positive, trait.questions) == ("folded text", "one\ntwo", ("no",))


BAD_TRAITS = {
    "no positive prompts": (NATURAL | {"positive_prompts": []}, "'positive'"),
    "no negative prompts": (NATURAL | {"negative_prompts": []}, "'negative'"),
    "negative prompts null": (NATURAL | {"negative_prompts": None}, "'negative'"),
    "negative instructions absent": (GOOD | {"instructions": [{"positive": "x"}]}, "'negative'"),
    "one instruction empty": (
        GOOD | {"instructions": [{"positive": "x", "negative": "y"}, {"positive": "z", "negative": " "}]},
        "t.yaml:3: 'instructions.1.negative': ' '",
    ),
    "one instruction absent": (
        GOOD | {"instructions": [{"positive": "x", "negative": "y"}, {"positive": "z"}]},
        "'negative' is missing",
    ),
    "no instructions": (GOOD | {"instructions": []}, "0 instructions"),
    "no questions": (GOOD | {"questions": []}, "0 questions"),
    "nothing at all": ({"name": "t", "description": "d"}, "0 instructions"),
    "both kinds": (GOOD | {"positive_prompts": ["x"], "negative_prompts": ["y"]}, "positive_prompts"),
    "no name": ({key: value for key, value in GOOD.items() if key != "name"}, "'name' is missing"),
    "another name": (GOOD | {"name": "u"}, "'u'"),
    "unsafe name": (GOOD | {"name": "../t"}, "'../t': not a name"),
    "unknown key": (GOOD | {"question": ["x"]}, "'questions'"),
    "foreign pair": (GOOD | {"instructions": [{"pos": "x", "neg": "y"}]}, "prompts"),
    "questions is text": (GOOD | {"questions": "Why?"}, "'Why?' is not a list"),
    "a question is true": (GOOD | {"questions": [True]}, "True"),
    "a question is a number": (GOOD | {"questions": [5]}, ": 5 "),
    "question twice": (GOOD | {"questions": ["Why?", "How?", "why? "]}, "'questions.2': 'why?'"),
    "question twice in Unicode": (GOOD | {"questions": ["caf\u00e9?", "cafe\u0301?"]}, "'questions.1'"),
    "instruction twice": (
        GOOD | {"instructions": [{"positive": "x", "negative": "y"}, {"positive": "X", "negative": "z"}]},
        "'instructions.1.positive': 'X'",
    ),
    "same instruction on both sides": (
        GOOD | {"instructions": [{"positive": "x", "negative": "X "}]},
        "'instructions.0': 'x'",
    ),
    "same prompt on both sides": (NATURAL | {"negative_prompts": ["What a day!"]}, "What a day!"),
    "prompt twice": (NATURAL | {"negative_prompts": ["x", "x"]}, "'x'"),
    "prompt with an unknown key": (NATURAL | {"negative_prompts": [{"text": "x"}]}, "known: prompt, system"),
    "rubric without answer": (GOOD | {"rubric": "Rate {question}."}, "{answer}"),
    "rubric without question": (GOOD | {"rubric": "Rate {answer}."}, "{question}"),
    "marker on both sides": (
        GOOD | {"markers": {"positive": ["ab", "Perhaps"], "negative": ["perhaps"]}},
        "'markers.negative.0': 'perhaps'",
    ),
    "marker met by the other side's pattern": (
        GOOD | {"markers": {"positive": ["re:perhaps|maybe"], "negative": ["Maybe"]}},
        "'Maybe'",
    ),
    "marker twice": (GOOD | {"markers": {"positive": ["x", "X"], "negative": []}}, "'markers.positive.1'"),
    "pattern that may never end": (
        GOOD | {"markers": {"positive": ["ok", "re:(a+)+$"], "negative": []}},
        "t.yaml:6: 'markers.positive.1': '(a+)+$'",
    ),
    "bad pattern": (GOOD | {"markers": {"positive": ["re:(x"], "negative": []}}, "'(x'"),
    "pattern of nothing": (GOOD | {"markers": {"positive": ["re:x*"], "negative": []}}, "'x*'"),
    "no markers": (GOOD | {"markers": {"positive": [], "negative": []}}, "marker"),
    "one side of markers": (GOOD | {"markers": {"positive": ["x"]}}, "'negative' is missing"),
    "a list": ("- x\n", "is not a mapping"),
    "family with a question twice": (
        GOOD | {"questions_for": {"m": ["Why?", "why?"]}},
        "t.yaml:7: 'questions_for.m.1': 'why?'",
    ),
    "family without questions": (GOOD | {"questions_for": {"m": []}}, "t.yaml:7: 'questions_for.m': []"),
    "family with a word of the setting": (GOOD | {"questions_for": {"general": ["x"]}}, "'questions_for.general'"),
    "family with an unsafe name": (GOOD | {"questions_for": {"../m": ["x"]}}, "'../m'"),
    "families as a list": (GOOD | {"questions_for": ["x"]}, "t.yaml:7: 'questions_for': ['x']"),
    "family with equal sides": (
        GOOD | {"instructions_for": {"m": [{"positive": "x", "negative": "X"}]}},
        "t.yaml:7: 'instructions_for.m.0': 'x'",
    ),
    "family with an instruction twice": (
        GOOD | {"instructions_for": {"m": [{"positive": c, "negative": "y"} for c in "xX"]}},
        "'instructions_for.m.1.positive': 'X'",
    ),
    "near a family's key": (GOOD | {"question_for": {"m": ["x"]}}, "'questions_for'"),
    "markers for no markers": (
        {key: value for key, value in GOOD.items() if key != "markers"} | {"markers_for": "m"},
        "t.yaml:6: 'markers_for'",
    ),
    "markers for a family twice": (GOOD | {"markers_for": ["m", "m"]}, "'markers_for.1': 'm'"),
    "markers for a number": (GOOD | {"markers_for": 3}, "'markers_for': 3"),
    "natural prompts with a family's questions": (NATURAL | {"questions_for": {"m": ["x"]}}, "'questions_for'"),
    "a family's questions alone": (
        {key: value for key, value in GOOD.items() if key != "questions"} | {"questions_for": {"m": ["x"]}},
        "0 questions",
    ),
}


@pytest.mark.parametrize(("data", "fragment"), BAD_TRAITS.values(), ids=BAD_TRAITS)
def test_a_bad_trait_is_refused(root, data, fragment):
    message = refusal(load_trait, write_trait(root, data), root)
    assert message.startswith("configs/traits/t.yaml:")
    assert fragment in message


def test_patterns_that_differ_in_case_are_two_markers(root):
    write_trait(root, GOOD | {"markers": {"positive": ["re:x\\w"], "negative": ["re:x\\W"]}})
    assert load_trait("t", root).markers is not None


def test_a_lone_surrogate_in_a_trait_is_refused_with_its_line(root):
    write_trait(root, 'name: t\ndescription: "\\ud800"\n')
    assert "t.yaml:2: '\\ud800'" in refusal(load_trait, "t", root)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "CON", "x" * 300, "a\0b", "tt"])
def test_an_unsafe_or_unknown_trait_is_refused(root, name):
    write_trait(root, GOOD)
    assert ("'t'" if name == "tt" else f"trait '{name[:3]}".replace("\0", "\\x00")) in refusal(load_trait, name, root)


def test_a_trait_list_is_read_and_a_bad_one_is_refused():
    assert parse_trait_list("a, b,c") == ("a", "b", "c")
    for bad, fragment in {
        "a,b,A": "'A'",
        "a,\uff41": "\uff41",
        "a,,b": "--traits",
        "": "--traits",
        "a,../b": "../b",
        "a,\u00e9": "\u00e9",
    }.items():
        assert fragment in refusal(parse_trait_list, bad)


def test_the_fingerprint_depends_on_every_field_and_not_on_their_order(root):
    trait = load_trait(write_trait(root, GOOD), root)
    again = load_trait(write_trait(root, dict(reversed(GOOD.items()))), root)
    assert trait_fingerprint(trait) == trait_fingerprint(again)
    changes = {
        "name": "u",
        "description": "x",
        "instructions": (),
        "questions": ("x",),
        "rubric": None,
        "markers": None,
    }
    changes |= {"positive_prompts": (NaturalPrompt("x"),), "negative_prompts": (NaturalPrompt("x"),)}
    assert changes.keys() == {field.name for field in dataclasses.fields(Trait)}
    fingerprints = {trait_fingerprint(dataclasses.replace(trait, **{key: value})) for key, value in changes.items()}
    assert len(fingerprints | {trait_fingerprint(trait)}) == len(changes) + 1


# --- families of models ---------------------------------------------------------------------------------------------

FAMILIES = GOOD | {
    "questions_for": {"m": ["Who?"]},
    "instructions_for": {"n": [{"positive": "Up.", "negative": "Down."}]},
    "markers_for": ["m", "o"],
}


def test_a_family_gets_its_own_entries_and_all_others_the_general_ones(root):
    write_trait(root, FAMILIES)
    general, m, n = (load_trait("t", root, family) for family in (None, "m", "n"))
    assert (len(general.instructions), len(general.questions), general.markers) == (2, 3, None)
    assert (m.instructions, m.questions) == (general.instructions, ("Who?",))
    assert (n.instructions, n.questions) == ((InstructionPair("Up.", "Down."),), general.questions)
    assert m.markers is not None
    assert n.markers is None
    assert load_trait("t", root, "other") == general
    data = (root / "configs/traits/t.yaml").read_bytes()
    assert [trait_from_yaml("t", data, "x", family) for family in (None, "m", "n")] == [general, m, n]


def test_markers_without_families_are_for_every_model(root):
    write_trait(root, {key: value for key, value in FAMILIES.items() if key != "markers_for"})
    assert load_trait("t", root).markers == load_trait("t", root, "n").markers is not None


def test_the_setting_chooses_questions_and_instructions_but_no_markers(root):
    sets = load_trait_sets(write_trait(root, FAMILIES), root)
    assert sets.families == ("m", "n")
    own = sets.resolve("m")
    assert sets.resolve("m", "general") == dataclasses.replace(own, questions=("How are you?", "What is rain?", "Why?"))
    assert sets.resolve(None, "m") == dataclasses.replace(own, markers=None)
    message = refusal(sets.resolve, "m", "mm")
    assert message.startswith("configs/traits/t.yaml: --questions 'mm'")
    assert "auto, general, m, n" in message


def test_a_trait_of_one_set_has_the_fingerprint_that_it_had_before_families(root):
    """With a family's questions or without: what a run's folder names is the trait that was resolved."""
    whole = load_trait(write_trait(root, FAMILIES), root, "m")
    plain = GOOD | {"questions": ["Who?"]}
    assert trait_fingerprint(load_trait(write_trait(root, plain), root)) == trait_fingerprint(whole)


# --- the bundled traits ---------------------------------------------------------------------------------------------

BUNDLED = {name: load_trait(name, SHIPPED) for name in list_traits(SHIPPED)}
FOR_POCKET = [name for name in BUNDLED if load_trait_sets(name, SHIPPED).families]
POCKET_FINGERPRINTS = (
    "a091472303a17d0267a05f00605984c5f1a0477d32a00c9a78c1f34a631e933e"  # runs of the bundled model name these
)


def plain_words(text):
    return " ".join(re.findall(r"\w+", text.casefold()))


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_trait_has_forty_questions_and_five_pairs_for_any_model(name):
    trait, sets = BUNDLED[name], load_trait_sets(name, SHIPPED)
    assert len(trait.questions) >= 40
    assert len(trait.instructions) == 5
    assert trait.rubric is not None
    assert trait.markers is None
    for pair in trait.instructions:
        assert plain_words(pair.positive) != plain_words(pair.negative)
    for field in ("instructions", "questions"):
        general, own = ({plain_words(str(x)) for x in getattr(t, field)} for t in (trait, sets.resolve("pocket")))
        assert general.isdisjoint(own) == (name in FOR_POCKET)
    assert trait_notes(trait, 100) == ()
    assert len({example.id for example in make_examples(trait, 100)}) == 200


def test_no_general_question_stands_in_two_bundled_traits():
    counts = Counter(plain_words(question) for trait in BUNDLED.values() for question in trait.questions)
    assert [question for question, count in counts.items() if count > 1] == []


def test_the_eleven_traits_for_the_bundled_model_are_those_of_earlier_runs():
    assert len(FOR_POCKET) == 11
    digests = "".join(trait_fingerprint(load_trait(name, SHIPPED, "pocket")) for name in FOR_POCKET)
    assert hashlib.sha256(digests.encode()).hexdigest() == POCKET_FINGERPRINTS


# --- examples -------------------------------------------------------------------------------------------------------


def cells(examples):
    return [(example.instruction_id, example.question_id, example.repeat) for example in examples]


def spread(values, among):
    counts = Counter(values)
    return max(counts[i] for i in range(among)) - min(counts[i] for i in range(among))


@given(st.integers(1, 7), st.integers(1, 24), st.integers(1, 120))
def test_any_number_of_examples_is_balanced(n_pairs, n_questions, n):
    """Counts of pairs and of questions differ by at most one; a cell repeats only after all cells were used."""
    examples = make_examples(instructed(n_pairs, n_questions), n)
    sides = [examples[0::2], examples[1::2]]
    assert [{example.polarity for example in side} for side in sides] == [{"pos"}, {"neg"}]
    assert cells(sides[0]) == cells(sides[1])
    assert len({example.id for example in examples}) == 2 * n
    assert spread([pair for pair, _, _ in cells(sides[0])], n_pairs) <= 1
    assert spread([question for _, question, _ in cells(sides[0])], n_questions) <= 1
    assert [repeat for _, _, repeat in cells(sides[0])] == [i // (n_pairs * n_questions) for i in range(n)]
    assert len(set(cells(sides[0]))) == n


def test_a_row_by_row_walk_is_not_balanced():
    """Negative control of the law above."""
    rows = [(i // 20, i % 20) for i in range(10)]
    assert spread([pair for pair, _ in rows], 5) > 1


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 40), st.integers(0, 40), st.booleans())
def test_more_examples_start_with_the_same_ones(one, other, n, more, is_natural):
    trait = natural(one, other) if is_natural else instructed(one, other)
    assert make_examples(trait, n + more)[: 2 * n] == make_examples(trait, n)


def test_100_examples_of_5_pairs_and_20_questions_are_every_cell_once():
    examples = make_examples(instructed(5, 20), 100)
    assert sorted(cells(examples[::2])) == [(i, q, 0) for i in range(5) for q in range(20)]
    first, twin = examples[:2]
    assert (first.id, first.system, first.question) == ("pos-i00-q000-r00", "do 0", "q 0?")
    assert (twin.id, twin.system, twin.question) == ("neg-i00-q000-r00", "don't 0", "q 0?")
    assert make_examples(instructed(5, 20), 101)[-1].id == "neg-i00-q000-r01"


def test_natural_sides_of_unequal_length_repeat_the_shorter_one_with_a_note():
    trait = natural(3, 2)
    ids = [example.id for example in make_examples(trait, 3)]
    assert ids == ["pos-n0000-r00", "neg-n0000-r00", "pos-n0001-r00", "neg-n0001-r00", "pos-n0002-r00", "neg-n0000-r01"]
    unequal, repeats = trait_notes(trait, 3)
    assert {"3", "2"} <= set(unequal.split())
    assert "2" in repeats.split()
    assert trait_notes(natural(3, 3), 3) == ()
    assert "6 " in trait_notes(instructed(2, 3), 7)[0]


def test_zero_examples_are_refused():
    assert ": 0 " in refusal(make_examples, natural(1, 1), 0)
