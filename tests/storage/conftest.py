import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import example_store
import pytest
from s3_server import S3Server, environment


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


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An S3 server with an empty bucket."""
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3_url(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a place on that server where nothing is, which this process and those that it starts can use."""
    for name, value in environment(s3.endpoint).items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3.bucket}/{uuid.uuid4()}/root"
