"""LoRA adapters: small files that change a model, which is named in their config (Hu et al. 2021, arXiv 2106.09685).

An adapter is put on a model by peft, whole or not at all: peft itself only warns of a tensor that is missing.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.core.errors import ModelError
from extraction.core.text import show, show_path

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

MAX_CONFIG_BYTES = 10_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Ways to start an adapter that leave the model's own weights as they were; the others (PiSSA, CorDA, OLoRA, ...) take
# something away from them, which would be done again here.
GENTLE_STARTS = (True, False, "gaussian", "orthogonal", "eva")
# Fields with which an adapter touches the model's own tensors, so that no other model may share them.
INVASIVE = {"bias": "none", "layer_replication": None, "target_parameters": None}


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter that was found. `base` is a hub id or an absolute folder; `config` what its file says."""

    source: str
    revision: str | None
    config: Mapping[str, Any]
    base: str
    base_revision: str | None

    @property
    def leaves_base_alone(self) -> bool:
        """Whether the base's tensors can be shared with a model that does not have the adapter."""
        return all(self.config.get(field) in (None, plain) for field, plain in INVASIVE.items())

    @property
    def has_tokenizer(self) -> bool:
        """Whether it brings a tokenizer of its own."""
        return all(_found(self.source, name, self.revision) for name in TOKENIZER_FILES)


def find_lora(source: str, revision: str | None = None) -> LoraAdapter | None:
    """The adapter in a folder, or behind a hub id; None where there is a model instead. Raises ModelError."""
    from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

    path = _found(source, ADAPTER_CONFIG_NAME, revision)
    if path is None:
        return None
    config = _read_config(path)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{show_path(path)}: 'peft_type' is {show(config.get('peft_type'))}; only LORA is supported")
    if config.get("init_lora_weights", True) not in GENTLE_STARTS:
        raise ModelError(
            f"{show_path(path)}: 'init_lora_weights' is {show(config['init_lora_weights'])}, which changes the base "
            "model's weights; convert it to a plain LoRA (peft: path_initial_model_for_weight_conversion)"
        )
    if config.get("alora_invocation_tokens"):
        raise ModelError(
            f"{show_path(path)}: an activated LoRA works on parts of a prompt; only plain LoRA is supported"
        )
    revision_of_base = config.get("revision")
    return LoraAdapter(source, revision, config, _base_of(config, path), revision_of_base and str(revision_of_base))


def _found(source: str, name: str, revision: str | None) -> Path | None:
    """A file of a folder or of the hub, if it is there."""
    if os.path.isdir(source):
        path = Path(source) / name
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file

    try:
        fetched = cached_file(source, name, revision=revision)
    except (OSError, ValueError):  # no such file, no such model or no way to the hub: who loads the model says which
        return None
    return None if fetched is None else Path(fetched)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"more than {MAX_CONFIG_BYTES} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        reason = " ".join(str(failure).split())[:160]
        raise ModelError(f"{show_path(path)}: not a JSON file ({reason}); fetch the adapter again") from failure
    if not isinstance(config, dict):
        raise ModelError(f"{show_path(path)}: not an adapter's config; fetch the adapter again")
    return config


def _base_of(config: Mapping[str, Any], path: Path) -> str:
    """The model under an adapter: a folder, looked for from the adapter's own, else a hub id."""
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named or "\0" in named:
        raise ModelError(
            f"{show_path(path)}: 'base_model_name_or_path' is {show(named)}; write the base model's folder or hub id"
        )
    folder = path.parent / named  # an absolute path stays as it is
    if folder.is_dir():
        return str(folder.resolve())
    if named.startswith((".", "/")) or named.count("/") != 1:
        raise ModelError(
            f"{show_path(path)}: its base model {show(named)} is not there; put the folder back, or write its path or "
            "its hub id (owner/name) as 'base_model_name_or_path'"
        )
    return named


# --- on a model -----------------------------------------------------------------------------------------------------


def attach_lora(model: PreTrainedModel, adapter: LoraAdapter) -> PreTrainedModel:
    """The same model, changed in place, with the adapter beside its weights."""
    return _peft_model(model, adapter).get_base_model()  # type: ignore[no-any-return]


def merge_lora(model: PreTrainedModel, adapter: LoraAdapter) -> PreTrainedModel:
    """The same model, changed in place, with the adapter added to its weights: as fast as without one."""
    return _peft_model(model, adapter).merge_and_unload(safe_merge=True)  # type: ignore[no-any-return]


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second model on the same tensors: modules of its own, so that one may get an adapter and the other none."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def check_peft() -> None:
    """Raise ModelError where adapters can't be used."""
    try:
        import peft as _  # noqa: F401
    except ImportError as failure:
        raise ModelError(
            "a LoRA adapter needs peft, which is not installed; run: pip install 'traitline[lora]'"
        ) from failure


def _peft_model(model: PreTrainedModel, adapter: LoraAdapter) -> Any:
    """peft's model, with every tensor of the adapter in its place. Raises ModelError naming the first that is not."""
    check_peft()
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    tensors = _tensors(adapter)
    config: Any = PeftConfig.from_peft_type(**_known(adapter.config))
    config.inference_mode, config.init_lora_weights = True, False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they warn of is checked below
        # on the meta device until loaded: no random numbers are drawn, and a tensor that is not loaded stays there
        peft_model: Any = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        _refuse_misshapen(peft_model, tensors, adapter)
        try:
            result: Any = set_peft_model_state_dict(peft_model, _cast(tensors, model.dtype), low_cpu_mem_usage=True)
        except KeyError as failure:  # of a module that is saved whole
            raise _incomplete(adapter, [str(failure.args[0])], "missing") from failure
    missing = [name for name, tensor in peft_model.named_parameters() if tensor.is_meta]
    if missing or result.unexpected_keys:
        word = "missing" if missing else "not of this base model"
        raise _incomplete(adapter, missing or list(result.unexpected_keys), word)
    return peft_model


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    """What this version of peft knows of a config. Of another field, only a number may be left out: it is a default."""
    from peft import LoraConfig

    fields = LoraConfig.__dataclass_fields__
    foreign = [name for name, value in config.items() if name not in fields and (value is True or _says(value))]
    if foreign:
        raise ModelError(
            f"the adapter's config has {show(foreign[0])}, which this version of peft does not know; update peft"
        )
    return {name: value for name, value in config.items() if name in fields}


def _says(value: Any) -> bool:
    return isinstance(value, str | list | dict) and bool(value)


def _tensors(adapter: LoraAdapter) -> dict[str, Tensor]:
    from safetensors.torch import load_file
    from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

    path = _found(adapter.source, ADAPTER_SAFE_WEIGHTS_NAME, adapter.revision)
    if path is None:
        raise ModelError(
            f"{show_path(adapter.source)}: the adapter has no {ADAPTER_SAFE_WEIGHTS_NAME}; fetch it, or convert the "
            "pickled weights"
        )
    return load_file(path)


def _cast(tensors: Mapping[str, Tensor], dtype: Any) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _refuse_misshapen(peft_model: Any, tensors: Mapping[str, Tensor], adapter: LoraAdapter) -> None:
    """Where a tensor of the file and its place in the model have the same name, they must have the same shape."""
    from peft import get_peft_model_state_dict

    places = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    wrong = [name for name, place in places.items() if name in tensors and tensors[name].shape != place.shape]
    if wrong:
        raise _incomplete(adapter, wrong, "of another shape")


def _incomplete(adapter: LoraAdapter, names: list[str], word: str) -> ModelError:
    first = names[0].replace(".default", "")
    return ModelError(
        f"{show_path(adapter.source)}: tensors of the adapter that are {word}: {len(names)} ({first}); fetch it again, "
        "or give the base model that it was made for"
    )
