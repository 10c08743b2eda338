"""Fixtures for tests of whole runs: a config that reaches every stage, and one undisturbed run of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_line import FinishedRun, must, sae
from filelock import FileLock

from tests.tiny import COMMON, TOPICS, tiny_config


@pytest.fixture(scope="session")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two concept files: a topic of the tiny texts, and texts of our own about another of its topics."""
    folder = tmp_path_factory.mktemp("concepts")
    topic = {"name": "birds", "title": "Birds", "topic": {"positive": "birds"}}
    rng = np.random.default_rng(0)

    def texts(words: list[str]) -> list[str]:
        return [" ".join(rng.choice(words + COMMON, size=25)) + "." for _ in range(36)]

    written = {
        "name": "rivers_written",
        "description": "Texts about rivers, against texts about metals.",
        "positives": texts(TOPICS["rivers"]),
        "hard_negatives": texts(TOPICS["metals"]),
    }
    paths = []
    for concept in (topic, written):
        path = folder / f"{concept['name']}.yaml"
        path.write_text(yaml.safe_dump(concept))
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def whole_config(
    tiny_model: Path, tiny_texts: Path, concepts: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A config on the tiny model: two hooks, many small shards, four hundred steps, two audits."""
    config = tiny_config(tiny_model, tiny_texts, hooks=["model.layers.0", "model.layers.1"])
    config["collect"] |= {"n_tokens": 17_000, "heldout_fraction": 0.4, "contexts_per_shard": 12, "batch_contexts": 6}
    config["saes"]["main"]["hook"] = "model.layers.1"
    config["train"] |= {"n_tokens": 400 * 256, "checkpoint_every": 25}
    config["audit"] = {"concepts": [str(path) for path in concepts], "n_permutations": 200}
    path = tmp_path_factory.mktemp("config") / "whole.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def finished(
    whole_config: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> FinishedRun:
    """`sae run` from beginning to end, undisturbed; made once, also where several processes share the tests."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base
    record = shared / "finished.json"
    with FileLock(shared / "finished.lock"):
        if not record.exists():
            out = tmp_path_factory.mktemp("finished") / "run"
            output = must(sae("run", whole_config, "--out", out))
            record.write_text(json.dumps({"config": str(whole_config), "out": str(out), "output": output}))
        made = json.loads(record.read_text())
    run = FinishedRun(Path(made["config"]), Path(made["out"]), made["output"])
    assert json.loads((run.out / ".stages/audit.json").read_text())["results"]
    return run
