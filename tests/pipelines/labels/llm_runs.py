"""A labelled run on the tiny model, and ways to ask endpoints about it."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

from pipelines.collect import open_store
from pipelines.config import ModelConfig, RunConfig
from pipelines.dictionaries import load_trained
from pipelines.labels.gather import gather
from pipelines.models import LanguageModel, resolve_model
from pipelines.progress import SilentReporter
from pipelines.run import Run
from pipelines.rundir import RunDir
from storage import LatentStore


def with_llm(run: Run, folder: Path, base_url: str, **settings: Any) -> Run:
    """A copy of the run whose config asks one endpoint to explain and judge."""
    endpoint = {"base_url": base_url, "model": "m", "max_retries": 0, "timeout_s": 5, "concurrency": 2}
    endpoint |= settings.pop("endpoint", {})
    prefer = settings.pop("prefer", ["predicate"])
    llm = {"explainer": endpoint, "latents": 6, "others": 4, "neighbours": 2} | settings
    data = run.config.model_dump(mode="json")
    data["label"] |= {"llm": llm, "prefer": prefer}
    shutil.copytree(run.dir.path, folder)
    return Run(RunConfig.model_validate(data), RunDir(folder))


def gather_labels(run: Run, only: frozenset[str] | None = None) -> dict[str, Any]:
    """What the label stage does after the rules; raises as it does."""
    gathered = gather(
        run.config,
        run.dir,
        "main",
        open_store(run.config, run.dir),
        LatentStore.open(run.dir.latents("main")),
        load_trained(run.dir, "main"),
        token_strings_of(run.config.model.source),
        SilentReporter(),
        only=only,
    )
    run.dir.update_metrics("main", gathered.figures)
    if gathered.trouble is not None:
        raise gathered.trouble
    return gathered.figures


@cache
def token_strings_of(source: str) -> list[str]:
    config = ModelConfig(source=source)
    return LanguageModel(resolve_model(config), config).token_strings()
