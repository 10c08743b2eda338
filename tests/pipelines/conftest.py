"""A small store, filled in this process, and a run directory with a trained dictionary on it."""

import shutil
from pathlib import Path

import pytest
import torch
from whole_runs import concepts, finished, whole_config  # noqa: F401

from pipelines.collect import Harvester, open_store, prepare_store, store_path
from pipelines.config import ModelConfig, RunConfig
from pipelines.models import LanguageModel, ResolvedModel, resolve_model
from pipelines.progress import SilentReporter
from pipelines.run import Run
from pipelines.rundir import RunDir
from pipelines.train import make_job
from pipelines.train_worker import train_worker
from storage import ActivationStore
from tests.tiny import tiny_config


@pytest.fixture(scope="session")
def resolved(tiny_model: Path) -> ResolvedModel:
    return resolve_model(ModelConfig(source=str(tiny_model)))


@pytest.fixture(scope="session")
def lm(resolved: ResolvedModel) -> LanguageModel:
    """The tiny model in fp32, for exact comparisons."""
    torch.set_num_threads(1)
    return LanguageModel(resolved, ModelConfig(source=resolved.source, dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def collected(
    tiny_model: Path, tiny_texts: Path, resolved: ResolvedModel, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A run whose store is sealed; not to be changed."""
    config = RunConfig.model_validate(
        tiny_config(tiny_model, tiny_texts, hooks=["model.layers.1", "model.layers.0:input"])
    )
    run = Run(config, RunDir(tmp_path_factory.mktemp("collected") / "run"))
    writer = prepare_store(config, run.dir, resolved, SilentReporter())
    harvester = Harvester(
        store_path(config, run.dir), resolved, config.model, config.collect.batch_contexts, n_threads=1
    )
    for shard in writer.missing():
        harvester.harvest(shard)
    writer.seal()
    return run


@pytest.fixture(scope="session")
def store(collected: Run) -> ActivationStore:
    return open_store(collected.config, collected.dir)


@pytest.fixture(scope="session")
def trained(collected: Run, store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of its own on the shared store, with a trained dictionary; not to be changed."""
    collect = collected.config.collect.model_copy(update={"store": str(collected.dir.store_path)})
    run = Run(
        collected.config.model_copy(update={"collect": collect}), RunDir(tmp_path_factory.mktemp("trained") / "run")
    )
    train_worker(make_job(run.config, run.dir, "main", store))
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A fresh run directory with the trained dictionary in it, for a test to change."""
    fresh = Run(trained.config, RunDir(tmp_path / "run"))
    shutil.copytree(trained.dir.checkpoints("main"), fresh.dir.checkpoints("main"))
    return fresh
