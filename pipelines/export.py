"""export: the dictionary folder that users load and publish, with its feature table, contexts, metrics and card."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from pipelines.collect import open_store
from pipelines.config import RunConfig
from pipelines.dictionaries import load_trained
from pipelines.progress import Reporter
from pipelines.rundir import RunDir, replacing_directory, write_text
from sae import Dictionary
from sae.interop.saelens import saelens_reads
from storage import LatentStore


def export(config: RunConfig, run: RunDir, ui: Reporter) -> dict[str, str]:
    """Write `dictionaries/SAE` of every SAE; returns the folders."""
    folders = {}
    with ui.stage("export", total=len(config.saes), unit="dictionaries") as bar:
        for name in config.saes:
            folders[name] = str(export_dictionary(config, run, name))
            bar.advance(1)
    return folders


def export_dictionary(config: RunConfig, run: RunDir, name: str) -> Path:
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
        examples = run.labels(name) / "examples.parquet"
        if examples.exists():
            shutil.copyfile(examples, partial / "examples.parquet")
        write_text(partial / "README.md", model_card(name, config.name, dictionary, metrics))
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


_OURS_ALONE = "SAELens has no such architecture and does not read the folder."


def model_card(name: str, run_name: str, dictionary: Dictionary, metrics: dict[str, Any]) -> str:
    """A model card: what it is, how to load it, how good it is, where it comes from."""
    provenance = dictionary.provenance
    rows = [
        ("L0", "l0", "mean active latents a token"),
        ("FVU", "fvu", "unexplained variance; lower is better"),
        ("CE loss score", "ce_loss_score", "loss recovered by the splice; higher is better"),
        ("KL score", "kl_div_score", "higher is better"),
        ("Silent latents", "dead_share", f"share silent on the {metrics.get('n_heldout_tokens', 0):,} held-out tokens"),
        ("Labelled", "label_share_labelled", "share of live latents whose label passed its held-out test"),
        ("FVU, all tokens", "fvu_all", "attention sinks included"),
        ("CE loss score, all tokens", "ce_loss_score_all", "attention sinks spliced too"),
    ]
    table = "\n".join(
        f"| {title} | {metrics[key]:.4g} | {note} |" for title, key, note in rows if metrics.get(key) is not None
    )
    sources = "\n".join(f"- `{text['origin']}`" for text in provenance["text"])
    kind: str = dictionary.config.architecture
    if kind not in ("transcoder", "crosscoder"):
        kind += " sparse autoencoder"
    hooks = "`, `".join(dictionary.hook_names or (provenance["hook_name"],))
    return f"""---
library_name: sae-pipelines
tags: [sparse-autoencoder, interpretability]
---

# {run_name} / {name}

A {kind} on `{hooks}` of `{provenance["model_name"]}`.

```python
from sae import Dictionary

d = Dictionary.load("path/to/this/folder")
latents = d.encode(x)  # (..., d_in) -> (..., d_sae)
```

{"SAELens reads the folder as well (`SAE.load_from_disk`)." if saelens_reads(dictionary.config) else _OURS_ALONE}

| held-out figure | value | |
|---|---|---|
{table}

Figures are over tokens that are not attention sinks, unless they say otherwise.

Texts:
{sources}

The licences of the model and of the texts apply to what is derived from them. `features.parquet` has one row per
latent, `examples.parquet` contexts, `dictionary.json` the full provenance; how the texts were packed:

```json
{json.dumps(provenance.get("packing"), indent=2)}
```
"""
