import shutil
from pathlib import Path

import example_store
import pytest


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed example store; not to be changed."""
    path = tmp_path_factory.mktemp("built") / "activations"
    example_store.build(path)
    return path


@pytest.fixture
def damaged(built: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(built, tmp_path / "activations"))
