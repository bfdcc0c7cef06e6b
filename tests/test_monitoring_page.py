"""The page of a capture set: self-contained, inert, true to the numbers, and usable in a real browser."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from extraction.core.records import POINTS
from extraction.monitoring import quantize
from extraction.monitoring.colour_scale import COLOURS, colour_scales
from extraction.monitoring.dynamics import SUMMARY
from extraction.monitoring.page import SetRow, set_page, sets_index
from extraction.monitoring.quantize import choose_plan, pack, spaced_layers
from extraction.monitoring.summary_table import BINS, FIGURES, bars, binned, figure_text, number
from tests.chromium import Browser, assert_foreign_content_is_blocked, needs_browser
from tests.readings import make_set
from tests.test_report import EVIL, Outline, hashed, policy_of

LAYERS, TOKENS, PROMPTS = 6, 60, 24


@pytest.fixture(scope="module")
def facts():
    return make_set(PROMPTS, TOKENS, LAYERS, 2, texts=EVIL)


@pytest.fixture(scope="module")
def page(facts) -> bytes:
    return set_page(facts)


def block_of(page: bytes, name: str):
    """A block of data in a page."""
    found = [body for _, attributes, body in Outline(page).blocks if attributes.get("id") == name]
    return json.loads(found[0])


def unpacked(block, bits: int, n_tokens: int) -> np.ndarray:
    """Return a block as the page's script decodes it: [J, T]."""
    codes = np.frombuffer(base64.b64decode(block["codes"]), dtype="<u2" if bits == 16 else "u1").reshape(-1, n_tokens)
    values = np.array(block["low"])[:, None] + codes * np.array(block["step"])[:, None]
    for place, value in block["far"]:
        values.flat[place] = np.nan if value is None else value
    return values


# --- the numbers ----------------------------------------------------------------------------------------------------


def a_trajectory(n_tokens: int = 50) -> np.ndarray:
    """[T, L, P] around 100, with a token 0 of 5000."""
    x_TLP = 100 + np.random.default_rng(3).normal(0, 1, (n_tokens, 4, 3))
    x_TLP[0] = 5000
    return x_TLP.astype(np.float32)


@pytest.mark.parametrize(("bits", "most"), [(16, 1e-4), (8, 2e-2)])
def test_packed_values_are_the_values_to_within_the_error(bits, most):
    x_TLP = a_trajectory()
    x_TLP[7, 1, 2] = np.nan
    packed = pack(x_TLP, bits)
    found_LPT = unpacked(packed.block, bits, 50).reshape(3, 4, 50).swapaxes(0, 1)
    expected_LPT = np.moveaxis(x_TLP, 0, -1)
    off = np.abs(found_LPT - expected_LPT)
    assert np.isnan(off).sum() == np.isnan(found_LPT).sum() == 1
    assert 0 < np.nanmax(off) <= packed.error * 1.001 < most
    assert (found_LPT[..., 0] == 5000).all()


def test_a_huge_token_would_spoil_the_steps_if_it_were_not_kept_apart(monkeypatch):
    near = pack(a_trajectory(), 16).error
    monkeypatch.setattr(quantize, "MAX_OUTLIERS", 0)
    assert pack(a_trajectory(), 16).error > 300 * near


@pytest.mark.parametrize(
    "values", [np.zeros((5, 2, 3)), np.zeros((0, 2, 3)), np.full((5, 2, 3), np.inf), np.ones((1, 1, 3))]
)
def test_any_values_are_packed(values):
    packed = pack(values.astype(np.float32), 16)
    found = unpacked(packed.block, 16, len(values)) if len(values) else np.zeros((6, 0))
    expected = np.moveaxis(values, 0, -1).swapaxes(0, 1).reshape(found.shape)
    assert np.array_equal(found, np.where(np.isfinite(expected), expected, np.nan), equal_nan=True)
    json.dumps(packed.block, allow_nan=False)


def test_a_large_set_leaves_out_points_then_bits_then_layers():
    facts = make_set(4, 40, 12, 2)
    sizes = [quantize.MAX_BYTES, 30_000, 12_000, 6_000, 10]
    plans = [choose_plan(facts, size) for size in sizes]
    assert [(len(plan.layers), len(plan.points), plan.bits) for plan in plans[:3]] == [
        (12, 3, 16),
        (12, 1, 16),
        (12, 1, 8),
    ]
    assert [len(plan.layers) for plan in plans[3:]] == sorted({len(plan.layers) for plan in plans[3:]}, reverse=True)
    assert all(6 in plan.layers for plan in plans)
    assert [plan.points for plan in plans[1:]] == [(2,)] * 4
    assert spaced_layers(facts, 3) == (0, 6, 11)
    pages = [set_page(facts, max_bytes=size) for size in sizes]
    assert sorted(map(len, pages), reverse=True) == list(map(len, pages))
    texts = [Outline(page).text for page in pages]
    notes = [re.search(r"to within .*", text)[0] for text in texts]
    held = ("residual_out", "8 bits", "layers 0 and 6")
    assert [[word in note for word in held] for note in notes] == [
        [False, False, False],
        [True, False, False],
        [True, True, False],
        [True, True, False],
        [True, True, True],
    ]


def test_the_budget_is_of_bytes():
    facts = make_set(6, 80, 10, 2)
    size = 150_000
    plan, page = choose_plan(facts, size), set_page(facts, max_bytes=size)
    assert plan.bits == 16
    held = sum(len(body) for _, a, body in Outline(page).blocks if str(a.get("id", "")).startswith("values-"))
    assert 0.6 * size < held <= size


def test_the_middle_is_between_the_levels_or_the_median_of_the_responses():
    facts = make_set(5, 40, 6, 2)
    scales = colour_scales(facts)
    levels_L2 = facts.traits[0].levels_L2
    rows_NLPK = np.concatenate([r.projections_TLPK[r.n_prompt :] for r in facts.readings])
    medians_KLP = np.moveaxis(np.median(rows_NLPK, axis=0), -1, 0)
    known = np.arange(6) != 1
    assert np.allclose(scales.centre_KLP[0, known, 2], levels_L2[known].mean(1))
    assert np.allclose(scales.centre_KLP[0, 1, 2], medians_KLP[0, 1, 2])
    assert np.allclose(scales.centre_KLP[0, :, :2], medians_KLP[0, :, :2])
    assert np.allclose(scales.centre_KLP[1], medians_KLP[1])
    assert (scales.half_KLP[0, known, 2] >= (levels_L2[known, 1] - levels_L2[known, 0]) / 2 - 1e-9).all()


def test_a_huge_token_0_does_not_flatten_the_scale():
    facts = make_set(5, 40, 6, 1)
    before = colour_scales(facts)
    for reading in facts.readings:
        reading.projections_TLPK[0] = 1e6
    assert np.array_equal(colour_scales(facts).half_KLP, before.half_KLP)
    facts.readings[0].projections_TLPK[-1] = 1e3  # one response token in a hundred
    assert (colour_scales(facts).half_KLP < 2 * before.half_KLP).all()
    for reading in facts.readings:
        reading.projections_TLPK[-4:] = 1e3  # the control: a tenth of all tokens counts
    assert (colour_scales(facts).half_KLP > 50 * before.half_KLP).all()


def test_a_set_of_very_many_tokens_is_sampled(monkeypatch):
    facts = make_set(6, 60, 4, 1)
    whole = colour_scales(facts)
    monkeypatch.setattr("extraction.monitoring.colour_scale.MAX_TOKENS", 100)
    assert np.abs(colour_scales(facts).half_KLP / whole.half_KLP - 1).max() < 0.25


def test_bars_are_means_of_equal_parts():
    assert np.array_equal(binned(np.arange(2.0 * BINS)[:, None])[:, 0], np.arange(BINS) * 2 + 0.5)
    assert np.array_equal(binned(np.array([[1.0], [3.0]]))[[0, -1], 0], [1.0, 3.0])
    facts = make_set(3, 40, 4, 1)
    facts = replace(facts, readings=[*facts.readings, replace(facts.readings[0], n_prompt=40)])
    drawn = bars(facts, colour_scales(facts), 0, [1, 2])
    assert drawn.shape == (4, 2, BINS)
    assert (drawn[3] == 255).all()
    assert drawn[:3].max() <= 254


def test_the_figures_are_of_the_summaries():
    assert set(FIGURES) <= set(SUMMARY)


def test_numbers_have_four_digits():
    assert [number(value) for value in (1.23456, -0.0123456, 0.0, 123456.0, 1e-9, -2.5e8, 3.0)] == [
        "1.235",
        "\u22120.01235",
        "0",
        "123500",
        "1.000e\u221209",
        "\u22122.500e+08",
        "3.000",
    ]
    assert figure_text("commitment", None) == figure_text("mean", float("nan")) == "\u2013"
    assert (figure_text("committed_to", 1), figure_text("committed_to", -1.0), figure_text("peak_token", 4.0)) == (
        "positive",
        "negative",
        "4",
    )


# --- the page as it is written --------------------------------------------------------------------------------------


def test_the_policy_admits_the_pages_own_blocks_alone(page):
    outline = Outline(page)
    policy = policy_of(outline)
    run = [body for name, attributes, body in outline.blocks if name == "script" and "type" not in attributes]
    assert policy["default-src"] == ["'none'"]
    assert policy["script-src"] == [hashed(body) for body in run]
    assert policy["style-src"] == [hashed(body) for name, _, body in outline.blocks if name == "style"]
    assert not [key for _, a in outline.tags for key in a if key == "style" or key.startswith("on")]
    assert not [a for _, a in outline.tags if {"src", "srcset", "action"} & set(a)]
    assert all(str(a["href"]).startswith("#") for a in outline.all("a"))
    assert not re.search(r"url\(|@import|://", "".join(body for _, a, body in outline.blocks if "type" not in a))


def test_ids_are_unique_and_headings_descend(page):
    outline = Outline(page)
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in outline.all("a")} <= set(ids)
    levels = [int(name[1]) for name, _ in outline.tags if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert max(after - before for before, after in pairwise(levels)) <= 1


def test_without_a_script_there_is_the_table_of_the_first_trait_and_layer(facts, page):
    text = Outline(page).text
    summary = facts.readings[3].dynamics["uncertainty_calibration"][3]
    for figure in ("mean", "peak", "peak_token", "persistence"):
        assert figure_text(figure, summary[figure]) in text
    assert "uncertainty_calibration at layer 3, residual out" in text
    assert "generation.temperature" in text
    assert "\u22121.500 and 2.800" in text
    assert "not known" in text
    assert "nan" not in text.lower().split()


def test_every_text_is_inert_as_written():
    evil = EVIL[0]
    facts = make_set(2, 30, 3, 1, texts=EVIL)
    trait = replace(facts.traits[0], name=evil, description=evil, method=evil)
    readings = [replace(r, id=evil, prompt=evil, tokens=[evil] * 30, finish_reason=evil) for r in facts.readings]
    facts = replace(
        facts, title=evil, experiment=evil, name=evil, model=evil, traits=(trait,), readings=readings,
        settings={evil: {evil: [evil]}},
    )  # fmt: skip
    outline = Outline(set_page(facts))
    assert len([a for a in outline.all("script") if "type" not in a]) == 1
    assert outline.all("img") == []
    assert "document.title" in outline.text
    rows = [SetRow(evil, evil, 2, evil, [evil], [1], 1, 1, evil)]
    assert len(Outline(sets_index(rows)).all("script")) == 1


def test_the_same_set_gives_the_same_bytes(page):
    assert set_page(make_set(PROMPTS, TOKENS, LAYERS, 2, texts=EVIL)) == page
    assert set_page(make_set(PROMPTS, TOKENS, LAYERS, 2)) != page


def test_the_index_names_every_set():
    row = SetRow("demo", "tier2-a-00", 2, "pocket", ["calm", "warm"], range(6), 7, 8, "tier2-a-00/reports/page.html")
    outline = Outline(sets_index([row, replace(row, name="tier3-b-11", tier=3, n_done=8, link=None)]))
    assert [a["href"] for a in outline.all("a")] == ["tier2-a-00/reports/page.html"]
    for words in ("calm and warm", "0 to 5", "7 of 8", "tier3-b-11"):
        assert words in outline.text
    assert Outline(sets_index([])).all("table") == []


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(page, tmp_path_factory) -> Path:
    written = tmp_path_factory.mktemp("page") / "page.html"
    written.write_bytes(page)
    return written


@pytest.fixture
def shown(browser, path) -> Browser:
    browser.size(1280, 800)
    browser.prefer("light")
    browser.open(path)
    return browser


def state(browser: Browser) -> dict[str, str]:
    """The page shows the prompt, token and layer of its address."""
    return dict(part.split("=") for part in browser.run("location.hash").lstrip("#").split("&"))


def told(browser: Browser) -> float:
    """The projection in the status line."""
    return float(browser.run("document.querySelector('#status .value').textContent").split()[-1].replace("\u2212", "-"))


def palette(scheme: str) -> list[tuple[int, int, int]]:
    """The 255 colours."""
    anchors = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS[scheme]], dtype=float)
    at = np.linspace(0, len(anchors) - 1, 255)
    mixed = np.stack([np.interp(at, np.arange(len(anchors)), channel) for channel in anchors.T], axis=1)
    return [tuple(int(np.floor(c + 0.5)) for c in colour) for colour in mixed]


def expected_colour(facts, p: int, t: int, layer: int, point: int, i: int, scheme: str = "light"):
    scales = colour_scales(facts)
    value = float(facts.readings[p].projections_TLPK[i, layer, point, t])
    place = np.clip((value - scales.centre_KLP[t, layer, point]) / scales.half_KLP[t, layer, point], -1, 1)
    return palette(scheme)[127 + round(127 * float(place))]


def colours_of(browser: Browser) -> list[tuple[int, ...]]:
    said = browser.run("[...document.querySelectorAll('.token')].map((t) => getComputedStyle(t).backgroundColor)")
    return [tuple(map(int, re.findall(r"\d+", colour)[:3])) for colour in said]


def is_near(one, other) -> bool:
    """The same colour, but for a step of the scale: the page's values are quantised."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 4


@needs_browser
def test_the_page_shows_the_first_prompt_and_evil_text_stays_text(shown, facts):
    assert shown.run("[document.title, app.hidden, document.querySelectorAll('#prompts li').length]") == [
        "prompts_uncertainty: Traitline captures", False, PROMPTS,
    ]  # fmt: skip
    tokens = shown.run("[...document.querySelectorAll('.token')].map((t) => t.textContent)")
    assert len(tokens) == TOKENS
    assert tokens[0] == "<bos>"
    assert tokens[3] == "\u23ce\n"
    start = facts.readings[0].n_prompt
    assert tokens[start] == EVIL[0]
    assert tokens[start + 2].startswith("\u241b[31mred")
    assert "\u27e8U+202E\u27e9" in tokens[start + 3]
    assert shown.run("document.querySelectorAll('#text img, #text script').length") == 0
    assert shown.complaints == []


@needs_browser
def test_the_browser_reports_blocked_content(browser, page, tmp_path):
    """Negative control of the tests that find no complaints."""
    assert_foreign_content_is_blocked(browser, page, tmp_path)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("t", "layer", "point"), [(0, 3, 2), (0, 5, 0), (1, 2, 1), (0, 1, 2)])
def test_colours_follow_trait_layer_and_point(shown, path, facts, t, layer, point, scheme):
    shown.prefer(scheme)
    shown.open(path, f"#p=p0002&t={t}&l={layer}&at={POINTS[point]}")
    found = colours_of(shown)
    expected = [expected_colour(facts, 2, t, layer, point, i, scheme) for i in range(TOKENS)]
    assert all(map(is_near, found, expected))
    other = [expected_colour(facts, 2, 1 - t, layer, point, i, scheme) for i in range(TOKENS)]
    assert not all(map(is_near, found, other))


@needs_browser
def test_text_is_readable_on_every_colour(shown):
    for scheme in COLOURS:
        inks = shown.run(f"Charts.palette({json.dumps(COLOURS[scheme])}).map((c) => [c.rgb, c.ink])")
        for rgb, ink in inks:
            light = float(np.dot((0.2126, 0.7152, 0.0722), [linear(c / 255) for c in rgb]))
            contrast = 1.05 / (light + 0.05) if ink == "#ffffff" else (light + 0.05) / 0.05
            assert contrast >= 4.5, (scheme, rgb, ink)
        lights = [float(np.dot((0.2126, 0.7152, 0.0722), [linear(c / 255) for c in rgb])) for rgb, _ in inks]
        sign = 1 if scheme == "light" else -1
        assert (sign * np.diff(lights[:128]) > -1e-3).all()
        assert (sign * np.diff(lights[127:]) < 1e-3).all()


def linear(c: float) -> float:
    return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4


@needs_browser
@pytest.mark.parametrize("i", [0, 9, 40])
def test_hovering_tells_the_tokens_value(shown, facts, i):
    before = shown.run("location.hash")
    shown.point_at(f"#token-{i}")
    reading = facts.readings[0]
    assert told(shown) == pytest.approx(float(reading.projections_TLPK[i, 3, 2, 0]), rel=6e-4, abs=1e-3)
    said = shown.run("document.querySelector('#status').textContent")
    assert f"id {reading.token_ids[i]} " in said
    assert f"token {i} " in said
    assert "layer 3, residual out" in said
    where = f"response {i - reading.n_prompt}" if i >= reading.n_prompt else "prompt"
    assert f"({where})" in said
    assert shown.run("location.hash") == before
    assert shown.run("[status.role, document.getElementById('status').ariaLive]")[1] == "polite"


@needs_browser
def test_tab_reaches_the_text_and_arrows_move(shown, facts):
    for _ in range(60):
        shown.press("Tab")
        if shown.run("document.activeElement.id") == "text":
            break
    assert shown.run("document.activeElement.id") == "text"
    assert shown.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    start = facts.readings[0].n_prompt
    shown.press("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowUp")
    assert state(shown) == {"p": "p0000", "t": "0", "l": "4", "at": "residual_out", "i": str(start + 1)}
    assert told(shown) == pytest.approx(float(facts.readings[0].projections_TLPK[start + 1, 4, 2, 0]), abs=1e-3)
    assert shown.run("document.querySelector('[aria-selected]').id") == f"token-{start + 1}"
    assert shown.run("document.getElementById('text').getAttribute('aria-activedescendant')") == f"token-{start + 1}"
    shown.press("End", "ArrowRight", "ArrowDown", "ArrowDown")
    assert (state(shown)["i"], state(shown)["l"]) == (str(TOKENS - 1), "2")
    shown.press("Home", "ArrowLeft")
    assert state(shown)["i"] == "0"


@needs_browser
def test_letters_change_prompt_and_trait_but_not_while_one_types(shown):
    shown.press("n", "n", "p", "t", "a")
    assert (state(shown)["p"], state(shown)["t"], state(shown)["at"]) == ("p0001", "1", "residual_in")
    assert shown.run("[trait.value, point.value]".replace("trait", "document.getElementById('trait')").replace(
        "point", "document.getElementById('point')")) == ["1", "0"]  # fmt: skip
    shown.run("document.getElementById('find').focus()")
    shown.press("n", "t", "?")
    assert (state(shown)["p"], state(shown)["t"]) == ("p0001", "1")
    assert shown.run("document.getElementById('find').value") == "nt?"
    assert shown.run("document.getElementById('keys').open") is False


@needs_browser
def test_the_keys_are_listed(shown):
    shown.press("?", shift=True)
    assert shown.run("document.getElementById('keys').open") is True
    shown.press("n")
    assert "p0001" not in shown.run("location.hash")
    shown.press("Escape")
    assert shown.run("document.getElementById('keys').open") is False
    shown.point_at("#show-keys", click=True)
    assert shown.run("document.getElementById('keys').open") is True
    shown.point_at("#keys button", click=True)
    assert shown.run("document.getElementById('keys').open") is False


@needs_browser
def test_the_address_keeps_the_state(shown, path):
    shown.open(path, "#p=p0003&t=1&l=4&at=after_attention&i=17")
    assert shown.run("document.getElementById('chosen-title').textContent") == "p0003"
    assert shown.run("document.getElementById('layer').value") == "4"
    assert shown.run("document.querySelector('[aria-selected]').id") == "token-17"
    shown.press("n")
    assert shown.run("location.hash").startswith("#p=p0004&t=1&l=4&at=after_attention&i=")
    shown.run("location.hash = '#p=p0000&t=0&l=1&at=residual_in&i=5'; new Promise((done) => setTimeout(done, 60))")
    assert shown.run("document.querySelector('[aria-selected]').id") == "token-5"
    shown.open(path, "#p=nobody&t=99&l=-1&at=x&i=9999999")
    assert shown.run("document.getElementById('chosen-title').textContent") == "p0000"
    shown.open(path, "#p=%E0%A4%A&i=<script>")
    assert shown.complaints == []


@needs_browser
def test_a_cell_of_the_heat_map_is_chosen_by_clicking(shown, facts):
    token, layer = 33, 1
    x, y = cell_of(shown, token, layer)
    shown.point(x, y)
    assert told(shown) == pytest.approx(float(facts.readings[0].projections_TLPK[token, layer, 2, 0]), abs=1e-3)
    shown.point(x, y, click=True)
    assert (state(shown)["i"], state(shown)["l"]) == (str(token), str(layer))
    shown.run("document.getElementById('map').focus()")
    shown.press("ArrowRight", "ArrowUp")
    assert (state(shown)["i"], state(shown)["l"]) == (str(token + 1), str(layer + 1))


def cell_of(browser: Browser, token: int, layer: int) -> tuple[float, float]:
    """Where a cell of the heat map is in the window."""
    x, y = browser.run(
        "(() => { const map = document.getElementById('map'); map.scrollIntoView({block: 'center'});"
        f"const place = Charts.layout(document.getElementById('plots').clientWidth, {TOKENS}, {LAYERS});"
        "const box = map.getBoundingClientRect();"
        f"return [box.left + Charts.columnX(place, {token} + 0.5),"
        f"box.top + 20 + place.row * ({LAYERS - 1 - layer} + 0.5)]; }})()"
    )
    return x, y


@needs_browser
@pytest.mark.parametrize("scale", [1, 2])
def test_cells_have_their_tokens_colours(shown, path, facts, scale):
    shown.size(1280, 800, scale=scale)
    shown.open(path)
    for token, layer in ((20, 0), (45, 5), (50, 2)):
        x, y = cell_of(shown, token, layer)
        colour = shown.run(
            "(() => { const map = document.getElementById('map'); const box = map.getBoundingClientRect();"
            f"const [x, y] = [({x} - box.left) * {scale}, ({y} - box.top) * {scale}];"
            "return [...map.getContext('2d').getImageData(x, y, 1, 1).data]; })()"
        )
        assert is_near(colour[:3], expected_colour(facts, 0, 0, layer, 2, token)), (token, layer)
    assert shown.run("document.getElementById('map').width") == pytest.approx(
        scale * shown.run("document.getElementById('map').clientWidth"), abs=scale
    )


@needs_browser
def test_summaries_follow_the_choice(shown, path, facts):
    shown.open(path, "#p=p0005&t=1&l=2&at=residual_out")
    summary = facts.readings[5].dynamics["sycophancy"][2]
    terms = dict(
        shown.run(
            "[...document.querySelectorAll('#dynamics div')].map((d) => [...d.children].map((c) => c.textContent))"
        )
    )
    assert terms["Mean"] == figure_text("mean", summary["mean"])
    assert terms["Peak at"].split()[0] == str(summary["peak_token"])
    assert terms["Persistence"] == figure_text("persistence", summary["persistence"])
    row = shown.run("[...document.querySelector('.every tr[data-p=\"5\"]').cells].map((c) => c.textContent)")
    assert row[2:4] == [figure_text("mean", summary["mean"]), figure_text("peak", summary["peak"])]
    assert shown.run("document.querySelectorAll('#prompts .item-mean')[5].textContent") == figure_text(
        "mean", summary["mean"]
    )
    shown.point_at("#dynamics .jump", click=True)
    assert state(shown)["i"] == str(facts.readings[5].n_prompt + summary["peak_token"])


@needs_browser
def test_the_table_is_sorted_by_its_heads(shown, facts):
    means = [reading.dynamics["uncertainty_calibration"][3]["mean"] for reading in facts.readings]
    shown.point_at(".every thead th:nth-child(3) button", click=True)
    assert order(shown) == [int(i) for i in np.argsort(-np.array(means))]
    assert shown.run("document.querySelector('.every [aria-sort]').textContent") == "Mean"
    shown.press("Enter")
    assert order(shown) == [int(i) for i in np.argsort(means)]
    shown.run("document.querySelectorAll('.every thead button')[5].click()")
    commits = [reading.dynamics["uncertainty_calibration"][3]["commitment"] for reading in facts.readings]
    found = [commits[p] for p in order(shown)]
    assert found == sorted((c for c in found if c is not None), reverse=True) + [None] * found.count(None)
    shown.point_at(".every tbody tr:nth-child(2)", click=True)
    assert state(shown)["p"] == f"p{order(shown)[1]:04d}"


def order(browser: Browser) -> list[int]:
    return browser.run("[...document.querySelectorAll('.every tbody tr')].map((row) => Number(row.dataset.p))")


@needs_browser
def test_prompts_are_found_by_their_words(shown, facts):
    shown.run("document.getElementById('find').focus()")
    shown.press(*"picnic")
    fits = [i for i, reading in enumerate(facts.readings) if "picnic" in reading.prompt]
    items = "[...document.querySelectorAll('#prompts li')]"
    assert shown.run(f"{items}.flatMap((li, i) => li.hidden ? [] : [i])") == fits
    assert shown.run("document.getElementById('found').textContent").split()[0] == str(len(fits))
    shown.run("document.activeElement.blur()")
    shown.press("n")
    assert state(shown)["p"] == f"p{fits[0]:04d}"


@needs_browser
@pytest.mark.parametrize("width", [360, 400, 901, 1280])
def test_the_page_never_scrolls_sideways(shown, tmp_path, width):
    readings = [replace(r, prompt="unbroken" * 40) for r in make_set(3, 400, 26, 1, texts=["x" * 300]).readings]
    trait = replace(
        make_set(1, 20, 26, 1).traits[0], name="a_name_that_is_as_long_as_a_name_of_a_trait_may_ever_be_really_64"
    )
    wide = make_set(3, 400, 26, 1, readings=readings, traits=(trait,), name="long" * 16)
    shown.size(width, 800)
    shown.show(set_page(wide), tmp_path)
    assert shown.run("[document.documentElement.scrollWidth, document.documentElement.clientWidth]") == [width, width]


@needs_browser
def test_a_change_of_scheme_repaints(shown, facts):
    before = colours_of(shown)
    shown.prefer("dark")
    shown.run("new Promise((done) => setTimeout(done, 60))")
    assert is_near(colours_of(shown)[20], expected_colour(facts, 0, 0, 3, 2, 20, "dark"))
    shown.prefer("dark", media="print")
    shown.run("new Promise((done) => setTimeout(done, 60))")
    assert colours_of(shown) == before


@needs_browser
def test_controls_without_data_are_not_shown(browser, tmp_path):
    browser.show(set_page(make_set(1, 30, 1, 1)), tmp_path)
    hidden = "getComputedStyle(document.getElementById('trait').parentNode).display"
    assert browser.run(hidden) == "none"
    assert browser.run("document.getElementById('find')") is None
    assert browser.complaints == []


EMPTY = make_set(1, 20, 3, 1).readings[0]
ODD = {
    "no response": replace(EMPTY, n_prompt=20, response="", dynamics={}),
    "no prompt": replace(EMPTY, n_prompt=0),
    "no numbers": replace(EMPTY, projections_TLPK=np.full_like(EMPTY.projections_TLPK, np.nan)),
    "all the same": replace(EMPTY, projections_TLPK=np.zeros_like(EMPTY.projections_TLPK)),
    "no text of its own": replace(EMPTY, pieces=[""] * 20, tokens=["<0xF0>"] * 20),
    "nothing": replace(
        EMPTY, pieces=[], tokens=[], token_ids=[], n_prompt=0, dynamics={}, projections_TLPK=EMPTY.projections_TLPK[:0]
    ),
}


@needs_browser
@pytest.mark.parametrize("name", ODD)
def test_any_reading_makes_a_page(browser, tmp_path, name):
    browser.show(set_page(make_set(1, 20, 3, 1, readings=[ODD[name]])), tmp_path)
    assert browser.run("document.querySelectorAll('.token').length") == len(ODD[name].token_ids)
    browser.run("document.getElementById('text').focus()")
    browser.press("ArrowRight", "ArrowUp", "n", "t", "a", "End")
    assert browser.complaints == []


@needs_browser
def test_a_set_without_traits_shows_its_texts(browser, tmp_path):
    readings = [replace(r, projections_TLPK=r.projections_TLPK[..., :0], dynamics={}) for r in make_set(2).readings]
    browser.show(set_page(make_set(2, traits=(), readings=readings)), tmp_path)
    assert browser.run("document.getElementById('app')") is None
    assert readings[1].response.split()[0] in browser.run("document.querySelector('#all table').innerText")
    assert browser.complaints == []


@needs_browser
def test_the_token_where_it_commits_has_a_bar(shown, path, facts):
    for p, reading in enumerate(facts.readings[:6]):
        shown.open(path, f"#p={reading.id}&t=0&l=3")
        token = reading.dynamics["uncertainty_calibration"][3]["commitment"]
        expected = [] if token is None else [f"token-{reading.n_prompt + token}"]
        assert shown.run("[...document.querySelectorAll('.token.commits')].map((t) => t.id)") == expected, p


@needs_browser
def test_a_set_without_prompts_makes_a_page(browser, tmp_path):
    browser.show(set_page(make_set(0, 20, 3, 1)), tmp_path)
    assert browser.complaints == []


@needs_browser
@pytest.mark.parametrize("most", [30_000, 12_000, 6_000])
def test_smaller_pages_are_within_their_stated_error(browser, tmp_path, most):
    facts = make_set(4, 40, 12, 2)
    page = set_page(facts, max_bytes=most)
    browser.show(page, tmp_path, "#p=p0001&t=1&l=6&i=30")
    said = re.search(r"to within ([\d.]+(e.\d+)?)", Outline(page).text)[1].rstrip(".")
    error = float(said.replace("\u2212", "-"))
    assert told(browser) == pytest.approx(
        float(facts.readings[1].projections_TLPK[30, 6, 2, 1]), abs=1.1 * error + 1e-3
    )
    assert 0 < error < 0.1
    assert browser.complaints == []


@needs_browser
def test_without_scripts_the_table_is_there(browser, path):
    browser.without_scripts(True)
    try:
        browser.open(path)
        assert browser.run("document.querySelectorAll('noscript p').length") == 1
        assert browser.run("document.getElementById('app').offsetHeight") == 0
        assert browser.run("document.querySelectorAll('.every tbody tr').length") == PROMPTS
    finally:
        browser.without_scripts(False)
