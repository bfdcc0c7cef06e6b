"""The bodies of `traitline export --trait-json`, and of `traitline import` for traits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from extraction.config.experiments import find_config, find_root
from extraction.config.traits import load_trait, trait_from_yaml
from extraction.config.yaml_loader import MAX_YAML_BYTES
from extraction.core.errors import TraitError
from extraction.core.names import check_name
from extraction.core.text import show_path
from extraction.exchange.persona_traits import trait_to_persona
from extraction.exchange.trait_files import read_trait_files, trait_yaml
from extraction.exchange.trait_forms import FORMS, find_form
from extraction.storage.atomic import reporting_store_errors
from extraction.storage.output_file import place_file


def import_trait(
    paths: Sequence[str], name: str, *, root: str | None, format: str | None = None, force: bool = False
) -> list[str]:
    """Turn others' trait files into configs/traits/<name>.yaml. Returns what to say. Raises TraitError."""
    top = find_root(root)
    path = top / "configs" / "traits" / f"{check_name(name, '--as', TraitError)}.yaml"
    files = read_trait_files(paths, as_text=format == "prompts")
    form = find_form(files, format)
    content = FORMS[form].convert(files)
    data = trait_yaml({"name": name, **content.fields})
    if len(data) > MAX_YAML_BYTES:
        raise TraitError(f"{show_path(path)}: would have {len(data)} bytes; at most {MAX_YAML_BYTES}, import fewer")
    trait = trait_from_yaml(name, data, f"{show_path(path)} as imported")
    hidden = find_config("traits", name, top, TraitError)
    with reporting_store_errors(path.parent, "create"):
        path.parent.mkdir(parents=True, exist_ok=True)
    place_file(path, data, force=force)
    sides = [f"{len(trait.instructions)} instruction pairs, {len(trait.questions)} questions"]
    if trait.is_natural:
        sides = [f"{len(trait.positive_prompts)} positive and {len(trait.negative_prompts)} negative prompts"]
    said = f"{', '.join(file.path.name for file in files)}: read as {form}: {sides[0]}"
    hides = (f"it hides {show_path(hidden)}",) if hidden is not None and hidden != path else ()
    return [said, *content.notes, *hides, f"trait {name} is in {show_path(path)}"]


def export_trait(name: str, *, root: str | None, output: str | None, force: bool) -> list[str]:
    """Write a trait as a persona_vectors trait JSON. Returns what to say. Raises TraitError."""
    trait = load_trait(name, find_root(root))
    path = Path(output or f"{name}.json")
    data = json.dumps(trait_to_persona(trait), indent=4, ensure_ascii=False) + "\n"
    place_file(path, data.encode(), force=force)
    told = [] if trait.rubric else ["it has no eval_prompt, since the trait has no rubric: their judge needs one"]
    return [f"{show_path(path)}: trait {name} as a persona_vectors trait", *told]
