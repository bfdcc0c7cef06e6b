"""The table of judges: each returns how far a response shows a trait, from 0 (negative side) to 100 (positive side).

To add a judge, write its module with a `JUDGE` (a `RuleJudge`, `OwnModelJudge` or `ModelJudge` of `base.py`) and give
it a line in `JUDGES`. The setting `judge`, the help, the scoring of a run and its checks read this table.
"""

from __future__ import annotations

from pathlib import Path

from extraction.config.experiments import Experiment
from extraction.core.errors import ConfigError
from extraction.core.records import Trait
from extraction.core.text import show, suggest
from extraction.judging import lexical, likelihood, local, openai_server
from extraction.judging.base import ModelJudge, OwnModelJudge, RuleJudge
from extraction.judging.rubric import check_rubric

JUDGES: dict[str, RuleJudge | OwnModelJudge | ModelJudge] = {
    "lexical": lexical.JUDGE,
    "likelihood": likelihood.JUDGE,
    "none": RuleJudge(lambda question, response, trait: None),  # every score is missing
    "local": local.JUDGE,
    "openai": openai_server.JUDGE,
}
JUDGE_NAMES = ("auto", *JUDGES)  # the values of the setting `judge`


def is_model_judge(name: str) -> bool:
    """True if the judge is a language model, which also rates coherence and keeps a log."""
    return isinstance(JUDGES.get(name), ModelJudge)


def resolve_judge(name: str, trait: Trait, *, place: str = "") -> str:
    """Return the name of a trait's judge: `auto` is lexical if the trait has markers, else none.

    Raises ConfigError for an unknown name (`place` starts its message), TraitError for a trait that it can't judge.
    """
    if name not in ("auto", *JUDGES):
        raise ConfigError(f"{place}--judge {show(name)}: not known; {suggest(name, ('auto', *JUDGES))}")
    if name == "auto":
        name = "lexical" if trait.markers else "none"
    judge = JUDGES[name]
    if isinstance(judge, ModelJudge):
        check_rubric(trait)
    else:
        judge.check(trait)
    return name


def model_judge(name: str) -> ModelJudge:
    """Return the model judge of that name."""
    judge = JUDGES[name]
    assert isinstance(judge, ModelJudge)
    return judge


def judge_model(settings: Experiment, root: Path) -> str:
    """Return the judge's model as logs and cards name it; an empty string without one."""
    judge = JUDGES.get(settings.judge)
    return judge.model_name(settings, root) if isinstance(judge, ModelJudge) else settings.judge_model or ""


def check_judge(settings: Experiment, trait: Trait, root: Path) -> None:
    """Raise ConfigError or TraitError for all that is known to be wrong before anything is loaded or called."""
    name = resolve_judge(settings.judge, trait, place=f"experiment {settings.name}: ")
    judge = JUDGES[name]
    if isinstance(judge, ModelJudge):
        if settings.judge_model is None:
            raise ConfigError(f"--judge {name}: no model given; give --judge-model: {judge.model_help}")
        judge.check_settings(settings, root)


def check_judge_access(settings: Experiment, root: Path) -> None:
    """Raise ConfigError if the judge can't be called: no key, or a package is missing."""
    judge = JUDGES.get(settings.judge)
    if isinstance(judge, ModelJudge):
        judge.check_access(settings, root)


def check_judge_model(settings: Experiment, root: Path) -> None:
    """Raise ModelError if the judge's model can't write a score. Cheaper than loading it."""
    judge = JUDGES.get(settings.judge)
    if isinstance(judge, ModelJudge):
        judge.check_model(settings, root)
