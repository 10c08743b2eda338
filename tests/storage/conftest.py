import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import example_store
import pytest


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed example store; not to be changed."""
    path = tmp_path_factory.mktemp("built") / "activations"
    example_store.build(path)
    return path


@pytest.fixture(scope="session")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed store with quantised and compressed hooks; not to be changed."""
    path = tmp_path_factory.mktemp("coded") / "activations"
    example_store.build(path, example_store.coded_spec())
    return path


@pytest.fixture
def damaged(built: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(built, tmp_path / "activations"))


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder where fsync costs nothing, for tests of kills, which lose nothing that is not synced."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)
