"""A run whose store is in an object store, by its URL in the config."""

import json

import pytest
import yaml
from command_line import must, sae, sae_here, sentence, stages

from pipelines.collect import Harvester, open_store, prepare_store, store_path
from pipelines.config import RunConfig
from pipelines.errors import RunError, UsageError
from pipelines.progress import SilentReporter
from pipelines.run import Run
from pipelines.rundir import RunDir
from pipelines.stores import absolute, has, place
from pipelines.train import make_job
from pipelines.train_worker import train_worker
from tests.tiny import tiny_config

HOOKS = ["model.layers.1", "model.layers.0:input"]


@pytest.fixture
def remote(tiny_model, tiny_texts, s3_url, tmp_path) -> Run:
    raw = tiny_config(tiny_model, tiny_texts, hooks=HOOKS)
    raw["collect"] |= {"store": s3_url}
    return Run(RunConfig.model_validate(raw), RunDir(tmp_path / "run"))


def test_remote_store_is_collected_trained_on_and_looked_at_as_a_local_one(remote, collected, store, resolved):
    url = remote.config.collect.store
    with pytest.raises(RunError, match=f"there is no activation store at {url}: run `sae collect` first"):
        open_store(remote.config, remote.dir)
    writer = prepare_store(remote.config, remote.dir, resolved, SilentReporter())
    harvester = Harvester(url, resolved, remote.config.model, remote.config.collect.batch_contexts, n_threads=1)
    digests = {key: value for shard in writer.missing() for key, value in harvester.harvest(shard).digests.items()}
    with pytest.raises(RunError, match="the activation store is unfinished"):
        open_store(remote.config, remote.dir)
    writer.seal()

    read = open_store(remote.config, remote.dir)
    assert read.spec.fingerprint == store.spec.fingerprint
    log = store._log
    assert digests == {f.key: f.sha256 for shard in log.committed() for f in log.read(shard).files}
    facts = json.loads(must(sae_here("info", url, "--json")))
    assert facts["kind"] == "activation store"
    assert facts["sealed"]
    assert "every file is as it was committed" in must(sae_here("verify", url))
    assert "every file is as it was committed" in must(sae_here("verify", url, "--repair"))

    train_worker(make_job(remote.config, remote.dir, "main", read))
    assert (remote.dir.trained("main") / "cfg.json").exists()


def test_collect_stage_on_a_remote_store_is_finished_only_while_its_seal_stands(remote, s3_url):
    from storage.backends import backend_for

    remote.dir.mark_finished("collect", remote.keys["collect"], 1.0)
    assert not remote.finished("collect")
    backend_for(s3_url).write("seal.json", [b"{}"])
    assert remote.finished("collect")


def test_places_are_paths_or_urls(tmp_path, monkeypatch):
    assert place("s3://bucket/runs/a") == "s3://bucket/runs/a"
    assert absolute(place("s3://bucket/runs/a")) == "s3://bucket/runs/a"
    monkeypatch.chdir(tmp_path)
    assert absolute(place("runs/a")) == tmp_path / "runs/a"
    assert not has(place("runs/a"), "spec.json")
    with pytest.raises(UsageError, match="taken from the environment"):
        place("s3://id:secret@bucket/runs")


def test_url_with_credentials_is_refused_by_the_command(tiny_model, tiny_texts, tmp_path):
    raw = tiny_config(tiny_model, tiny_texts)
    raw["collect"] |= {"store": "s3://id:hidden@bucket/runs"}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(raw))
    message = sentence(sae_here("collect", path, "--out", tmp_path / "run"), 2)
    assert "taken from the environment" in message
    assert "hidden" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_whole_run_on_a_remote_store(whole_config, finished, s3_url, tmp_path):
    out = tmp_path / "run"
    must(sae("run", whole_config, "--out", out, "--set", f"collect.store={s3_url}"))
    metrics, expected = (json.loads((path / "metrics.json").read_text()) for path in (out, finished.out))
    assert metrics["main.fvu"] == expected["main.fvu"]
    assert metrics["collect.fingerprint"] == expected["collect.fingerprint"]
    assert not (out / "activations").exists()
    before = stages(out, "stage started")
    must(sae("run", out))
    assert stages(out, "stage started") == before
    assert (
        store_path(RunConfig.model_validate(yaml.safe_load((out / "config.yaml").read_text())), RunDir(out)) == s3_url
    )
