"""Shared by all tests: one thread per process, shape checks, and a tiny language model made on the spot."""

import os

# Before torch is imported: two busy cores and two threads a process make small tests ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tiny import write_texts, write_tiny_model

if TYPE_CHECKING:
    from tests.s3_server import S3Server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--runslow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --runslow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of tokenised texts for this session alone; processes that tests start inherit it."""
    folder = tmp_path_factory.mktemp("tokens")
    os.environ["SAE_PIPELINES_TOKENS"] = str(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def session_ledger(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What session fixtures audit is recorded here, not in the ledger of whoever runs the tests."""
    os.environ["SAE_PIPELINES_LEDGER"] = str(tmp_path_factory.mktemp("ledger") / "ledger.jsonl")


@pytest.fixture(autouse=True)
def ledger(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ledger of audits for this test alone; processes that it starts inherit it."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    monkeypatch.setenv("SAE_PIPELINES_LEDGER", str(path))
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a randomly initialised three-layer Llama with its own tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines of 400 short documents on four topics."""
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture(scope="session")
def s3() -> "Iterator[S3Server]":
    """An S3 server with an empty bucket."""
    from tests.s3_server import S3Server

    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3_url(s3: "S3Server", monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a place on that server where nothing is, which this process and those that it starts can use."""
    from tests.s3_server import environment

    for name, value in environment(s3.endpoint).items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3.bucket}/{uuid.uuid4()}/root"
