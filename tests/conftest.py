"""Settings of every test: one thread, no network, and the same hypothesis examples in every run.

The environment is set before anything imports torch or transformers.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

settings.register_profile("traitline", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("traitline")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    """Start a browser for a module's tests of pages."""
    from tests.chromium import chromium

    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started
