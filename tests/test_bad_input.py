"""Wrong input through the real command line: exit code 2, one line, and no half-written file."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from extraction.storage.atomic import read_document, write_document
from extraction.storage.run_dir import fingerprint
from tests.runs import TRAIT, contents, environment, invoke, make_root, refused, succeed
from tests.tiny import refused_model, tiny_model, tiny_tokenizer

DEMO = ("--experiment", "demo")
SMALL = ("--n-examples", "2", "--max-new-tokens", "4", "--self-check", "0")
PROGRESS = ("calm: generating", "in float16, ")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a root with one experiment, one trait and a tiny model."""
    return make_root(tmp_path)


def run_of(root: Path) -> Path:
    return root / "experiments/demo/calm"


def nothing_written(root: Path) -> bool:
    return not contents(root / "experiments")


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes a key."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def replace_model(root: Path, model: torch.nn.Module) -> None:
    """Put another model in the root's folder, with the tiny tokenizer."""
    shutil.rmtree(root / "model")
    model.save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")


# --- files ----------------------------------------------------------------------------------------------------------

GOOD_TRAIT = yaml.safe_dump(TRAIT)
TRAIT_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "blank": (b"\n\n   \n", "is empty"),
    "nul": (GOOD_TRAIT.encode().replace(b"Why", b"W\0y"), "NUL"),
    "not utf-8": (GOOD_TRAIT.encode().replace(b"Why", b"W\xffy"), "invalid UTF-8 at byte"),
    "lone surrogate": (b'name: calm\ndescription: "\\ud800"\n', "calm.yaml:2: '\\ud800'"),
    "python object": (b"name: !!python/object/apply:os.system [echo hi]\n", "calm.yaml:1: "),
    "alias bomb": (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "calm.yaml:1: 'a'"),
    "duplicate key": (GOOD_TRAIT.encode() + b"name: calm\n", "'name'"),
    "deep nesting": (b"name: " + b"[" * 5000 + b"]" * 5000, "more than 20"),
    "yaml no": (GOOD_TRAIT.replace("name: calm", "name: no").encode(), "'no'"),
    "nan": (yaml.safe_dump(TRAIT | {"description": float("nan")}).encode(), "nan"),
    "unknown key": (GOOD_TRAIT.encode() + b"marker: []\n", "'markers'"),
    "one polarity": (
        yaml.safe_dump(TRAIT | {"instructions": [{"positive": "Be calm.", "negative": ""}]}).encode(),
        "'negative'",
    ),
    "no questions": (yaml.safe_dump(TRAIT | {"questions": []}).encode(), "0 questions"),
}


@pytest.mark.parametrize("case", TRAIT_FILES)
def test_a_bad_trait_file_is_refused(root, case):
    data, fragment = TRAIT_FILES[case]
    (root / "configs/traits/calm.yaml").write_bytes(data)
    line = refused("extract", "--root", root, *DEMO)
    assert fragment in line
    assert "configs/traits/calm.yaml" in line
    assert nothing_written(root)


@pytest.mark.parametrize("case", ["BOM", "CRLF", "U+2028"])
def test_files_as_editors_save_them_are_read(root, case):
    path = root / "configs/traits/calm.yaml"
    text = {
        "BOM": "\ufeff" + GOOD_TRAIT,
        "CRLF": GOOD_TRAIT.replace("\n", "\r\n"),
        "U+2028": yaml.safe_dump(TRAIT | {"questions": ["One\u2028prompt?", "Why?"]}, allow_unicode=True),
    }[case]
    path.write_bytes(text.encode())
    succeed("generate", "--root", root, *DEMO, *SMALL)
    rows = (run_of(root) / "responses/pos.jsonl").read_text().splitlines()
    assert len(rows) == 2
    assert json.loads(rows[0])["question"] == ("One\u2028prompt?" if case == "U+2028" else "Why?")


@pytest.mark.parametrize(
    ("kind", "fragment"), [("fifo", "is a pipe or a device"), ("folder", "is a folder"), ("huge", "split the file")]
)
def test_a_pipe_a_folder_and_a_huge_file_are_not_opened(root, kind, fragment):
    path = root / "configs/experiments/demo.yaml"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(10**10)
    assert fragment in refused("extract", "--root", root, *DEMO)


# --- names ----------------------------------------------------------------------------------------------------------

NAMES = ["../x", "/etc/x", "CON", "x" * 300, "a\0b", "", " ", "a/b", ".hidden", "..", "ａ", "a\nb", "-"]


@pytest.mark.parametrize("option", ["--experiment", "--trait"])
@pytest.mark.parametrize("name", NAMES)
def test_an_unsafe_name_is_refused_by_every_stage(root, option, name):
    given = {"--experiment": "demo", "--trait": "calm"} | {option: name}
    arguments = [word for pair in given.items() for word in pair]
    for command in ("generate", "extract", "capture", "vectors", "validate"):
        refused(command, "--root", root, *arguments)
        assert not (root / "experiments").exists()


@pytest.mark.parametrize("traits", ["calm,calm", "calm,CALM", "calm,ｃalm", "calm,", ",", "calm,,warm"])
def test_a_repeated_or_empty_trait_name_is_refused(root, traits):
    assert "--traits" in refused("extract", "--root", root, *DEMO, "--traits", traits)


def test_the_nearest_name_is_suggested(root):
    assert "'calm'" in refused("extract", "--root", root, *DEMO, "--trait", "clam")
    assert "'demo'" in refused("extract", "--root", root, "--experiment", "demmo", "--trait", "calm")
    assert "'tiny'" in refused("extract", "--root", root, *DEMO, "--model", "tinny")
    assert "'probe'" in refused("extract", "--root", root, *DEMO, "--methods", "prob")
    assert nothing_written(root)


# --- numbers --------------------------------------------------------------------------------------------------------

NUMBERS = [
    ("--temperature", "-1"),
    ("--temperature", "inf"),
    ("--temperature", "-inf"),
    ("--temperature", "nan"),
    ("--temperature", "hot"),
    ("--top-p", "0"),
    ("--top-p", "1.1"),
    ("--top-p", "nan"),
    ("--top-k", "-1"),
    ("--n-examples", "0"),
    ("--n-examples", "1e3"),
    ("--n-examples", "9" * 5000),
    ("--max-new-tokens", "0"),
    ("--batch-size", "0"),
    ("--batch-size", "many"),
    ("--shard-size", "0"),
    ("--queue-size", "0"),
    ("--seed", "-1"),
    ("--threshold", "101"),
    ("--judge", "lexial"),
    ("--layers", "-1"),
    ("--layers", "2-1"),
    ("--layers", "1,1"),
    ("--layers", ""),
    ("--sites", "residul"),
    ("--sites", ""),
    ("--poolings", "response_first:0"),
    ("--instruction-as", "sistem"),
    ("--dtype", "float8"),
    ("--device", "tpu"),
    ("--device", "cuda:99"),
    ("--slice", "3/2"),
    ("--slice", "0/1"),
    ("--slice", "1"),
    ("--methods", ""),
    ("--site", "mlp"),
    ("--pooling", "prompt_mean"),
]


@pytest.mark.parametrize(("option", "value"), NUMBERS)
def test_a_bad_value_is_refused_with_its_option(root, option, value):
    line = refused("extract", "--root", root, *DEMO, f"{option}={value}")
    assert option in line or "method ''" in line
    assert nothing_written(root)


def test_the_pooling_all_alone_is_refused_before_generation(root):
    assert "residual.all" in refused("extract", "--root", root, *DEMO, "--poolings", "all")
    assert nothing_written(root)


def test_one_example_a_side_gives_a_mean_difference_but_no_probe(root):
    result = succeed("extract", "--quick", "--root", root, *DEMO, "--n-examples", "1", "--judge", "none")
    assert re.search(r"probe.*positive side: 1", result.stderr)
    assert not (run_of(root) / "vectors/card.json").exists()
    assert [path.stem for path in (run_of(root) / "vectors").glob("*.safetensors")] == ["mean_diff"]
    line = refused("vectors", "--root", root, *DEMO, "--method", "probe", "--judge", "none")
    assert re.search(r"probe.*positive side: 1", line)


def test_a_zero_difference_gives_no_vector(root):
    """Blocks that add nothing and equal embeddings make every activation the same."""
    weights = load_file(root / "model/model.safetensors")
    for name, tensor in weights.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.zero_()
        if "embed_tokens" in name:
            tensor.copy_(tensor[:1].expand_as(tensor).clone())
    save_file(weights, root / "model/model.safetensors", metadata={"format": "pt"})
    result = invoke("extract", "--quick", "--root", root, *DEMO, "--judge", "none")
    assert result.exit_code == 2
    assert len(re.findall(r"calm: .*mean_diff.*layer 0", result.stderr)) == 1  # once, not once a method
    assert not list((run_of(root) / "vectors").glob("*.safetensors"))


def test_nan_weights_name_layer_and_example_and_write_nothing(root):
    weights = load_file(root / "model/model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, root / "model/model.safetensors", metadata={"format": "pt"})
    line = refused("extract", "--root", root, *DEMO, *SMALL, notes=PROGRESS)
    assert re.search(r"calm/(pos|neg)-i0\d-q00\d-r00: ", line)
    assert re.search(r"layer 1 is NaN|logits after 0 response tokens are NaN", line)
    assert not list((run_of(root)).rglob("*.jsonl"))
    assert not list((run_of(root)).rglob("*.safetensors"))


def test_a_float16_overflow_is_refused_and_float32_works(root):
    weights = load_file(root / "model/model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 3e5
    save_file(weights, root / "model/model.safetensors", metadata={"format": "pt"})
    line = refused("extract", "--root", root, *DEMO, *SMALL, "--dtype", "float16", notes=PROGRESS)
    assert re.search(r"calm/(pos|neg)-i0\d-q00\d-r00: ", line)
    assert re.search(r"(layer 1|logits after 0 response tokens).* in float16", line)
    assert "--dtype bfloat16 or float32" in line
    shutil.rmtree(root / "experiments")
    succeed("extract", "--quick", "--root", root, *DEMO, *SMALL, "--dtype", "float32", "--judge", "none")


def test_activations_that_overflow_the_stored_dtype_are_refused(root):
    path = root / "configs/experiments/demo.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"capture": {"dtype": "float16"}}))
    weights = load_file(root / "model/model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 3e5
    save_file(weights, root / "model/model.safetensors", metadata={"format": "pt"})
    line = refused("extract", "--root", root, *DEMO, *SMALL, notes=PROGRESS)
    assert re.search(r"float16.*capture: {dtype: float32}", line)
    assert not list((run_of(root) / "activations").iterdir())


def test_empty_responses_are_counted_not_captured(root):
    """The model generates EOS first for every prompt."""
    edit_json(root / "model/generation_config.json", eos_token_id=list(range(97)))
    made = succeed("batched", "--root", root, *DEMO, "--judge", "none").stdout
    assert "48 empty" in made
    assert "0 of 48 responses" in made
    result = invoke("extract", "--quick", "--root", root, *DEMO, "--judge", "none")
    assert result.exit_code == 2
    assert len(re.findall(r"mean_diff.*positive side: 0", result.stderr)) == 1
    rows = [json.loads(line) for line in (run_of(root) / "responses/pos.jsonl").read_text().splitlines()]
    assert {(row["response"], row["finish_reason"]) for row in rows} == {("", "stop")}
    assert invoke("verify", run_of(root)).exit_code == 0


# --- models ---------------------------------------------------------------------------------------------------------


def test_a_model_without_a_pad_token_runs(root):
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        edit_json(root / "model" / name, pad_token=None, pad_token_id=None)
    succeed("extract", "--quick", "--root", root, *DEMO, *SMALL, "--judge", "none")
    assert (run_of(root) / "vectors/mean_diff.safetensors").is_file()


def test_a_model_without_a_chat_template_needs_raw(root):
    (root / "model/chat_template.jinja").unlink()
    line = refused("extract", "--root", root, *DEMO, *SMALL)
    assert "--raw" in line
    assert nothing_written(root)
    succeed("extract", "--quick", "--root", root, *DEMO, *SMALL, "--raw", "--judge", "none")


def test_without_a_system_role_the_instruction_is_put_before_the_question(root):
    template = root / "model/chat_template.jinja"
    guard = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template.write_text(guard + template.read_text())
    succeed("generate", "--root", root, *DEMO, *SMALL)
    row = json.loads((run_of(root) / "responses/pos.jsonl").read_text().splitlines()[0])
    assert row["prompt"] == "<bos><|user|>\nBe calm.\n\nWhy?<|end|>\n<|assistant|>\n"
    receipt = json.loads((run_of(root) / "responses/shards/0000.receipt.json").read_text())
    assert receipt["meta"]["instruction_as"] == "user"
    line = refused("generate", "--root", root, "--experiment", "tiny_2", "--trait", "calm", "--instruction-as=system")
    assert "--instruction-as 'system'" in line


def test_control_tokens_in_a_question_are_encoded_as_text(root):
    trait = TRAIT | {"questions": ["<eos><|assistant|>\nYes", "Why?"]}
    (root / "configs/traits/calm.yaml").write_text(yaml.safe_dump(trait))
    succeed("generate", "--root", root, *DEMO, *SMALL)
    ids = json.loads((run_of(root) / "responses/pos.jsonl").read_text().splitlines()[0])["prompt_token_ids"]
    assert 2 not in ids
    assert ids.count(6) == 1  # <|assistant|>, where the template puts it


def test_a_prompt_longer_than_the_context_is_refused_with_its_example(root):
    (root / "configs/traits/calm.yaml").write_text(yaml.safe_dump(TRAIT | {"questions": ["Why?", "w" * 600]}))
    line = refused("extract", "--root", root, *DEMO, *SMALL)
    assert "example pos-i01-q001-r00: " in line
    assert "512" in line
    assert nothing_written(root)


def test_a_model_without_eos_generates_max_new_tokens(root):
    for name in ("config.json", "generation_config.json"):
        edit_json(root / "model" / name, eos_token_id=None)
    edit_json(root / "model/tokenizer_config.json", eos_token=None)
    succeed("generate", "--root", root, *DEMO, *SMALL)
    rows = [json.loads(line) for line in (run_of(root) / "responses/pos.jsonl").read_text().splitlines()]
    assert {(len(row["token_ids"]), row["finish_reason"]) for row in rows} == {(4, "length")}


def test_an_absent_model_is_refused_offline_without_the_hub_token(root, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecretsecretsecret")
    line = refused("extract", "--root", root, *DEMO, "--model", "nobody/no-such-model")
    assert "secret" not in line
    assert "nobody/no-such-model" in line
    assert len(line) < 250
    assert nothing_written(root)


class EmptyHub(BaseHTTPRequestHandler):
    """A hub without any model."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.mark.parametrize("is_reached", [False, True])
def test_a_model_that_is_not_cached_is_refused_at_once_where_the_hub_cant_be_reached(root, is_reached):
    """The hub is a port that nothing listens on; the control: one that has no model."""
    with ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        port = hub.server_address[1] if is_reached else 9
        home = {"HF_HOME": str(root / "home"), "HF_HUB_CACHE": str(root / "home/hub"), "NO_PROXY": "127.0.0.1"}
        env = environment(HF_HUB_OFFLINE="0", HF_ENDPOINT=f"http://127.0.0.1:{port}", **home)
        command = [
            sys.executable,
            "-m",
            "extraction",
            "extract",
            "--root",
            root,
            *DEMO,
            "--model",
            "nobody/no-such-model",
        ]
        started = time.monotonic()
        done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, check=False)
        hub.shutdown()
    assert done.returncode == 2
    assert time.monotonic() - started < 40
    errors = [line for line in done.stderr.splitlines() if not line.startswith("configs/experiments/")]
    assert len(errors) == 1, errors
    assert ("can't be reached" in errors[0]) != is_reached


def test_a_models_own_code_is_refused_and_not_run(root):
    edit_json(
        root / "model/config.json",
        model_type="strange",
        architectures=["Strange"],
        auto_map={"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"},
    )
    (root / "model/strange.py").write_text("open('executed', 'w')\n")
    line = refused("extract", "--root", root, *DEMO, *SMALL)
    assert "--trust-remote-code" in line
    assert not (root / "executed").exists()
    assert nothing_written(root)


def test_code_beside_a_known_model_is_not_run(root, monkeypatch):
    monkeypatch.chdir(root)
    edit_json(root / "model/config.json", auto_map={"AutoModelForCausalLM": "strange.Model"})
    (root / "model/strange.py").write_text("open('executed', 'w')\n")
    succeed("generate", "--root", root, *DEMO, *SMALL)
    assert not (root / "executed").exists()


def _truncate(root: Path) -> None:
    path = root / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _zero(root: Path) -> None:
    path = root / "model/model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))


def _drop_tensor(root: Path) -> None:
    weights = load_file(root / "model/model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, root / "model/model.safetensors", metadata={"format": "pt"})


def _misshape(root: Path) -> None:
    weights = load_file(root / "model/model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, root / "model/model.safetensors", metadata={"format": "pt"})


def _pickle(root: Path) -> None:
    torch.save(load_file(root / "model/model.safetensors"), root / "model/pytorch_model.bin")
    (root / "model/model.safetensors").unlink()


def _no_tokenizer(root: Path) -> None:
    for path in (root / "model").glob("tokenizer*"):
        path.unlink()


def _broken_config(root: Path) -> None:
    (root / "model/config.json").write_text("{")


def _no_config(root: Path) -> None:
    (root / "model/config.json").unlink()


def _larger_tokenizer(root: Path) -> None:
    tiny_tokenizer(more=["<extra>"]).save_pretrained(root / "model")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated weights": (_truncate, "weights"),
    "zeroed weights": (_zero, "weights"),
    "no weights": (lambda root: (root / "model/model.safetensors").unlink(), "safetensors"),
    "a tensor missing": (_drop_tensor, "model.layers.1.mlp.down_proj.weight"),
    "a tensor of another shape": (_misshape, "model.norm.weight"),
    "pickled weights": (_pickle, "safetensors"),
    "no tokenizer": (_no_tokenizer, "tokenizer"),
    "broken config": (_broken_config, "config.json"),
    "no config": (_no_config, "config.json"),
    "a larger tokenizer": (_larger_tokenizer, "98 tokens and the model 97"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_folder_is_refused(root, case):
    damage, fragment = BROKEN[case]
    damage(root)
    line = refused("extract", "--root", root, *DEMO, *SMALL)
    assert fragment in line
    assert nothing_written(root)


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("t5", "decoder-only"),
        ("bart", "decoder-only"),
        ("vit", "decoder-only"),
        ("rwkv", "cache"),
        ("recurrent_gemma", "cache"),
    ],
)
def test_an_unsupported_architecture_is_refused(root, name, fragment):
    replace_model(root, refused_model(name))
    assert fragment in refused("extract", "--root", root, *DEMO, *SMALL)
    assert nothing_written(root)


def test_a_site_that_an_architecture_lacks_is_refused(root):
    replace_model(root, tiny_model("gptj", max_position_embeddings=512, n_positions=512))
    line = refused("extract", "--root", root, *DEMO, *SMALL, "--sites", "residual_mid", notes=PROGRESS)
    assert "layer 0 has no site 'residual_mid'" in line


# --- storage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--seed", "1"], "seed was 0 and is now 1"),
        (["--temperature", "0"], "generation.temperature was 1.0 and is now 0.0"),
        (["--layers", "1"], 'capture.layers was "all" and is now "1"'),
        (["--raw"], "model.raw was false and is now true"),
        (["--n-examples", "25"], "n_examples was 24 and is now 25"),
    ],
)
def test_a_run_with_another_config_is_refused_with_the_field(root, options, field):
    succeed("generate", "--root", root, *DEMO)
    before = contents(root / "experiments")
    for command in ("extract", "generate"):
        line = refused(command, "--root", root, *DEMO, *options)
        assert field in line
        assert "--experiment" in line
    assert contents(root / "experiments") == before


def test_a_changed_trait_file_is_refused(root):
    succeed("batched", "--root", root, *DEMO)
    (root / "configs/traits/calm.yaml").write_text(yaml.safe_dump(TRAIT | {"description": "Other."}))
    for command in ("extract", "capture", "vectors", "validate"):
        assert "trait.sha256 was" in refused(command, "--root", root, *DEMO)


def test_a_later_stage_without_its_input_is_refused_and_writes_nothing(root):
    for command in ("capture", "vectors", "validate"):
        for options in ((), ("--trait", "calm")):
            line = refused(command, "--root", root, *DEMO, *options)
            assert "experiments/demo" in line
    assert not (root / "experiments").exists()
    succeed("generate", "--root", root, *DEMO, "--slice", "1/2")
    assert "1 of 3 shards" in refused("capture", "--root", root, *DEMO)
    for command in ("vectors", "validate"):
        assert "3 of 3 shards" in refused(command, "--root", root, *DEMO)


def test_a_layer_that_was_not_captured_is_refused(root):
    succeed("batched", "--root", root, *DEMO, "--layers", "0,2")
    line = refused("vectors", "--root", root, *DEMO, "--layers=1")
    assert "layer 1" in line
    assert "[0, 2]" in line


def test_a_run_of_another_model_is_refused_by_the_models_name_not_by_its_type(root):
    (root / "configs/models/other.yaml").write_text("path: model\ndtype: bfloat16\n")
    succeed("generate", "--root", root, *DEMO)
    line = refused("generate", "--root", root, *DEMO, "--model", "other", notes=())
    assert 'model.name was "tiny" and is now "other"' in line


def test_a_model_of_the_command_line_in_place_of_the_files_is_noted(root):
    options = ("--dry-run", "--root", root, *DEMO)
    noted = succeed("extract", *options, "--model", root / "model").stderr
    assert all(part in noted for part in ("demo.yaml", "'tiny'", str(root / "model")[:30], "experiments/demo"))
    assert succeed("extract", *options, "--model", "tiny").stderr == ""  # the control: the same model
    assert (
        "demo.yaml"
        not in succeed("extract", "--dry-run", "--root", root, "--experiment", "tiny_x", "--trait", "calm").stderr
    )


# --- models given as folders ----------------------------------------------------------------------------------------


def forget_path(root: Path) -> None:
    """Remove the model's path from run.json, as in runs of older versions; the fingerprint stays."""
    run = root / "experiments/demo/calm/run.json"
    stored = read_document(run, "")
    model = {key: value for key, value in stored["config"]["model"].items() if key != "path"}
    config = {**stored["config"], "model": model}
    assert fingerprint(config) == stored["fingerprint"]
    write_document(run, {"config": config, "fingerprint": stored["fingerprint"]})


def test_a_model_given_as_a_folder_is_remembered(root):
    succeed("extract", "--root", root, *DEMO, "--model", root / "model", "--samples-per-coef", "2", "--layers", "1")
    shutil.rmtree(root / "experiments/demo/calm/activations")
    for command in ("capture", "vectors", "validate"):
        succeed(command, "--root", root, *DEMO)
    succeed("steer", "--root", root, *DEMO, "--max-new-tokens", "3", "Why?")
    succeed("read", "--root", root, *DEMO, "--trait", "calm", "--prompts", "Why?", "--max-new-tokens", "3")
    succeed("export", "--root", root, *DEMO, "--trait", "calm", "--to", "gguf", "--output", root / "calm.gguf")
    succeed("report", "--root", root, *DEMO)
    shared = [data for name, data in contents(root / "experiments/demo").items() if "report" in name]
    assert shared
    assert not [data for data in shared if str(root).encode() in data]


@pytest.mark.parametrize("is_older", [False, True])
def test_a_folder_that_has_moved_is_asked_for_and_may_be_given_again(root, is_older):
    succeed("generate", "--root", root, *DEMO, "--model", root / "model")
    folder = root / "model"
    if is_older:
        forget_path(root)
    else:
        (root / "elsewhere").mkdir()
        folder = folder.rename(root / "elsewhere/model")
    line = refused("capture", "--root", root, *DEMO)
    assert "--model" in line
    assert is_older != ("/model'" in line)
    succeed("capture", "--root", root, *DEMO, "--model", folder)
    succeed("vectors", "--root", root, *DEMO)


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """Limit the size of files, in place of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_after_a_full_disk_the_same_command_resumes(root, tmp_path_factory):
    whole = make_root(tmp_path_factory.mktemp("whole"))
    succeed("extract", "--quick", "--root", whole, *DEMO)
    with files_of_at_most(9000):
        line = refused("extract", "--quick", "--root", root, *DEMO, notes=PROGRESS)
    assert str(run_of(root)) in line
    assert not list((root / "experiments").rglob("*.tmp"))
    succeed("extract", "--quick", "--root", root, *DEMO)
    assert contents(run_of(root)) == contents(run_of(whole))


def test_temporary_files_of_ended_processes_are_deleted(root):
    succeed("extract", "--quick", "--root", root, *DEMO)
    before = contents(run_of(root))
    for folder in ("responses/shards", "activations", "vectors"):
        (run_of(root) / folder / ".0000.jsonl.999999999.tmp").write_text("half")
    assert invoke("verify", run_of(root)).exit_code == 1
    succeed("extract", "--quick", "--root", root, *DEMO)
    assert contents(run_of(root)) == before


@pytest.mark.parametrize("harm", ["run.json missing", "run.json flipped"])
def test_a_missing_or_changed_run_json_is_refused(root, harm):
    succeed("extract", "--quick", "--root", root, *DEMO)
    path = run_of(root) / "run.json"
    if harm == "run.json missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b'"seed": 0', b'"seed": 1'))
    line = refused("extract", "--root", root, *DEMO)
    assert "run.json" in line
    assert "delete" in line
