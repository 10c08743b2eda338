import subprocess
import sys
from pathlib import Path

import example_store
import pytest

from storage import ActivationStore, LatentStore, NotFoundError, verify
from storage.backends import LocalBackend, backend_for
from storage.objects import ObjectBackend


def test_url_of_a_known_scheme_gives_an_object_backend() -> None:
    for url in ("s3://bucket/runs/a", "memory://a"):
        backend = backend_for(url)
        assert isinstance(backend, ObjectBackend)
        assert backend.location("commits/000001.json") == f"{url}/commits/000001.json"


@pytest.mark.parametrize("path", ["runs/a", "/runs/a", Path("runs"), "odd:name", "odd:/name", "a/s3://b", "."])
def test_anything_else_is_a_local_path(path: str | Path) -> None:
    assert isinstance(backend_for(path), LocalBackend)


@pytest.mark.parametrize("path", [Path("s3://bucket/runs"), "gs:/bucket/runs"])
def test_url_that_lost_a_slash_is_refused(path: str | Path) -> None:
    with pytest.raises(ValueError, match=r"two slashes after its scheme, got '(s3|gs):/bucket/runs'.*pass it as a str"):
        backend_for(path)


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schemes s3, gs, memory, got 'ftp://bucket/runs'"):
        backend_for("ftp://bucket/runs")


@pytest.mark.parametrize("url", ["s3://id:hidden@bucket/runs", "s3://bucket/runs?secret=hidden", "gs://b/a#hidden"])
def test_url_with_credentials_is_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(ValueError, match="taken from the environment") as refused:
        backend_for(url)
    assert "hidden" not in str(refused.value)


def test_url_without_a_bucket_is_refused() -> None:
    with pytest.raises(ValueError, match="must name a bucket, got 's3:///'"):
        backend_for("s3:///")


def test_store_is_written_and_read_by_url() -> None:
    url = "memory://by-url"
    example_store.build(url)
    assert verify(url) == []
    assert ActivationStore.open(url).contexts(0, 1).tokens.tolist() == [list(range(8))]
    with pytest.raises(NotFoundError, match=r"must be a latent store at memory://by-url, but it has no meta.json"):
        LatentStore.open(url)


def test_missing_extra_is_named() -> None:
    script = "import sys; sys.modules['obstore'] = None; from storage import verify; verify('s3://bucket/runs')"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "StorageError: s3://bucket/runs needs the package obstore" in run.stderr
    assert "pip install 'sae-pipelines[s3]'" in run.stderr
