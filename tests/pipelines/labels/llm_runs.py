"""A labelled run on the tiny model, and ways to ask endpoints about it."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.collect import open_store
from pipelines.config import ModelConfig, RunConfig
from pipelines.dictionaries import load_trained
from pipelines.labels.gather import gather
from pipelines.labels.llm.tasks import Reader
from pipelines.labels.neighbours import nearest_neighbours
from pipelines.labels.stage import read_token_table
from pipelines.labels.testset import SplitIndex, window_bounds
from pipelines.labels.trials import Sizes, draw_trials, heldout_firings, of_latent
from pipelines.models import LanguageModel, resolve_model
from pipelines.progress import SilentReporter
from pipelines.run import Run
from pipelines.rundir import RunDir
from storage import LatentStore
from tests.hostile_server import HostileServer


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


def truth_server(run: Run, latents: list[int]) -> HostileServer:
    """A judge that knows: labels are "unit N", and it has looked up where latent N fires."""
    llm = run.config.label.llm
    table = read_token_table(open_store(run.config, run.dir), run.config.hook_of("main"))
    index = SplitIndex(table)
    firings = heldout_firings(LatentStore.open(run.dir.latents("main")), index)
    neighbours = nearest_neighbours(load_trained(run.dir, "main").W_dec, 20)[0]
    sizes = Sizes(llm.positives, llm.negatives, llm.fuzzed, llm.others, llm.neighbours, llm.windows_per_other)
    trials = draw_trials(firings, np.array(latents), index, neighbours, sizes, seed=run.config.seed)
    reader = Reader(table, token_strings_of(run.config.model.source), 16)
    known: dict[tuple[str, str], bool] = {}
    for latent in latents:
        rows = firings.row[firings.indptr[latent] : firings.indptr[latent + 1]]
        asked, fuzzed = of_latent(trials.detect, latent), of_latent(trials.fuzz, latent)
        centres = np.concatenate([trials.detect.centre[asked], trials.others[latent].centre])
        for passage, first, last in zip(reader.passages(centres), *window_bounds(centres, table, 16), strict=True):
            known[f"unit {latent}", passage.text()] = bool(((rows >= first) & (rows <= last)).any())
        row = trials.fuzz.row[fuzzed]
        for passage, fires in zip(reader.passages(trials.fuzz.centre[fuzzed], row), np.isin(row, rows), strict=True):
            known[f"unit {latent}", passage.text("⟦⟧")] = bool(fires)

    def behave(body: dict[str, Any], _: int) -> tuple[str, str]:
        shown = json.loads(body["messages"][1]["content"])
        answers = [int(known[shown["description"], text]) for text in shown["passages"]]
        return "say", json.dumps({"answers": answers})

    return HostileServer(behave)
