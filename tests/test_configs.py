"""Configs: the contents of files, the place and value in every error, names, and where files are searched for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from extraction.config import experiments
from extraction.config.experiments import (
    config_names,
    experiment_to_dict,
    find_config,
    find_root,
    load_experiment,
    parse_layers,
    resolve_model,
)
from extraction.config.patterns import MAX_TEXT, check_pattern, count, search
from extraction.config.settings import EXPERIMENT_SETTINGS, Experiment, SamplingSettings
from extraction.config.yaml_loader import read_document
from extraction.core.errors import ConfigError
from extraction.core.names import distinct_names, is_safe_name

SHIPPED = Path(experiments.__file__).resolve().parent.parent


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return a root with one experiment. It is the current folder; the configs of the checkout are out of reach."""
    for kind in ("experiments", "models", "traits"):
        (tmp_path / "configs" / kind).mkdir(parents=True)
    (tmp_path / "configs/models/small.yaml").write_text("source: owner/small\n")
    (tmp_path / "configs/models/small_chat.yaml").write_text("source: owner/small-chat\ndtype: float32\n")
    monkeypatch.setattr(experiments, "PACKAGE", tmp_path / "elsewhere" / "extraction")
    monkeypatch.delenv("TRAITLINE_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_experiment(root, body, name="e"):
    path = root / "configs/experiments" / f"{name}.yaml"
    path.write_bytes(body if isinstance(body, bytes) else body.encode())
    return path


def refusal(call, *args, **kwargs):
    """Return the message of the ConfigError that a call must raise: one line of printable text."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message.isprintable(), message
    return message


def attempt(call, *args):
    """Return the result of a call, or the ConfigError that it raises."""
    try:
        return call(*args)
    except ConfigError as failure:
        return failure


# --- YAML -----------------------------------------------------------------------------------------------------------

BAD_YAML = {
    "duplicate key": (b"a: 1\nb: 2\na: 3\n", ":3: the key 'a'"),
    "nested duplicate": (b"x:\n  a: 1\n  a: 1\n", ":3: the key 'a'"),
    "alias bomb": (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", ":1: 'a'"),
    "merge key": (b"base: &base {a: 1}\nb:\n  <<: *base\n", ":1: 'base'"),
    "python tag": (b"a: !!python/object/apply:os.system ['true']\n", ":1: the tag"),
    "own tag": (b"a: !env HOME\n", ":1: the tag '!env'"),
    "NUL": (b"a: 1\nb: x\0y\n", ":2: "),
    "escaped NUL": (b'a: "x\\0y"\n', ":1: 'x\\x00y'"),
    "control character": (b"a: 1\nb: \x07\n", "U+0007"),
    "invalid UTF-8": (b"a: 1\nb: \xff\n", "invalid UTF-8 at byte 8 (0xff)"),
    "invalid UTF-8 after a BOM": (b"\xef\xbb\xbfa: \xff\n", "invalid UTF-8 at byte 6"),
    "UTF-16": ("a: 1\n".encode("utf-16-le") + b"\xff", "invalid UTF-8"),
    "lone surrogate": (b'a: 1\nb: "\\ud800"\n', ":2: '\\ud800'"),
    "deep": (b"[" * 5000, "more than 20"),
    "unclosed": (b"a: [1, 2\nb: 3\n", ":2: "),
    "tab": (b"a:\n\t- 1\n", ":2: "),
    "two documents": (b"a: 1\n---\nb: 2\n", "document"),
    "number as a key": (b"1: a\n", "'1'"),
    "empty": (b"# nothing\n", "is empty"),
}


@pytest.mark.parametrize(("body", "fragment"), BAD_YAML.values(), ids=BAD_YAML)
def test_bad_yaml_is_refused_with_its_line(tmp_path, body, fragment):
    path = tmp_path / "bad.yaml"
    path.write_bytes(body)
    message = refusal(read_document, path)
    assert "bad.yaml" in message
    assert fragment in message


def test_yaml_reads_the_same_with_bom_and_crlf(tmp_path):
    body = 'a: "x: y"\nb: [no, yes, on, off, 2024-01-01, 12:30, 0o7, 1_000]\n'
    body += "c: {n: 1, f: 1e3, t: true, z: null}\nd: |\n  two\n  lines\n"
    plain, windows = tmp_path / "plain.yaml", tmp_path / "windows.yaml"
    plain.write_bytes(body.encode())
    windows.write_bytes(b"\xef\xbb\xbf" + body.replace("\n", "\r\n").encode())
    assert read_document(plain).data == read_document(windows).data
    assert read_document(plain).data == {
        "a": "x: y",
        "b": ["no", "yes", "on", "off", "2024-01-01", "12:30", "0o7", "1_000"],
        "c": {"n": 1, "f": 1000.0, "t": True, "z": None},
        "d": "two\nlines\n",
    }


def test_json_is_yaml_and_surrogate_pairs_are_joined(tmp_path):
    data = {"smile": "\U0001f600", "list": [1, -2.5, True, None], "text": "a\tb\u00e9"}
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(data))
    assert read_document(path).data == data


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "absent", "nul", "long"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "x.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    given_path = {"folder": tmp_path, "device": "/dev/zero", "nul": "a\0b.yaml", "long": "x" * 5000}.get(kind, path)
    assert ";" in refusal(read_document, given_path)


def test_a_file_over_the_size_limit_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)  # sparse
    assert "at most 1000000" in refusal(read_document, path)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=80), st.text(alphabet=":-[]{}&*!|>'\"#%@`,? \n\tab01\ud800\u2028", max_size=60)))
@example(b"? a\n: b\n")
@example(b"{[a]: 1}")
@example(b"%YAML 9.9\n--- a\n")
def test_any_bytes_give_data_or_a_one_line_error(tmp_path_factory, body):
    path = tmp_path_factory.mktemp("fuzz") / "f.yaml"
    path.write_bytes(body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass"))
    data = attempt(read_document, path)
    assert not isinstance(data, ConfigError) or str(data).isprintable()


# --- experiments ----------------------------------------------------------------------------------------------------

BAD_FIELDS = {
    "generation: {temprature: 1}": ("'temprature'", "'temperature'"),
    "n_example: 5": ("'n_example'", "'n_examples'"),
    "zzz: 5": ("known: batch_size",),
    "generation: {temperature: -1}": ("'generation.temperature': -1", "0 to 100"),
    "generation: {temperature: .inf}": ("inf is out of range",),
    "generation: {temperature: .nan}": ("nan is out of range",),
    "generation: {temperature: 1e999}": ("inf is out of range",),
    "generation: {temperature: hot}": ("'hot' is not a number",),
    "generation: {top_p: 0}": (": 0 ",),
    "generation: {top_p: 1.5}": ("1.5 is out of range",),
    "generation: {top_k: -1}": ("-1 is out of range",),
    "generation: {max_new_tokens: 0}": ("max_new_tokens': 0", "1"),
    "generation: {max_new_tokens: 1.5}": ("1.5 is not a whole number",),
    "generation: {stop_strings: END}": ("'END' is not a list",),
    "generation: {stop_strings: ['']}": ("'generation.stop_strings.0': '' is empty",),
    "generation: 5": ("5 is not a mapping",),
    "n_examples: 0": ("0 is out of range",),
    "n_examples: true": ("True is not a whole number",),
    "n_examples: '5'": ("'5' is not a whole number",),
    "batch_size: 0": ("0 is not a batch size",),
    "batch_size: many": ("'many' is not a batch size",),
    "shard_size: 0": ("0 is out of range",),
    "queue_size: 0": ("0 is out of range",),
    "threshold: 101": ("101 is out of range",),
    "seed: -1": ("-1 is out of range",),
    "instruction_as: assistant": ("'assistant' is not known",),
    "traits: [a, A]": ("'A': given twice",),
    "traits: [true]": ("True",),
    "traits: [../x]": ("'../x': not a name",),
    "capture: {layers: 20-10}": ("'20-10'", "10-20"),
    "capture: {layers: [1.5]}": ("1.5 is not a layer",),
    "capture: {sites: [residuals]}": ("'residuals'", "'residual'"),
    "capture: {sites: []}": ("give at least one",),
    "capture: {poolings: ['response_first:0']}": ("'response_first:0'", "'response_first:5'"),
    "capture: {poolings: [response_mean, response_mean]}": ("twice",),
    "capture: {dtype: float}": ("is not known",),
    "model: 5": (
        "'model'",
        "line 1",
    ),
}


@pytest.mark.parametrize("line", BAD_FIELDS)
def test_a_bad_field_is_refused_with_its_place(root, line):
    write_experiment(root, f"model: small\n{line}\n")
    message = refusal(load_experiment, "e", root)
    assert message.startswith("configs/experiments/e.yaml:2: ")
    for fragment in BAD_FIELDS[line]:
        assert fragment in message


def test_an_unknown_judge_is_refused_with_its_place(root):
    write_experiment(root, "model: small\njudge: lexicl\n")
    assert load_experiment("e", root)[0].judge == "lexicl"
    message = refusal(load_experiment, "e", root, judges=("auto", "lexical"))
    assert message.startswith("configs/experiments/e.yaml:2: 'judge'")
    assert "'lexicl'" in message
    assert "'lexical'" in message


def test_a_full_experiment_reads_as_written(root):
    write_experiment(
        root,
        "model: small\ntraits: [b, a]\nn_examples: 7\nseed: 3\n"
        "generation: {max_new_tokens: 5, temperature: 0, top_k: 4, top_p: 0.5, stop_strings: ['no', \"\\n\\n.\"]}\n"
        "capture: {layers: [3, 5, 8-10], sites: [mlp], poolings: ['response_first:4', all], dtype: float16}\n"
        "judge: none\nthreshold: 60\nbatch_size: auto\nshard_size: 9\nqueue_size: 30\ninstruction_as: user\n",
    )
    experiment, notes = load_experiment("e", root)
    assert notes == ()
    assert json.loads(json.dumps(experiment_to_dict(experiment))) == {
        "name": "e",
        "model": "small",
        "traits": ["b", "a"],
        "n_examples": 7,
        "questions": "auto",
        "seed": 3,
        "generation": {
            "max_new_tokens": 5,
            "temperature": 0.0,
            "top_k": 4,
            "top_p": 0.5,
            "min_p": 0.0,
            "stop_strings": ["no", "\n\n."],
        },
        "capture": {
            "layers": "3,5,8-10",
            "sites": ["mlp"],
            "poolings": ["response_first:4", "all"],
            "dtype": "float16",
        },
        "judge": "none",
        "judge_model": None,
        "judge_url": None,
        "judge_concurrency": 8,
        "judge_price": None,
        "threshold": 60.0,
        "coherence_threshold": 50.0,
        "batch_size": "auto",
        "shard_size": 9,
        "queue_size": 30,
        "instruction_as": "user",
        "literal": False,
        "thinking": "close",
    }


def test_an_experiment_without_a_model_is_refused(root):
    write_experiment(root, "n_examples: 5\n")
    assert "'model' is missing" in refusal(load_experiment, "e", root)


def test_given_options_override_the_file(root):
    write_experiment(root, "model: small\ngeneration: {temperature: 0.5, top_k: 3}\ncapture: {layers: all}\n")
    options = {"temperature": 0.0, "layers": "2-4", "batch_size": "8", "n_examples": None, "model": "small_chat"}
    experiment, _ = load_experiment("e", root, options)
    assert (experiment.generation.temperature, experiment.generation.top_k) == (0.0, 3)
    assert (experiment.capture.layers, experiment.batch_size, experiment.n_examples) == ("2-4", 8, 100)
    assert experiment.model == "small_chat"


@pytest.mark.parametrize(
    ("option", "value", "fragment"),
    [
        ("temperature", float("nan"), "--temperature: nan"),
        ("max_new_tokens", 0, "--max-new-tokens: 0"),
        ("layers", "x", "--layers: 'x'"),
        ("stop_strings", ["x", ""], "--stop-strings: ''"),
        ("temprature", 1.0, "'temperature'"),
        ("generation", {}, "generation"),
    ],
)
def test_a_bad_option_value_is_refused_with_its_option(root, option, value, fragment):
    write_experiment(root, "model: small\n")
    assert fragment in refusal(load_experiment, "e", root, {option: value})


def test_an_experiment_without_a_file_takes_the_model_with_the_longest_matching_name(root):
    experiment, notes = load_experiment("small_chat_foo", root)
    assert experiment.model == "small_chat"
    assert "small_chat_foo.yaml" in notes[0]
    assert "small_chat " in notes[0]
    assert load_experiment("small_foo", root)[0].model == "small"
    assert load_experiment("other", root, {"model": "small"})[1]


@pytest.mark.parametrize("name", ["smallish", "other"])
def test_a_name_that_starts_with_no_model_is_refused(root, name):
    write_experiment(root, "model: small\n", name="others")
    assert "others" in refusal(load_experiment, name, root)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "CON", "con.yaml", "LPT1", "x" * 300, "a\0b", "a/b", "", ".x", "-x", "a b", "\u00e9", "a\n"],
)
def test_unsafe_names_are_refused(root, name):
    assert "not a name" in refusal(load_experiment, name, root)


def test_a_symbolic_link_out_of_the_folder_is_refused(root):
    outside = root / "secret.yaml"
    outside.write_text("model: small\n")
    (root / "configs/experiments/out.yaml").symlink_to(outside)
    assert "out" in refusal(load_experiment, "out", root)
    write_experiment(root, "model: small\n", name="real")
    (root / "configs/experiments/alias.yaml").symlink_to("real.yaml")
    assert load_experiment("alias", root)[0].model == "small"


def test_defaults_of_the_settings_are_valid_and_frozen(root):
    experiment, _ = load_experiment("small_x", root)
    assert experiment.model_dump() == Experiment(name="small_x", model="small").model_dump()
    for setting in EXPERIMENT_SETTINGS.values():
        if setting.path not in ("model", "capture.dtype"):
            again, _ = load_experiment("small_x", root, {setting.name: setting.default})
            assert again == experiment, setting.name
    with pytest.raises(ValueError, match="frozen"):
        experiment.seed = 1


def test_experiments_sample_at_0_7_by_default_and_the_bundled_one_and_bare_sampling_at_1():
    assert load_experiment("gemma_2b_x", SHIPPED)[0].generation.temperature == 0.7
    assert EXPERIMENT_SETTINGS["temperature"].default == 0.7
    assert load_experiment("pocket", SHIPPED)[0].generation.temperature == SamplingSettings().temperature == 1.0


def test_the_bounds_of_a_setting_hold_in_files_and_options(root):
    """Check both ends of every range, and values beyond them."""
    numbers = [s for s in EXPERIMENT_SETTINGS.values() if s.bounds is not None]
    assert len(numbers) >= 10
    for setting in numbers:
        bounds, step = setting.bounds, 1 if setting.bounds.is_whole else 0.5
        inside = [bounds.high, *([] if bounds.above else [bounds.low])]
        outside = [bounds.low - step, bounds.high + step, *([bounds.low] if bounds.above else [])]
        kind = int if bounds.is_whole else float
        for value in inside:
            load_experiment("small_x", root, {setting.name: kind(value)})
        for value in outside:
            message = refusal(load_experiment, "small_x", root, {setting.name: kind(value)})
            assert setting.flag in message
            assert str(kind(value)) in message


# --- names ----------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="aZ09._-/ \u00e9\n", max_size=8) | st.sampled_from(["foo.", "CON", "aux.txt", "x" * 64, "x" * 65])
)
def test_a_safe_name_is_a_file_name_on_every_system(name):
    if is_safe_name(name):
        assert 1 <= len(name) <= 64
        assert name.isascii()
        assert name[0].isalnum()
        assert not name.endswith((".", " "))
        assert Path(name).name == name
        assert distinct_names([name], "name") == (name,)
    else:
        assert "not a name" in refusal(distinct_names, [name], "name")


@pytest.mark.parametrize("name", ["foo.", "a..", "con", "LPT1.yaml", ".a", "-a", "x" * 65, "", None])
def test_a_name_that_some_system_refuses_is_not_safe(name):
    assert not is_safe_name(name)
    assert is_safe_name("foo")


# --- patterns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a*b)*c", "(?:x{2,}y)+", "((ab)+c)*", "(a+){20}$"])
def test_a_pattern_that_repeats_a_repeat_is_refused(pattern):
    assert repr(pattern) in refusal(check_pattern, pattern)


@pytest.mark.parametrize("pattern", ["a+b+", "(ab)+", r"\bkind\w*", "[(+*]+x", r"\(a+\)+", "(a{3})+", "(very )+good"])
def test_plain_repeats_are_allowed(pattern):
    assert check_pattern(pattern) == pattern


def test_patterns_are_matched_in_a_text_of_bounded_length():
    pattern = re.compile("x")
    assert count(pattern, "ax" * MAX_TEXT) == MAX_TEXT // 2
    assert search(pattern, "a" * MAX_TEXT + "x") is None
    assert search(pattern, "a" * (MAX_TEXT - 1) + "x") is not None
    assert count(re.compile("b*"), "abba") == 1


# --- models ---------------------------------------------------------------------------------------------------------


def test_a_model_is_searched_for_as_a_config_then_a_folder_then_a_hub_id(root):
    (root / "small").mkdir()
    (root / "weights").mkdir()
    assert resolve_model("small", root).source == "owner/small"
    assert resolve_model("./small", root).source == str(root / "small")
    assert resolve_model("weights", root).is_local
    assert resolve_model("owner/other", root).source == "owner/other"
    assert not resolve_model("owner/other", root).is_local


@pytest.mark.parametrize("name", ["smal", "../up", "/no/such", "", "a\0b", "a/b/c", "../../a", "x" * 300])
def test_an_unknown_model_is_refused_with_the_known_ones(root, name):
    assert "small" in refusal(resolve_model, name, root)


@pytest.mark.parametrize(
    ("body", "fragment"),
    [
        ("source: owner/x\npath: y\n", "'source'"),
        ("dtype: float32\n", "'source'"),
        ("source: justname\n", "justname"),
        *((f"source: {folder}\n", f"path: {folder}") for folder in ("/a/folder", "./folder", "../folder", "~/folder")),
        ("source: owner/x\ndtype: int8\n", "'int8'"),
        ("source: owner/x\nraw: yes\n", "'yes'"),
        ("source: owner/x\ndevice: gpu\n", "'gpu'"),
        ("source: owner/x\ntrust_remote_code: true\n", "--trust-remote-code"),
        ("- source\n", "is not a mapping"),
    ],
)
def test_a_bad_model_file_is_refused(root, body, fragment):
    (root / "configs/models/bad.yaml").write_text(body)
    message = refusal(resolve_model, "bad", root)
    assert message.startswith("configs/models/bad.yaml:")
    assert fragment in message


def test_remote_code_is_trusted_by_the_command_line_alone(root):
    assert not resolve_model("small", root).trust_remote_code
    assert resolve_model("small", root, {"trust_remote_code": True, "dtype": None}).trust_remote_code
    assert "--dtype: 'int8'" in refusal(resolve_model, "small", root, {"dtype": "int8"})


def test_a_relative_path_is_searched_for_in_the_root_then_in_the_package(root):
    (root / "configs/models/mine.yaml").write_text("path: my/weights\n")
    (experiments.PACKAGE / "my/weights").mkdir(parents=True)
    assert resolve_model("mine", root).source == str(experiments.PACKAGE / "my/weights")
    (root / "my/weights").mkdir(parents=True)
    assert resolve_model("mine", root).source == str(root / "my/weights")


# --- folders -----------------------------------------------------------------------------------------------------


def test_the_root_is_the_option_then_the_variable_then_the_folder_then_the_checkout(
    root, monkeypatch, tmp_path_factory
):
    bare = tmp_path_factory.mktemp("bare")
    assert find_root() == root
    assert find_root(str(bare)) == bare
    monkeypatch.setenv("TRAITLINE_ROOT", str(bare))
    assert find_root() == bare
    monkeypatch.delenv("TRAITLINE_ROOT")
    monkeypatch.chdir(bare)
    assert find_root() == bare
    (experiments.PACKAGE.parent / "configs").mkdir(parents=True)
    assert find_root() == experiments.PACKAGE.parent
    assert "/no/such/folder" in refusal(find_root, "/no/such/folder")


def test_configs_are_searched_for_in_the_root_the_checkout_and_the_package(root):
    for base, text in (
        (experiments.PACKAGE / "_configs", "packaged"),
        (experiments.PACKAGE.parent / "configs", "checkout"),
    ):
        (base / "models").mkdir(parents=True)
        for name in {"packaged": ["p", "c", "r"], "checkout": ["c", "r"]}[text]:
            (base / "models" / f"{name}.yaml").write_text(f"source: owner/{text}\n")
    (root / "configs/models/r.yaml").write_text("source: owner/root\n")
    sources = {name: resolve_model(name, root).source for name in "pcr"}
    assert sources == {"p": "owner/packaged", "c": "owner/checkout", "r": "owner/root"}
    assert config_names("models", root) == ("c", "p", "r", "small", "small_chat")
    assert find_config("models", "absent", root) is None


def test_every_shipped_config_loads():
    models = config_names("models", SHIPPED)
    assert {"pocket", "gemma_2b", "gemma_9b", "llama_8b", "qwen_7b", "qwen3_4b", "mistral_7b"} <= set(models)
    assert Path(resolve_model("pocket", SHIPPED).source) == experiments.PACKAGE / "pocket" / "pocket"
    for name in models:
        assert resolve_model(name, SHIPPED).name == name
    for name in ("pocket", "gemma_2b_cognitive", "gemma_2b_cognitive_nov20"):
        experiment, notes = load_experiment(name, SHIPPED)
        assert notes == ()
        assert experiment.model in models


# --- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "layers"),
    [("all", (0, 1, 2, 3, 4, 5)), ("2", (2,)), ("1-3", (1, 2, 3)), ("5, 0,2 - 3", (0, 2, 3, 5)), ("4-4", (4,))],
)
def test_layers_are_read(spec, layers):
    assert parse_layers(spec, 6) == layers


@pytest.mark.parametrize(
    ("spec", "fragment"),
    [
        ("6", "layer 6"),
        ("0-999999", "5"),
        ("3-1", "1-3"),
        ("1,1", "layer 1"),
        ("1-4,3", "layer 3"),
        ("", "''"),
        ("1,,2", "''"),
        ("-1", "'-1'"),
        ("1.5", "1.5"),
        ("\u0663", "\u0663"),
        ("9" * 5000, "999"),
    ],
)
def test_bad_layers_are_refused(spec, fragment):
    assert fragment in refusal(parse_layers, spec, 6)


@given(st.sets(st.integers(0, 40), min_size=1), st.randoms(use_true_random=False))
def test_layers_read_back_from_any_way_of_writing_them(layers, random):
    """A set of layers, written as ranges in any order, reads back sorted."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and parts[-1][-1] == layer - 1 and random.random() < 0.7:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    random.shuffle(parts)
    spec = ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
    assert parse_layers(spec, 41) == tuple(sorted(layers))


@given(st.text(alphabet="0123456789,- al", max_size=12), st.integers(1, 50))
def test_any_layer_text_gives_increasing_layers_or_a_one_line_error(spec, n_layers):
    layers = attempt(parse_layers, spec, n_layers)
    if isinstance(layers, ConfigError):
        assert str(layers).isprintable()
    else:
        assert layers == tuple(sorted(set(layers)))
        assert 0 <= layers[0] <= layers[-1] < n_layers


# --- imports --------------------------------------------------------------------------------------------------------


def test_reading_configs_and_traits_imports_neither_torch_nor_transformers():
    modules = "extraction.config.experiments, extraction.config.traits, extraction.model.chat_template"
    code = f"import sys, {modules}; print({{'torch', 'transformers'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SHIPPED, check=True)
    assert done.stdout.strip() == "set()"


# --- judges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["http://localhost:8000/v1", "https://host.example/v1/", "http://[::1]:80", "HTTPS://x"]
)
def test_judge_addresses_and_prices_are_read(url, tmp_path):
    options = {"model": "m/m", "judge_url": url, "judge_price": [0, 0.5]}
    experiment, _ = load_experiment("e", tmp_path, options)
    assert (experiment.judge_url, experiment.judge_price) == (url, (0.0, 0.5))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("judge_url", "ftp://host"),
        ("judge_url", "http://host:port"),
        ("judge_url", "https://"),
        ("judge_url", "https://me:sk-secret@host"),
        ("judge_url", "https://host/v1?key=sk-secret"),
        ("judge_url", "https://host/v1#sk-secret"),
        ("judge_price", "cheap"),
        ("judge_price", [1.0]),
        ("judge_price", [1.0, -1.0]),
        ("judge_concurrency", 0),
        ("coherence_threshold", 101.0),
        ("judge_model", ""),
    ],
)
def test_a_bad_judge_setting_is_refused_without_showing_a_secret(option, value, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_experiment("e", tmp_path, {"model": "m/m", option: value})
    assert "secret" not in str(caught.value)
    assert "--" + option.replace("_", "-") in str(caught.value)
