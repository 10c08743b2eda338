"""export: the dictionary folder that users load and publish: feature table, contexts, metrics, card, feature pages."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import torch

from pipelines.card import model_card
from pipelines.collect import open_store
from pipelines.config import RunConfig
from pipelines.dictionaries import load_trained
from pipelines.pages import write_pages
from pipelines.pages.command import speller_or_none
from pipelines.progress import Reporter
from pipelines.rundir import PAGES, RunDir, read_json, replacing_directory, write_json, write_text
from sae import Dictionary
from storage import LatentStore


def export(config: RunConfig, run: RunDir, ui: Reporter) -> dict[str, str]:
    """Write `dictionaries/SAE` of every SAE; returns the folders."""
    folders = {}
    with ui.stage("export", total=len(config.saes), unit="dictionaries") as bar:
        for name in config.saes:
            folders[name] = str(export_dictionary(config, run, name, ui))
            bar.advance(1)
    return folders


def export_dictionary(config: RunConfig, run: RunDir, name: str, ui: Reporter) -> Path:
    """Write one dictionary folder; it replaces an older one whole."""
    dictionary = load_trained(run, name)
    prefix = f"{name}."
    metrics = {key.removeprefix(prefix): value for key, value in run.metrics().items() if key.startswith(prefix)}
    features_file = run.labels(name) / "features.parquet"
    features = pq.read_table(features_file) if features_file.exists() else None
    target = run.dictionary(name)
    with replacing_directory(target) as partial:
        dictionary.save(
            partial,
            provenance=dictionary.provenance,
            metrics=metrics,
            sparsity=_firing_share(config, run, name),
            features=features,
            overwrite=True,
        )
        for table in ("examples.parquet", "labels.parquet"):
            if (run.labels(name) / table).exists():
                shutil.copyfile(run.labels(name) / table, partial / table)
        if run.evaluation_path.exists():
            record = read_json(run.evaluation_path)
            if name in record["saes"]:
                write_json(partial / run.evaluation_path.name, record | {"saes": {name: record["saes"][name]}})
        write_text(partial / "README.md", model_card(f"{config.name} / {name}", dictionary, metrics))
        if features is not None:
            shown = Dictionary.load(partial)
            has_contexts = (partial / "examples.parquet").exists()
            speller = speller_or_none(shown, ui, config.model) if has_contexts else None
            write_pages(shown, partial, partial / PAGES, title=f"{config.name} / {name}", speller=speller)
    return target


def _firing_share(config: RunConfig, run: RunDir, name: str) -> torch.Tensor | None:
    """Share of the store's tokens, sinks left out, on which each latent fires; None when latents were not computed."""
    if not run.latents(name).exists():
        return None
    store, hook = open_store(config, run), config.hook_of(name)
    n_counted = 0
    for shard in range(store.spec.n_shards):
        start, stop = store.spec.shard_range(shard)
        n_counted += int((~store.sink_mask(hook, start, stop, config.sinks.multiple)).sum())
    return torch.from_numpy(LatentStore.open(run.latents(name)).counts()).double() / n_counted
