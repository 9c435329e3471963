"""Shapes in signatures are checked at run time: jaxtyping with beartype, for every function of the library."""

import os

# Tests are small tensors: more threads only wait for each other, and two test runs on one machine starve.
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

with install_import_hook("undiffuse", "beartype.beartype"):
    import undiffuse  # noqa: F401


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow") or "slow" in (config.option.markexpr or ""):
        return
    skip = pytest.mark.skip(reason="minutes long: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder with `mnist/` and `cifar10-jpeg/` in parquet files; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("UNDIFFUSE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "mnist").is_dir():
        pytest.skip(f"no data at {folder}: set UNDIFFUSE_DATA to a folder with mnist/ and cifar10-jpeg/")
    return folder
