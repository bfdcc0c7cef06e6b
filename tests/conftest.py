"""Settings of every test: one thread, no network, the same hypothesis examples in every run, long files first.

The environment is set before anything imports torch or transformers.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import pathlib

import pytest
from hypothesis import settings

settings.register_profile("traitline", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("traitline")

gc.set_threshold(20_000, 20, 50)  # the modules of torch and transformers are many objects to walk through

# Files of many seconds, the longest first: a worker that gets one last works on alone (see `make test`).
LONGEST_FIRST = (
    "test_engine_laws",
    "test_speculation",
    "test_pipeline",
    "test_steering_sweep",
    "test_report",
    "test_per_token_laws",
    "test_logit_diff",
    "test_serving_load",
    "test_cli",
    "test_overnight",
    "test_process",
    "test_openai_judge",
    "test_bad_input",
    "test_monitoring_cli",
    "test_monitoring_page",
    "test_two_model_faults",
    "test_monitoring_pictures",
    "test_internals_laws",
    "test_run_groups",
    "test_pocket_pairs",
    "test_storage_kill",
)
RANKS = {name: rank for rank, name in enumerate(LONGEST_FIRST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first; within a file the order stays."""
    items.sort(key=lambda item: RANKS.get(item.path.stem, len(RANKS)))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    """Start a browser for a module's tests of pages."""
    from tests.chromium import chromium

    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """Return a fresh root with the demo experiment, its trait and a tiny model."""
    from tests.runs import make_root

    return make_root(tmp_path)


@pytest.fixture(scope="module")
def finished() -> pathlib.Path:
    """Return the run of `traitline extract` on the demo, for tests that only read."""
    from tests.runs import extracted_root

    return extracted_root() / "experiments/demo/calm"
