"""The steering sweep: conditions, metrics and controls on tiny models, and what steering does to the pocket model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from extraction.core.records import Example, Prompt
from extraction.engine.sampler import Sample
from extraction.evaluation.steered_generation import (
    UNSTEERED,
    Condition,
    SteeredAnswer,
    SteeredGeneration,
    answer_all,
    condition_metrics,
    is_coherent,
    layer_directions,
    rate_with_interval,
    repetition,
)
from extraction.evaluation.steering_sweep import SweepPlan, choose_site, other_site, reach, run_sweep, window_of
from extraction.judging.base import Judgement
from extraction.model.loading import wrap
from tests.runs import (
    NATURAL,
    Silent,
    contents,
    extracted_root,
    make_extracted_root,
    make_root,
    refused,
    room_for,
    succeed,
)
from tests.tiny import LAYERS, deviation, shared_model, tiny_tokenizer

ALL_LAYERS = tuple(range(LAYERS))
WORDS = ("Why", "Who", "When", "What", "How", "Where")


def prompt(text: str) -> Prompt:
    example = Example(text, "calm", "pos", 0, 0, 0, text)
    return Prompt(example, text, tuple(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]))


def trying_of(scorer=None, batch_size: int = 5, **options) -> SteeredGeneration:
    lm = wrap(shared_model("llama"), tiny_tokenizer(), stop_ids=())
    return SteeredGeneration(lm, Sample(), scorer or vowels, max_new_tokens=6, batch_size=batch_size, **options)


def vowels(pairs):
    """A scorer: 100 for an answer whose first character sorts before `n`."""
    return [Judgement((100.0 if answer[:1] < "n" else 0.0) if answer else None) for _, answer, _ in pairs]


def directions(seed: int = 0, size: float = 3.0):
    width = shared_model("llama").config.hidden_size
    draw = torch.randn(LAYERS, width, generator=torch.Generator().manual_seed(seed))
    return layer_directions(draw, [size] * LAYERS, ALL_LAYERS, seed=seed)


CONDITIONS = [
    UNSTEERED,
    *(Condition("trait", "add", (1,), size) for size in (-2.0, 0.0, 1.0)),
    *(Condition("random", "add", (0, 1), size) for size in (-2.0, 2.0)),
    Condition("trait", "ablate", ALL_LAYERS),
]


def test_every_answer_is_the_one_that_its_condition_and_prompt_give_alone():
    prompts = [prompt(word) for word in WORDS]
    together = answer_all(trying_of(batch_size=7), prompts, directions(), CONDITIONS, 2)
    assert list(together) == CONDITIONS
    for condition, answers in together.items():
        assert [answer.question for answer in answers] == [word for word in WORDS for _ in range(2)]
        for i, one in enumerate(prompts):
            alone = answer_all(trying_of(batch_size=1), [one], directions(), [condition], 2)[condition]
            assert [a.token_ids for a in alone] == [a.token_ids for a in answers[2 * i : 2 * i + 2]], condition.label
            for a, b in zip(alone, answers[2 * i : 2 * i + 2], strict=True):
                assert (a.text, a.score) == (b.text, b.score)
                assert a.surprise == pytest.approx(b.surprise, rel=1e-4)
    plain = [answer.token_ids for answer in together[UNSTEERED]]
    assert [answer.token_ids for answer in together[Condition("trait", "add", (1,), 0.0)]] == plain
    for condition in CONDITIONS[-3:]:  # the control: the others are steered
        assert [answer.token_ids for answer in together[condition]] != plain


def test_all_conditions_draw_the_same_random_numbers_so_that_only_the_steering_differs():
    prompts, few = [prompt(word) for word in WORDS], Condition("trait", "add", (1,), 1e-6)
    trying = replace(trying_of(), strategy=Sample(temperature=1.0))
    found = answer_all(trying, prompts, directions(), [UNSTEERED, few, CONDITIONS[1]], 3)
    plain = [answer.token_ids for answer in found[UNSTEERED]]
    assert [answer.token_ids for answer in found[few]] == plain
    assert [answer.token_ids for answer in found[CONDITIONS[1]]] != plain
    assert len(set(plain)) > len(WORDS)  # repeats differ


def test_a_coefficient_counts_in_typical_norms_and_is_shared_among_layers():
    some = directions(size=3.0)
    one = some.steering(Condition("trait", "add", (1,), -2.0), 0)
    assert one.add[1].norm() == pytest.approx(6.0, rel=1e-5)
    assert torch.nn.functional.cosine_similarity(one.add[1], some.trait[1], dim=0) == pytest.approx(-1.0)
    several = some.steering(Condition("trait", "add", (0, 1), 2.0), 0)
    assert [vector.norm().item() for vector in several.add.values()] == pytest.approx([3.0, 3.0], rel=1e-5)
    draws = [some.steering(Condition("random", "add", (1,), 1.0), repeat).add[1] for repeat in range(5)]
    assert torch.equal(draws[0], draws[4])
    assert torch.equal(some.random[0][0], some.random[0][1])
    assert not torch.equal(draws[0], draws[1])
    assert some.steering(UNSTEERED, 0) is None


def answers_of(rows) -> list[SteeredAnswer]:
    return [SteeredAnswer(question, "", (1, 2), score, None, 1.0) for question, score in rows]


def test_a_rate_counts_scored_answers_alone_and_is_resampled_by_question():
    rows = [("a", 80.0), ("a", None), ("a", 50.0), ("b", 49.9), ("b", None), ("c", None)]
    found = condition_metrics(answers_of(rows), 50.0, seed=0)
    assert (found["n"], found["missing"]) == (6, 3)
    assert found["rate"]["value"] == pytest.approx(2 / 3)
    assert found["score"] == pytest.approx((80 + 50 + 49.9) / 3)
    assert found["perplexity"] == pytest.approx(math.e)
    # two questions, one always positive and one never: a resample holds either, or both
    assert (found["rate"]["low"], found["rate"]["high"]) == (0.0, 1.0)
    many = answers_of([(f"q{i}", 100.0 * (j % 2)) for i in range(30) for j in range(2)])
    assert rate_with_interval(many, 50.0, seed=0) == {"value": 0.5, "low": 0.5, "high": 0.5}
    unclear = condition_metrics(answers_of([("a", None)]), 50.0, seed=0)
    assert unclear["rate"] == {"value": None, "low": None, "high": None}
    assert unclear["score"] is None


@given(st.lists(st.integers(0, 3), max_size=20))
def test_repetition_is_the_share_of_grams_seen_before(token_ids):
    grams = [tuple(token_ids[i : i + 4]) for i in range(len(token_ids) - 3)]
    again = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repetition(token_ids) == pytest.approx(again / len(grams) if grams else 0.0)


PLAIN = {"perplexity": 2.0, "repetition": 0.1, "judged_coherence": None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"perplexity": 4.0}, True),
        ({"perplexity": 4.01}, False),
        ({"repetition": 0.2}, True),
        ({"repetition": 0.21}, False),
        ({"judged_coherence": 50.0}, True),
        ({"judged_coherence": 49.0}, False),
        ({"perplexity": None}, False),
    ],
)
def test_coherent_means_about_as_likely_and_as_varied_as_unsteered(changes, expected):
    assert is_coherent({**PLAIN, **changes}, PLAIN) is expected


def plan_of(candidates, **options) -> SweepPlan:
    prompts = [prompt(word) for word in WORDS]
    return SweepPlan(
        prompts[:3], prompts[3:], candidates, ALL_LAYERS, **{"answers": 6, "coefficients": (0.5, 1.0)} | options
    )


def test_an_evaluation_is_whole_and_json_ready_and_reports_on_other_questions_than_it_chooses_by():
    asked: list[set[str]] = []

    def scorer(pairs):
        asked.append({question for question, *_ in pairs})
        return vowels(pairs)

    counted = []
    plan = plan_of({"mean_diff": directions(0), "probe": directions(1)})
    found = run_sweep(trying_of(scorer, on_progress=lambda n, _: counted.append(n)), plan)
    json.dumps(found, allow_nan=False)
    assert asked == [set(WORDS[:3])] * 3 + [set(WORDS[3:])]
    assert sum(counted) == plan.n_answers
    seen = [(each["method"], tuple(each["layers"])) for each in found["scan"]]
    assert seen[:-1] == [(method, (layer,)) for method in ("mean_diff", "probe") for layer in ALL_LAYERS]
    assert seen[-1][1] == ALL_LAYERS
    labels = {(c["direction"], c["kind"], tuple(c["layers"]), c["coefficient"]) for c in found["conditions"]}
    place, others = tuple(found["layers"]), other_site(tuple(found["layers"]), ALL_LAYERS)
    assert len(labels) == len(found["conditions"]) == 1 + 3 * 4 + 2
    assert {size for d, k, layers, size in labels if (d, k, layers) == ("trait", "add", others)} == {
        -1.0,
        -0.5,
        0.5,
        1.0,
    }
    assert {size for d, k, layers, size in labels if (d, k, layers) == ("random", "add", place)} == {
        -1.0,
        -0.5,
        0.5,
        1.0,
    }
    assert {each["n"] for each in found["conditions"]} == {6}
    assert found["conditions"][0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert all(each["kl"] > 1e-6 for each in found["conditions"][1:])
    assert [len(each["samples"]) for each in found["conditions"]] == [3] * len(found["conditions"])


def test_neighbours_are_steered_together():
    layers = tuple(range(6))
    assert [window_of(layer, layers) for layer in (0, 3, 5)] == [(0, 1), (2, 3, 4), (4, 5)]
    assert window_of(6, (4, 6, 8, 9)) == (4, 6, 8)
    assert other_site((4,), layers) == (3, 4, 5)
    assert other_site((0,), layers) == (0, 1)
    assert other_site((3, 4, 5), layers) == (4,)


def test_a_constant_judge_finds_no_steerable_layer():
    always_50 = trying_of(lambda pairs: [Judgement(50.0)] * len(pairs))
    _, _, scan = choose_site(always_50, plan_of({"mean_diff": directions()}))
    assert {each["moved"] for each in scan} == {0.0}
    found = run_sweep(always_50, plan_of({"mean_diff": directions()}))
    assert {each["rate"]["value"] for each in found["conditions"]} == {1.0}
    silent = run_sweep(trying_of(lambda pairs: [Judgement(None)] * len(pairs)), plan_of({"mean_diff": directions()}))
    assert {each["missing"] for each in silent["conditions"]} == {6}
    assert silent["reached"] == {"positive": None, "negative": None, "random": {"positive": None, "negative": None}}


def test_the_largest_coherent_coefficient_is_the_last_before_the_first_that_is_not():
    sizes = [-2.0, -1.0, -0.5, 0.5, 1.0, 2.0]
    made = {(d, size): Condition(d, "add", (1,), size) for d in ("trait", "random") for size in sizes}
    figures = {condition: {"rate": {"value": condition.coefficient}} for condition in made.values()}
    coherent = {condition: condition.coefficient not in (-0.5, 1.0) for condition in made.values()}
    assert reach((1,), sizes, figures, coherent) == {
        "largest_coherent": {"positive": 0.5, "negative": None},
        "reached": {"positive": 0.5, "negative": None, "random": {"positive": 0.5, "negative": None}},
    }
    coherent[made["trait", -0.5]] = coherent[made["trait", 1.0]] = True
    found = reach((1,), sizes, {**figures, made["random", -2.0]: {"rate": {"value": 0.25}}}, coherent)
    assert found["largest_coherent"] == {"positive": 2.0, "negative": -2.0}
    assert found["reached"] == {"positive": 2.0, "negative": -2.0, "random": {"positive": 2.0, "negative": 0.25}}


# --- the pocket model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pocket_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real run: its vectors do steer."""
    from tests.runs import REPOSITORY

    root = tmp_path_factory.mktemp("pocket")
    (root / "configs").symlink_to(REPOSITORY / "configs")
    place = ("--root", root, "--experiment", "pocket", "--trait", "commitment_strength", "--batch-size", "64")
    succeed("batched", *place, "--n-examples", "24", "--max-new-tokens", "32")
    succeed("vectors", *place[:-2], "--methods", "mean_diff,probe")
    succeed("validate", *place, "--samples-per-coef", "6")
    return root


SIDES = ("negative", "positive")


def steering_of(root: Path, trait: str) -> dict:
    return json.loads((root / f"experiments/pocket/{trait}/vectors/steering.json").read_text())


def test_a_trait_moves_without_an_instruction_and_random_directions_do_not_move_it(pocket_root):
    found = steering_of(pocket_root, "commitment_strength")
    reached = found["reached"]
    assert reached["positive"] >= 0.8
    assert reached["negative"] <= 0.2
    pushed = [each for each in found["conditions"] if each["direction"] == "random" and abs(each["coefficient"]) <= 1]
    rates = [each["rate"]["value"] for each in pushed]
    assert 0.2 < sum(rates) / len(rates) < 0.8
    assert found["largest_coherent"]["positive"] >= 0.5
    assert found["largest_coherent"]["negative"] <= -0.5


def test_steer_shows_both_signs_and_the_unsteered_answer(pocket_root):
    options = ("--experiment", "pocket", "--trait", "commitment_strength", "--root", pocket_root, "--coef", "-1,0.5")
    out = succeed("steer", *options, "--ablate", "Should I bake bread?", "What of tea?").stdout
    assert all(len(line) <= 80 for line in out.splitlines())
    lines = [line for line in out.splitlines() if line[:1] == " " and line[:11].strip()]
    hows = [line.split()[0] for line in lines]
    assert [how for how in hows if how != "coef"] == ["-1", "0", "+0.5", "ablated"] * 2
    low, high = (steering_of(pocket_root, "commitment_strength")["largest_coherent"][side] for side in SIDES)
    assert f" {low:+g} to {high:+g} " in out.replace("\n", " ")
    assert succeed("steer", *options, "--ablate", "Should I bake bread?", "What of tea?").stdout == out


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--coef", "much"], ("--coef", "'much'")),
        (["--coef", "nan"], ("--coef", "'nan'")),
        (["--layer", "6"], ("'6'", "5")),
        (["--method", "random"], ("'random'", "mean_diff")),
        (["--positions", "some"], ("some", "all, response")),
        (["--coef", "1e38"], ("coefficient",)),
    ],
)
def test_steer_refuses_missing_vectors_and_layers_in_one_line(pocket_root, options, parts):
    line = refused(
        "steer", "--experiment", "pocket", "--trait", "commitment_strength", "--root", pocket_root, *options, "Hi"
    )
    assert all(part in line for part in parts), line


# --- the stage ------------------------------------------------------------------------------------------------------


def test_a_second_validation_makes_nothing_new_and_more_answers_make_the_sweep_again(tmp_path):
    options = ("--root", make_extracted_root(tmp_path), "--experiment", "demo")
    run = tmp_path / "experiments/demo/calm"
    before = contents(run)
    succeed("validate", *options, "--samples-per-coef", "2")
    succeed("validate", *options, "--quick")
    assert contents(run) == before
    succeed("validate", *options, "--samples-per-coef", "3")
    after = contents(run)
    changed = {name for name in after if after[name] != before.get(name)}
    assert {"vectors/steering.json"} <= changed <= {"vectors/steering.json", "vectors/card.json"}  # the verdict tells


def test_card_and_steering_are_at_the_layers_of_the_stored_vectors(tmp_path):
    options = ("--root", make_extracted_root(tmp_path), "--experiment", "demo")
    run = tmp_path / "experiments/demo/calm"
    few = ("--samples-per-coef", "2")
    succeed("vectors", *options, "--layers", "0-1")
    succeed("vectors", *options, "--layers", "2", "--method", "random")  # no part of the card
    succeed("validate", *options, *few)
    card, sweep = (json.loads((run / f"vectors/{name}.json").read_text()) for name in ("card", "steering"))
    assert card["layers"] == [0, 1]
    assert set(sweep["layers"]) <= {0, 1}
    succeed("steer", *options, "--max-new-tokens", "3", "Hi")
    for layers, absent in (("all", 2), ("1-2", 2), ("2", 2)):
        line = refused("validate", *options, *few, "--layers", layers)
        assert all(part in line for part in (f"'{layers}'", "[0, 1]", f"not {absent}"))
    succeed("validate", *options, *few, "--layers", "1")
    assert json.loads((run / "vectors/card.json").read_text())["layers"] == [1]
    succeed("vectors", *options, "--layers", "0", "--method", "mean_diff,probe,pca,ica,gradient")
    line = refused("steer", *options, "--max-new-tokens", "3", "Hi")
    assert "[0], not 1" in line
    assert "--layer" in line
    succeed("vectors", *options, "--layers", "2", "--method", "probe")
    line = refused("validate", *options, *few)
    assert "probe [2]" in line


def test_a_sweep_that_runs_out_of_memory_runs_again_at_half_the_batch_size_with_the_same_result(tmp_path):
    options = ("--root", make_extracted_root(tmp_path), "--experiment", "demo", "--samples-per-coef", "2")
    run = tmp_path / "experiments/demo/calm"
    sweep = run / "vectors/steering.json"
    before = leaves(json.loads(sweep.read_text()))
    sweep.unlink()
    with room_for(6):
        stderr = succeed("validate", *options, "--batch-size", "16").stderr
    assert stderr.count("out of memory") == 2  # at 16 and 8
    after = leaves(json.loads(sweep.read_text()))
    assert after == pytest.approx(before, rel=1e-4)  # another batch size rounds otherwise
    assert after != pytest.approx({place: 1.01 * v for place, v in before.items()}, rel=1e-4)


def leaves(value: Any, place: str = "") -> dict[str, float]:
    """Every number in a JSON value, by its place; a text counts as the number of its characters."""
    if isinstance(value, dict | list):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        return {where: leaf for key, one in inside for where, leaf in leaves(one, f"{place}/{key}").items()}
    return {place: float(len(value) if isinstance(value, str) else value or 0)}


def test_without_a_judge_there_is_no_sweep_and_without_instructions_none_to_remove(tmp_path):
    root = make_root(tmp_path)
    result = succeed("extract", "--root", root, "--experiment", "demo", "--judge", "none")
    assert "calm: no steering sweep" in result.stderr
    assert not (root / "experiments/demo/calm/vectors/steering.json").exists()
    bare = {**NATURAL, "name": "bare", "negative_prompts": [p["prompt"] for p in NATURAL["negative_prompts"]]}
    (root / "configs/traits/bare.yaml").write_text(yaml.safe_dump(bare))
    succeed("extract", "--root", root, "--experiment", "demo", "--trait", "bare,warm", "--judge", "none")
    assert not list((root / "experiments/demo/bare/stripped").iterdir())
    assert list((root / "experiments/demo/warm/stripped").iterdir())  # some of its prompts have a system text


def test_natural_prompts_are_steered_without_their_system_text(tmp_path):
    from extraction.pipeline.model_checks import prompts_without_instruction
    from extraction.pipeline.plan import make_plan
    from extraction.pipeline.session import ModelSession, TraitContext

    root = make_root(tmp_path)
    plan = make_plan("demo", "warm", root=str(root), options={"model": str(root / "model")})
    context = TraitContext(ModelSession(plan), plan.traits[0], Silent())
    prompts = prompts_without_instruction(context, ["I love tea.", "I hate us."])
    assert [prompt.text for prompt in prompts] == [
        f"<bos><|user|>\n{text}<|end|>\n<|assistant|>\n" for text in ("I love tea.", "I hate us.")
    ]


def test_activations_without_the_instruction_are_those_of_the_stored_responses():
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from extraction.utils_batch import get_activations_from_texts

    root = extracted_root()
    run = root / "experiments/demo/calm"
    rows = [json.loads(line) for line in (run / "responses/shards/0000.jsonl").read_text().splitlines()]
    path = run / "stripped/0000.safetensors"
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    ids = json.loads(json.loads(header)["__metadata__"]["ids"])
    got = dict(zip(ids, load_file(path)["residual.response_mean"], strict=True))
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    for row in [row for row in rows if row["token_ids"]][:6]:
        chat = [{"role": "user", "content": row["question"]}]
        bare = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        wanted = get_activations_from_texts(model, tokenizer, [(bare, row["token_ids"])])[0]["residual.response_mean"]
        with_it = get_activations_from_texts(model, tokenizer, [(row["prompt_token_ids"], row["token_ids"])])[0]
        assert deviation(got[row["id"]], wanted) < 1e-5
        assert deviation(got[row["id"]], with_it["residual.response_mean"]) > 1e-3  # the control


def test_a_reversed_direction_moves_the_trait_the_wrong_way(pocket_root):
    """A planted wrong sign shows in the sweep's own metrics."""
    from extraction.judging.lexical import judge_lexical
    from extraction.model.loading import load
    from extraction.pipeline.plan import stored_plans
    from extraction.pipeline.session import PromptEncoder
    from extraction.pipeline.steer_preview import SteerSite, directions_at

    (plan,) = stored_plans("pocket", "commitment_strength", root=str(pocket_root), loads_model=True)
    (trait,) = plan.traits
    found = steering_of(pocket_root, "commitment_strength")
    site = SteerSite(found["method"], tuple(found["layers"]))
    right = directions_at(plan.folder(trait), site, 0)
    wrong = replace(right, trait={layer: -vector for layer, vector in right.trait.items()})
    lm = load(plan.spec)

    def scorer(pairs):
        return [Judgement(judge_lexical(question, answer, trait)) for question, answer, _ in pairs]

    questions = [Example(f"q{i}", trait.name, "pos", 0, i, 0, text) for i, text in enumerate(trait.questions[:6])]
    prompts = PromptEncoder(plan, lm.tokenizer, max_tokens=None).encode(questions)
    trying = SteeredGeneration(lm, Sample(1.0), scorer, max_new_tokens=30, batch_size=24)
    push = Condition("trait", "add", site.layers, 1.0)
    rates = [
        condition_metrics(answer_all(trying, prompts, some, [push], 2)[push], 50.0, seed=0)["rate"]["value"]
        for some in (right, wrong)
    ]
    assert rates[0] > 0.6
    assert rates[1] < 0.4
