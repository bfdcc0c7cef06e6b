"""One trait of several that fails: it is named, the exit code is 2, and the other traits are those of a run alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from extraction.core.errors import ActivationError
from extraction.pipeline import stages
from extraction.pipeline.session import TraitContext
from tests.runs import TRAIT, contents, invoke, payloads


def run_of(root: Path) -> Path:
    return root / "experiments/demo/calm"


TOO_LONG = TRAIT | {"name": "long", "questions": [*TRAIT["questions"][:-1], "Why " * 200]}
UNSCORED = TRAIT | {"name": "mute", "markers": {"positive": ["re:ZZZZ"], "negative": ["re:QQQQ"]}}


def run_with(root: Path, command: str, traits: str, *options: object) -> tuple[int, str, list[str]]:
    """Return the exit code, the summary, and the error lines of a command on some traits."""
    result = invoke(command, "--root", root, "--experiment", "demo", "--trait", traits, *options)
    return result.exit_code, result.stdout, [x for x in result.stderr.splitlines() if x.startswith("traitline: ")]


@pytest.mark.parametrize("trait", [TOO_LONG, UNSCORED], ids=lambda trait: trait["name"])
def test_a_trait_that_fails_is_named_and_the_others_are_those_of_a_run_alone(root, finished, trait):
    name = trait["name"]
    (root / f"configs/traits/{name}.yaml").write_text(yaml.safe_dump(trait))
    few = ("--samples-per-coef", "2") if trait is TOO_LONG else ("--quick",)
    method = () if trait is TOO_LONG else ("--method", "mean_diff")
    code, out, errors = run_with(root, "extract", f"{name},calm", *few, *method)
    assert (code, len(errors)) == (2, 1)
    assert errors[0].startswith(f"traitline: trait {name}: ")
    assert re.findall("^(.*) on tiny$", out, re.MULTILINE) == ["calm"]
    assert payloads(run_of(root), "responses/shards").keys() == payloads(finished, "responses/shards").keys()
    assert (run_of(root) / "vectors/card.json").exists()
    if trait is TOO_LONG:  # it has no part in a batch
        assert contents(run_of(root)) == contents(finished)
        code, out, errors = run_with(root, "generate", f"calm,{name}")
        assert (code, len(errors), "calm on tiny" in out) == (2, 1, True)
    else:
        for command in ("vectors", "validate"):
            options = few if command == "validate" else ()
            code, out, errors = run_with(root, command, f"{name},calm", *method, *options)
            assert (code, len(errors), "calm on tiny" in out) == (2, 1, True)
            assert f"trait {name}: " in errors[0]
    assert run_with(root, "extract", "calm", *few, *method)[0] == 0  # the control


def test_an_error_that_all_traits_have_is_one_line(root):
    (root / "model/chat_template.jinja").unlink(missing_ok=True)
    path = root / "model/tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    (root / "configs/traits/calmer.yaml").write_text(yaml.safe_dump(TRAIT | {"name": "calmer"}))
    code, out, errors = run_with(root, "extract", "calm,calmer")
    assert (code, out, len(errors)) == (2, "", 1)
    assert "--raw" in errors[0]


def test_every_trait_that_fails_has_a_line(root, monkeypatch):
    def fail(context: TraitContext, _: object) -> None:
        raise ActivationError(f"example {context.trait.name[0]} is NaN")

    monkeypatch.setattr(stages, "fit_trait", fail)
    (root / "configs/traits/hot.yaml").write_text(yaml.safe_dump(TRAIT | {"name": "hot"}))
    code, out, errors = run_with(root, "extract", "calm,hot", "--quick")
    assert (code, out) == (2, "")
    assert errors == ["traitline: trait calm: example c is NaN", "traitline: trait hot: example h is NaN"]
