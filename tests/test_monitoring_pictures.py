"""Pictures of a capture set: any text and any numbers, without a warning, and reproducible bytes."""

from __future__ import annotations

import struct
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extraction.core.errors import MissingPackage
from extraction.monitoring.colour_scale import colour_scales
from extraction.monitoring.pictures import RETURN, cells, drawable, overview_picture, reading_picture, wrap_tokens
from extraction.report import plot_style
from extraction.report.rendering import visible
from tests.readings import make_set
from tests.test_monitoring_page import ODD
from tests.test_report import EVIL

pytest.importorskip("matplotlib")

STRANGE = [
    *EVIL,
    "\u4f60\u597d",
    "\U0001f469\u200d\U0001f469",
    " $x^2$ and $\\frac$",
    "\u0645\u0631\u062d\u0628\u0627",
    "e\u0301",
    "\t\n\n",
    "x" * 500,
]


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG")
    return struct.unpack(">II", png[16:24])


@pytest.fixture(autouse=True)
def full_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures in the resolution that users get; other tests draw coarse ones."""
    monkeypatch.setattr(plot_style, "DPI", 200)


@pytest.mark.parametrize(("n_prompts", "n_layers", "layer"), [(1, 1, 0), (3, 26, 25), (60, 4, 2)])
def test_any_text_makes_pictures_without_a_warning(n_prompts, n_layers, layer):
    facts = make_set(n_prompts, 60, n_layers, 2, texts=STRANGE)
    facts = replace(facts, title=EVIL[2], name="$\\bad$", readings=[replace(r, prompt=EVIL[3]) for r in facts.readings])
    for trait in (0, 1):
        assert size_of(reading_picture(facts, facts.readings[-1], trait, layer))[0] == 1920
        assert size_of(overview_picture(facts, trait, layer))[0] == 1920


@pytest.mark.parametrize("name", ODD)
def test_any_reading_makes_pictures(name):
    facts = make_set(1, 20, 3, 1, readings=[ODD[name]])
    assert size_of(reading_picture(facts, ODD[name], 0, 1))[0] == 1920
    assert size_of(overview_picture(facts, 0, 1))[0] == 1920


def test_an_empty_set_makes_an_overview():
    assert overview_picture(make_set(0, 20, 3, 1), 0, 1)


def test_pictures_are_the_same_again_and_follow_trait_and_layer():
    facts = make_set(3, 40, 6, 2)
    scales, reading = colour_scales(facts), facts.readings[1]
    first = reading_picture(facts, reading, 0, 3)
    assert reading_picture(facts, reading, 0, 3, scales=scales) == first
    assert b"tIME" not in first
    others = [
        reading_picture(facts, reading, 1, 3),
        reading_picture(facts, reading, 0, 2),
        overview_picture(facts, 0, 3),
    ]
    assert len({first, *others}) == 4


def test_a_picture_grows_with_its_text_and_a_very_long_one_is_cut():
    facts = make_set(2, 900, 2, 1)
    heights = [size_of(reading_picture(facts, make_set(1, n, 2, 1).readings[0], 0, 0))[1] for n in (40, 300, 900)]
    assert heights == sorted(set(heights))
    lines = replace(facts.readings[0], pieces=["\n"] * 900, tokens=["\n"] * 900)
    assert size_of(reading_picture(facts, lines, 0, 0))[1] < 8000


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    facts = make_set(1, 20, 2, 1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match="pip install"):
        reading_picture(facts, facts.readings[0], 0, 0)
    with pytest.raises(MissingPackage, match="pip install"):
        overview_picture(facts, 0, 0)


@given(st.lists(st.text(alphabet="ab \n\t\u0301\u4f60", max_size=30), max_size=20), st.integers(4, 30))
def test_lines_hold_every_token_and_nothing_overlaps(pieces, columns):
    runs = wrap_tokens(pieces, ["<t>"] * len(pieces), columns)
    for token, piece in enumerate(pieces):
        said = "".join(run.text for run in runs if run.token == token)
        expected = (visible(piece) or "<t>").replace("\t", "    ")
        assert said.replace(RETURN, "\n") == expected
    for one, other in pairwise(runs):
        assert (other.line, other.column) >= (one.line, one.column + one.width if other.line == one.line else 0)
    assert all(run.width == cells(run.text) and run.column + run.width <= columns for run in runs)


def test_a_character_that_the_font_lacks_is_a_box():
    assert drawable("a\u4f60b", lambda character: character.isascii()) == "a\u25a1b"
