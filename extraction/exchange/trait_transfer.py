"""Import traits of other programs as configs/traits/<name>.yaml, and export a trait as persona_vectors JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from extraction.config.experiments import find_config, find_root
from extraction.config.traits import load_trait_sets, trait_from_yaml
from extraction.config.yaml_loader import MAX_YAML_BYTES
from extraction.core.errors import TraitError
from extraction.core.names import check_name
from extraction.core.text import show_path
from extraction.exchange.persona_traits import trait_to_persona
from extraction.exchange.trait_files import read_trait_files, trait_yaml
from extraction.exchange.trait_formats import TRAIT_FORMATS, find_trait_format
from extraction.storage.atomic import reporting_store_errors
from extraction.storage.output_file import place_file


def import_trait(
    paths: Sequence[str], name: str, *, root: str | None, format: str | None = None, force: bool = False
) -> list[str]:
    """Convert trait files to configs/traits/<name>.yaml. Returns lines for the user. Raises TraitError."""
    top = find_root(root)
    path = top / "configs" / "traits" / f"{check_name(name, '--as', TraitError)}.yaml"
    files = read_trait_files(paths, as_text=format == "prompts")
    format_name = find_trait_format(files, format)
    fields = TRAIT_FORMATS[format_name].convert(files)
    data = trait_yaml({"name": name, **fields.fields})
    if len(data) > MAX_YAML_BYTES:
        raise TraitError(
            f"{show_path(path)}: would have {len(data)} bytes; at most {MAX_YAML_BYTES}: import fewer prompts"
        )
    trait = trait_from_yaml(name, data, f"{show_path(path)} as imported")
    hidden = find_config("traits", name, top, TraitError)
    with reporting_store_errors(path.parent, "create"):
        path.parent.mkdir(parents=True, exist_ok=True)
    place_file(path, data, force=force)
    contents = f"{len(trait.instructions)} instruction pairs, {len(trait.questions)} questions"
    if trait.is_natural:
        contents = f"{len(trait.positive_prompts)} positive and {len(trait.negative_prompts)} negative prompts"
    summary = f"{', '.join(file.path.name for file in files)}: read as {format_name}: {contents}"
    hides = (f"it hides {show_path(hidden)}",) if hidden is not None and hidden != path else ()
    return [summary, *fields.notes, *hides, f"trait {name} is in {show_path(path)}"]


def export_trait(name: str, *, root: str | None, output: str | None, force: bool) -> list[str]:
    """Write a trait as persona_vectors JSON. Returns lines for the user. Raises TraitError."""
    sets = load_trait_sets(name, find_root(root))
    trait = sets.resolve()
    path = Path(output or f"{name}.json")
    data = json.dumps(trait_to_persona(trait), indent=4, ensure_ascii=False) + "\n"
    place_file(path, data.encode(), force=force)
    notes = (
        [] if trait.rubric else ["no eval_prompt in it, since the trait has no rubric; persona_vectors' judge needs it"]
    )
    if sets.families:
        notes.append(f"left out: what the trait has for models of the family {' and '.join(sets.families)}")
    return [f"{show_path(path)}: trait {name} as a persona_vectors trait", *notes]
