"""Write a new trait file with the texts of a chat model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from extraction.config.experiments import Experiment, find_config, find_root
from extraction.config.settings import ExperimentSettings
from extraction.config.traits import trait_from_yaml
from extraction.config.validation import validate
from extraction.config.yaml_loader import SourceLocation
from extraction.core.errors import ConfigError, TraitError
from extraction.core.names import check_name
from extraction.core.text import show, show_path
from extraction.exchange.trait_files import trait_yaml
from extraction.judging.local import ask_local
from extraction.judging.openai_server import ask_server
from extraction.judging.trait_author import write_trait
from extraction.storage.atomic import reporting_store_errors
from extraction.storage.output_file import place_file

SERVER_TOKENS = 4000  # of one answer, with what a model may think before it
LOCAL_TOKENS = 700  # a small model that does not stop would take minutes


def new_trait(
    name: str,
    description: str,
    *,
    judge_model: str | None = None,
    judge_url: str | None = None,
    root: str | None = None,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Write configs/traits/<name>.yaml, of a model behind `judge_url`, or of a local one. Returns lines for the user.

    Raises TraitError if the model's answers can't be used. Nothing is written then.
    """
    top = find_root(root)
    path = top / "configs" / "traits" / f"{check_name(name, 'trait', TraitError)}.yaml"
    if path.exists() and not overwrite:
        raise TraitError(f"{show_path(path)}: is there already; give --overwrite to replace it, or another name")
    if not description.strip():
        raise TraitError(f"--description {show(description)}: is empty; say what the trait is, and its opposite")
    if judge_model is None and judge_url is None:
        raise ConfigError("no model given; give --judge-model of this machine, or --judge-url of a server")
    values = {"model": "none", "judge_model": judge_model, "judge_url": judge_url}
    settings = Experiment(name=name, **dict(validate(ExperimentSettings, values, SourceLocation(None))))
    local = nullcontext(ask_local(settings, top, note, LOCAL_TOKENS)) if judge_url is None else None
    with local or ask_server(settings, SERVER_TOKENS) as ask:
        fields = write_trait(ask, name, " ".join(description.split()), note)
    data = trait_yaml({"name": name, **fields})
    trait = trait_from_yaml(name, data, f"{show_path(path)} as written by the model")
    hidden = find_config("traits", name, top, TraitError)
    with reporting_store_errors(path.parent, "create"):
        path.parent.mkdir(parents=True, exist_ok=True)
    place_file(path, data, force=overwrite)
    hides = [f"it hides {show_path(hidden)}"] if hidden is not None and hidden != path else []
    contents = f"{len(trait.instructions)} instruction pairs, {len(trait.questions)} questions and a rubric"
    return [
        f"{show_path(path)}: {contents}",
        *hides,
        "a model wrote it: read and edit it before a run, since the vector will be of what stands there",
    ]
