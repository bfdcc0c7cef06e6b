"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685): find them, and put them on their base model.

peft attaches the adapter. It only warns of tensors that are missing or of the wrong shape; here they are errors.
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
# Values of `init_lora_weights` that leave the base weights unchanged. The others (PiSSA, CorDA, OLoRA, ...) subtract
# something from them, which would happen again here.
UNCHANGED_BASE_INITS = (True, False, "gaussian", "orthogonal", "eva")
# Fields of a config, with the values for which the adapter does not change the base model's tensors.
NEUTRAL_FIELDS = {"bias": "none", "layer_replication": None, "target_parameters": None}


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter's location and config. `base` is the base model's hub id or absolute folder."""

    source: str
    revision: str | None
    config: Mapping[str, Any]
    base: str
    base_revision: str | None

    @property
    def keeps_base_weights(self) -> bool:
        """True if the base's tensors can be shared with a model that does not have the adapter."""
        return all(self.config.get(field) in (None, neutral) for field, neutral in NEUTRAL_FIELDS.items())

    @property
    def has_tokenizer(self) -> bool:
        """True if the adapter's folder has a tokenizer."""
        return all(_find_file(self.source, name, self.revision) for name in TOKENIZER_FILES)


def find_lora(source: str, revision: str | None = None) -> LoraAdapter | None:
    """Return the adapter in a folder or under a hub id; None for a full model. Raises ModelError if unsupported."""
    from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

    path = None
    if os.path.isdir(source) or _can_be_fetched(source, ADAPTER_CONFIG_NAME, revision):
        path = _find_file(source, ADAPTER_CONFIG_NAME, revision)
    if path is None:
        return None
    config = _read_config(path)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{show_path(path)}: 'peft_type' is {show(config.get('peft_type'))}; only LORA is supported")
    if config.get("init_lora_weights", True) not in UNCHANGED_BASE_INITS:
        raise ModelError(
            f"{show_path(path)}: 'init_lora_weights' is {show(config['init_lora_weights'])}, which changes the base "
            "model's weights; convert it to a plain LoRA (peft: path_initial_model_for_weight_conversion)"
        )
    if config.get("alora_invocation_tokens"):
        raise ModelError(
            f"{show_path(path)}: an activated LoRA works on parts of a prompt; only plain LoRA is supported"
        )
    base_revision = config.get("revision")
    return LoraAdapter(source, revision, config, _base_source(config, path), base_revision and str(base_revision))


def _can_be_fetched(source: str, name: str, revision: str | None) -> bool:
    """Return False if a file of a hub repository is not in the cache and the hub can't be reached.

    Asks once: loaders try for a minute. Raises ConnectionError if the cache has no model of this name either.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE or try_to_load_from_cache(source, name, revision=revision) is not None:
        return True
    try:
        get_hf_file_metadata(hf_hub_url(source, name, revision=revision))
    except HfHubHTTPError:
        return True  # it was reached, and loaders report what it says
    except Exception as failure:  # of the HTTP client, which differs by version
        if not isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str):
            raise ConnectionError("couldn't connect to the hub") from failure
        return False
    return True


def _find_file(source: str, name: str, revision: str | None) -> Path | None:
    """Return the path of a file of a folder or hub repository; None if there is none."""
    if os.path.isdir(source):
        path = Path(source) / name
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file

    try:
        fetched = cached_file(source, name, revision=revision)
    except (OSError, ValueError):  # no such file or model, or no connection: loading the model reports which
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


def _base_source(config: Mapping[str, Any], path: Path) -> str:
    """Return the base model that a config names: a folder, relative to the adapter's, else a hub id."""
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name or "\0" in name:
        raise ModelError(
            f"{show_path(path)}: 'base_model_name_or_path' is {show(name)}; write the base model's folder or hub id"
        )
    folder = path.parent / name  # an absolute path stays as it is
    if folder.is_dir():
        return str(folder.resolve())
    if name.startswith((".", "/")) or name.count("/") != 1:
        raise ModelError(
            f"{show_path(path)}: its base model {show(name)} does not exist; restore the folder, or write its path or "
            "its hub id (owner/name) as 'base_model_name_or_path'"
        )
    return name


# --- on a base mo -------------------------------------------------------------------------------------------------


def attach_lora(model: PreTrainedModel, adapter: LoraAdapter) -> PreTrainedModel:
    """Put an adapter on a model, in place, beside its weights; return the model."""
    return _peft_model(model, adapter).get_base_model()  # type: ignore[no-any-return]


def merge_lora(model: PreTrainedModel, adapter: LoraAdapter) -> PreTrainedModel:
    """Merge an adapter into a model's weights, in place, so that it runs as fast as without; return the model."""
    return _peft_model(model, adapter).merge_and_unload(safe_merge=True)  # type: ignore[no-any-return]


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model's modules but not its tensors, so that one copy can get an adapter and the other none."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def check_peft() -> None:
    """Raise ModelError if peft is not installed."""
    try:
        import peft as _  # noqa: F401
    except ImportError as failure:
        raise ModelError(
            "a LoRA adapter needs peft, which is not installed; run: pip install 'traitline[lora]'"
        ) from failure


def _peft_model(model: PreTrainedModel, adapter: LoraAdapter) -> Any:
    """Attach an adapter with all its tensors. Raises ModelError with the first that is missing or does not fit."""
    check_peft()
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    tensors = _tensors(adapter)
    _add_embeddings(model, tensors)
    config: Any = PeftConfig.from_peft_type(**_known_fields(adapter.config))
    config.inference_mode, config.init_lora_weights = True, False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft warns of is checked below
        # on the meta device until loaded: no random numbers are drawn, and a missing tensor stays there
        peft_model: Any = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        _check_shapes(peft_model, tensors, adapter)
        try:
            result: Any = set_peft_model_state_dict(peft_model, _cast(tensors, model.dtype), low_cpu_mem_usage=True)
        except KeyError as failure:  # of a module that is saved in full
            raise _bad_tensors(adapter, [str(failure.args[0])], "missing") from failure
    missing = [name for name, tensor in peft_model.named_parameters() if tensor.is_meta]
    if missing or result.unexpected_keys:
        fault = "missing" if missing else "not of this base model"
        raise _bad_tensors(adapter, missing or list(result.unexpected_keys), fault)
    return peft_model


def _add_embeddings(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Give a model as many embeddings as the adapter's file has: it was trained with added tokens."""
    import torch

    embeddings: Any = model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    saved = [t for name, t in tensors.items() if f"{names[id(embeddings)]}.weight" in name]
    if saved and len(saved[0]) > len(embeddings.weight):
        for module in (embeddings, model.get_output_embeddings()):  # the base may share these tensors, and keeps them
            module.weight = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        model.tie_weights()
        model.resize_token_embeddings(len(saved[0]), mean_resizing=False)


def _known_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config that this version of peft knows.

    Unknown fields are ignored if they hold a number, null, false or nothing (a newer version's defaults). Raises
    ModelError for any other.
    """
    from peft import LoraConfig

    fields = LoraConfig.__dataclass_fields__
    unknown = [name for name, value in config.items() if name not in fields and _is_setting(value)]
    if unknown:
        raise ModelError(
            f"the adapter's config has {show(unknown[0])}, which this version of peft does not know; update peft"
        )
    return {name: value for name, value in config.items() if name in fields}


def _is_setting(value: Any) -> bool:
    return value is True or (isinstance(value, str | list | dict) and bool(value))


def _tensors(adapter: LoraAdapter) -> dict[str, Tensor]:
    from safetensors.torch import load_file
    from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

    path = _find_file(adapter.source, ADAPTER_SAFE_WEIGHTS_NAME, adapter.revision)
    if path is None:
        raise ModelError(
            f"{show_path(adapter.source)}: the adapter has no {ADAPTER_SAFE_WEIGHTS_NAME}; fetch it, or convert the "
            "pickled weights"
        )
    return load_file(path)


def _cast(tensors: Mapping[str, Tensor], dtype: Any) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _check_shapes(peft_model: Any, tensors: Mapping[str, Tensor], adapter: LoraAdapter) -> None:
    """Raise ModelError if a tensor of the file has another shape than the model's of that name."""
    from peft import get_peft_model_state_dict

    expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    wrong = [name for name, tensor in expected.items() if name in tensors and tensors[name].shape != tensor.shape]
    if wrong:
        raise _bad_tensors(adapter, wrong, "of another shape")


def _bad_tensors(adapter: LoraAdapter, names: list[str], fault: str) -> ModelError:
    first = names[0].replace(".default", "")
    return ModelError(
        f"{show_path(adapter.source)}: {len(names)} tensors of the adapter are {fault} ({first}); fetch it again, or "
        "give the base model that it was trained on"
    )
