"""Stock zarr reads our stores and we read its shards: the zarr of these tests, and a newer one where it is at hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import zarr

SCRIPT = Path(__file__).parent / "stock_zarr.py"


def version_that_agrees(python: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [python, "-W", "error", str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_zarr_and_we_read_each_other() -> None:
    assert version_that_agrees(sys.executable) == zarr.__version__


def test_a_newer_zarr_and_we_read_each_other() -> None:
    python = os.environ.get("NEWER_ZARR_PYTHON")
    if not python:
        pytest.skip("not run: NEWER_ZARR_PYTHON names no Python >= 3.12 with zarr >= 3.2, numcodecs and crc32c")
    assert tuple(map(int, version_that_agrees(python).split(".")[:2])) >= (3, 2)
