"""Hugging Face datasets, through the real library: from folders, and from a server that answers like the Hub."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import TextSource
from pipelines.corpora import describe, documents_of
from pipelines.errors import UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder with two Parquet files of 60 rows each."""
    folder = tmp_path_factory.mktemp("dataset")
    for part in range(2):
        rows = range(60 * part, 60 * part + 60)
        table = pa.table({"body": [f"text {row}" for row in rows], "topic": ["a", "b"] * 30})
        pq.write_table(table, folder / f"train-{part}.parquet")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def texts_of(source, seed=0):
    documents = documents_of(source, revision=describe(source).get("revision"), seed=seed, n_vocab=1)
    return [document.content.decode() for document in documents]


def test_dataset_is_streamed_in_an_order_that_follows_the_seed(dataset):
    source = TextSource(dataset=str(dataset), text_field="body", topic_field="topic", shuffle_buffer=50)
    texts = texts_of(source)
    assert sorted(texts) == sorted(f"text {row}" for row in range(120))
    assert texts != sorted(texts, key=lambda text: int(text.split()[1]))
    assert texts == texts_of(source)
    assert texts != texts_of(source, seed=1)
    assert {d.topic for d in documents_of(source, n_vocab=1)} == {"a", "b"}


def test_slice_of_a_split_is_downloaded_in_its_order(dataset):
    source = TextSource(dataset=str(dataset), text_field="body", split="train[:10%]")
    assert texts_of(source) == [f"text {row}" for row in range(12)]


def test_digest_of_a_folder_changes_with_its_files(dataset, tmp_path):
    before = describe(TextSource(dataset=str(dataset)))
    assert before["origin"] == f"hub:{dataset}"
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "train-0.parquet")
    assert describe(TextSource(dataset=str(tmp_path)))["sha256"] != before["sha256"]
    with pytest.raises(UsageError, match="is a folder, which has no revision: drop `revision`"):
        describe(TextSource(dataset=str(dataset), revision="main"))


def test_full_commit_needs_no_question(monkeypatch):
    found = describe(TextSource(dataset="someone/texts", name="en", revision=COMMIT, text_field="body"))
    assert found == {
        **{"origin": "hub:someone/texts", "name": "en", "split": "train", "revision": COMMIT},
        **{"kind": "text", "field": "body"},
    }


def test_dataset_that_cannot_be_reached_says_what_to_check():
    with pytest.raises(
        UsageError, match=r"text source someone/texts: .*; check the name, the revision and the network"
    ):
        describe(TextSource(dataset="someone/texts"))
    with pytest.raises(
        UsageError, match=r"text source someone/texts: .*; check the name, the revision and the network"
    ):
        list(documents_of(TextSource(dataset="someone/texts"), revision=COMMIT, n_vocab=1))


def test_unknown_split_is_named(dataset):
    with pytest.raises(UsageError, match=r"text source .*dataset.*: .*test.*; check the name"):
        texts_of(TextSource(dataset=str(dataset), text_field="body", split="test"))


def test_hub_without_the_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"is a Hugging Face dataset: pip install 'sae-pipelines\[hub\]'"):
        list(documents_of(TextSource(dataset="someone/texts"), revision=COMMIT, n_vocab=1))


class _Hub(BaseHTTPRequestHandler):
    """Answers the one question that is asked of the Hub: which commit is this revision?"""

    def do_GET(self) -> None:
        known = self.path == "/api/datasets/someone/texts/revision/v1"
        body = json.dumps({"id": "someone/texts", "sha": COMMIT, "siblings": []} if known else {"error": "not found"})
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


def test_revision_is_resolved_to_a_commit_over_http(tmp_path):
    script = """
import sys
from pipelines.config import TextSource
from pipelines.errors import UsageError
from pipelines.hubtext import hub_provenance
print(hub_provenance(TextSource(dataset="someone/texts", revision="v1"))["revision"])
try:
    hub_provenance(TextSource(dataset="someone/texts", revision="v2"))
except UsageError as error:
    print(error)
"""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path),
        }
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    commit, refusal = done.stdout.splitlines()
    assert commit == COMMIT
    assert refusal.startswith("text source someone/texts: ")
    assert refusal.endswith("; check the name, the revision and the network")
