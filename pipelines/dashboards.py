"""A labelled dictionary for other people's viewers: SAEDashboard's JSON, and the bundle that Neuronpedia imports.

    SAEDashboard    batch-0.json …   {model_id, layer, sae_set, sae_id_suffix, features: [{…, activations: […]}]}
    Neuronpedia     MODEL/LAYER-SET/ release, model, sourceset, source .jsonl
                                     features, activations, explanations /batch-0.jsonl.gz …

Both have what a dictionary folder knows: density, promoted and suppressed tokens with their logits, contexts, labels
that passed their test. What it does not know (histograms, correlated neurons, loss by token) stays empty, as their own
readers allow. Keys are those of SAEDashboard's `NeuronpediaDashboardBatch` and of Neuronpedia's
`neuronpedia_utils.db_models`.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from torch import Tensor

from pipelines.errors import UsageError
from pipelines.labels.logit_lens import LensTokens, logit_lens
from pipelines.models import LanguageModel
from pipelines.rundir import replacing_directory
from sae import Dictionary

_BATCH = 1024
"""Latents in a file."""
_N_LOGITS, _N_ALIGNED = 10, 3


@dataclass(frozen=True)
class Publication:
    """What a viewer shows that the dictionary does not know."""

    model_id: str
    """The viewer's name of the model, TransformerLens's: "gpt2-small"."""
    source_set: str
    """Short name of the dictionaries of one kind, without the layer: "res-4k"."""
    creator_id: str = ""
    """Of the Neuronpedia account that imports; needed for a bundle."""
    creator_name: str = ""
    release: str = ""
    """Name of the release in the URL; by default `source_set`."""
    title: str = ""
    url: str = ""
    created: str = "1970-01-01T00:00:00"
    """ISO date. A fixed one gives equal files for equal dictionaries."""


def write_saedashboard(folder: Path, target: Path, lm: LanguageModel, publication: Publication) -> list[Path]:
    """Write SAEDashboard's batches of a dictionary folder into `target`, which is replaced.

    Raises: UsageError if the folder has no feature table or contexts, or its hook is in no layer.
    """
    labelled = _Labelled(folder, lm)
    with replacing_directory(target) as partial:
        for number, latents in enumerate(labelled.batches()):
            batch = {
                "model_id": publication.model_id,
                "layer": labelled.layer,
                "sae_set": publication.source_set,
                "sae_id_suffix": None,
                "features": [labelled.dashboard(latent) for latent in latents],
            }
            (partial / f"batch-{number}.json").write_text(_json(batch), encoding="utf-8")
    return sorted(target.glob("batch-*.json"))


def write_neuronpedia(folder: Path, target: Path, lm: LanguageModel, publication: Publication) -> Path:
    """Write Neuronpedia's import bundle of a dictionary folder below `target`; returns the folder of the source.

    Raises: UsageError as `write_saedashboard`, or if `creator_id` is missing.
    """
    if not publication.creator_id:
        raise UsageError("a Neuronpedia bundle needs `creator_id`, the id of the account that imports it")
    labelled = _Labelled(folder, lm)
    source = f"{labelled.layer}-{publication.source_set}"
    place = target / publication.model_id / source
    with replacing_directory(place) as partial:
        for name, record in _records(publication, labelled, source).items():
            (partial / f"{name}.jsonl").write_text(_json(record) + "\n", encoding="utf-8")
        for number, latents in enumerate(labelled.batches()):
            dashboards = [labelled.dashboard(latent) for latent in latents]
            kinds = {
                "features": (_feature(d, labelled, publication, source) for d in dashboards),
                "activations": (line for d in dashboards for line in _activations(d, publication, source)),
                "explanations": (line for d in dashboards for line in _explanation(d, labelled, publication, source)),
            }
            for kind, lines in kinds.items():
                _write_lines(partial / kind / f"batch-{number}.jsonl.gz", lines)
    return place


# ---- what the folder knows -------------------------------------------------------------------------------------------


class _Labelled:
    """A dictionary folder with its tables, by latent."""

    def __init__(self, folder: Path, lm: LanguageModel) -> None:
        self.dictionary = Dictionary.load(folder)
        found = re.search(r"(?:layers|blocks|h)\.(\d+)", self.dictionary.hook_name or "")
        if found is None:
            raise UsageError(f"{folder}: viewers go by layer, but the hook {self.dictionary.hook_name!r} is in none")
        self.layer = int(found[1])
        files = (folder / "features.parquet", folder / "examples.parquet")
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise UsageError(f"{folder} has no {', '.join(missing)}: run `sae label` and `sae export` first")
        self.features: list[dict[str, Any]] = pq.read_table(files[0]).to_pylist()
        self._examples = pq.read_table(files[1]).sort_by([("latent", "ascending")])
        if "token_ids" not in self._examples.column_names:
            raise UsageError(f"{files[1]} was published without its texts, which viewers show")
        owner = self._examples["latent"].to_numpy()
        self._bounds = np.searchsorted(owner, np.arange(self.dictionary.d_sae + 1))
        self._strings = lm.token_strings()
        self._lens = self._logits(lm)

    def _logits(self, lm: LanguageModel) -> LensTokens | None:
        norm, W_U = lm.unembedding()
        if self.dictionary.W_dec.shape[1] != len(norm):
            return None  # not the residual stream
        return logit_lens(self.dictionary.W_dec, norm, W_U, n_top=min(_N_LOGITS, W_U.shape[1]))

    def batches(self) -> Iterator[range]:
        edges = [*range(0, self.dictionary.d_sae, _BATCH), self.dictionary.d_sae]
        return (range(start, stop) for start, stop in pairwise(edges))

    def label(self, latent: int) -> str | None:
        label: str | None = self.features[latent]["label"]
        return label

    def origin(self, latent: int) -> str:
        """Whose label that is."""
        source = self.features[latent].get("label_source")
        if source in (None, "predicate"):
            return "a rule with a held-out test, made by sae-pipelines"
        return f"by {source}; passed a held-out test of sae-pipelines"

    def dashboard(self, latent: int) -> dict[str, Any]:
        """One latent as SAEDashboard has it."""
        row = self.dictionary.W_dec[latent].float()
        aligned = row.topk(min(_N_ALIGNED, len(row)))
        positive, negative = self._tokens(latent)
        return {
            "feature_index": latent,
            "neuron_alignment_indices": aligned.indices.tolist(),
            "neuron_alignment_values": _rounded(aligned.values),
            "neuron_alignment_l1": _rounded(aligned.values / row.abs().sum().clamp_min(1e-12)),
            "correlated_neurons_indices": [],
            "correlated_neurons_l1": [],
            "correlated_neurons_pearson": [],
            "correlated_features_indices": [],
            "correlated_features_l1": [],
            "correlated_features_pearson": [],
            "neg_str": negative[0],
            "neg_values": negative[1],
            "pos_str": positive[0],
            "pos_values": positive[1],
            "frac_nonzero": float(self.features[latent]["density"]),
            "freq_hist_data_bar_values": [],
            "freq_hist_data_bar_heights": [],
            "logits_hist_data_bar_heights": [],
            "logits_hist_data_bar_values": [],
            "n_prompts_total": self._n_prompts(),
            "n_tokens_in_prompt": int(self.dictionary.provenance.get("context_size") or 0),
            "dataset": ", ".join(str(text["origin"]) for text in self.dictionary.provenance.get("text", ())),
            "decoder_weights_dist": [],
            "activations": self._contexts(latent),
        }

    def _n_prompts(self) -> int:
        contexts = self._examples["context"].to_numpy()
        return int(contexts.max()) + 1 if len(contexts) else 0

    def _tokens(self, latent: int) -> tuple[tuple[list[str], list[float]], tuple[list[str], list[float]]]:
        if self._lens is None:
            return ([], []), ([], [])
        lens = self._lens
        sides = ((lens.promoted, lens.promoted_value), (lens.suppressed, lens.suppressed_value))
        named = [([self._strings[i] for i in ids[latent].tolist()], _rounded(values[latent])) for ids, values in sides]
        return named[0], named[1]

    def _contexts(self, latent: int) -> list[dict[str, Any]]:
        rows = self._examples.slice(self._bounds[latent], self._bounds[latent + 1] - self._bounds[latent]).to_pylist()
        bins: dict[int, list[float]] = {}
        for row in rows:
            if row["kind"] != "top":
                bins.setdefault(row["rank"], []).append(row["max_value"])
        return [
            {
                "bin_min": -1 if row["kind"] == "top" else round(min(bins[row["rank"]]), 3),
                "bin_max": round(row["max_value"] if row["kind"] == "top" else max(bins[row["rank"]]), 3),
                "bin_contains": -1 if row["kind"] == "top" else 0,
                "qualifying_token_index": row["peak"],
                "tokens": [self._strings[token] for token in row["token_ids"]],
                "values": [round(value, 3) for value in row["values"]],
            }
            for row in rows
        ]


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.tolist()]


# ---- as Neuronpedia has it -------------------------------------------------------------------------------------------


def _records(publication: Publication, labelled: _Labelled, source: str) -> dict[str, dict[str, Any]]:
    common = {"creatorId": publication.creator_id, "createdAt": publication.created, "visibility": "PUBLIC"}
    release = publication.release or publication.source_set
    first = labelled.dashboard(0)
    return {
        "release": common
        | {
            "name": release,
            "description": publication.title or release,
            "descriptionShort": publication.title or release,
            "urls": [publication.url] if publication.url else [],
            "creatorName": publication.creator_name,
            "creatorNameShort": publication.creator_name,
        },
        "model": common
        | {
            "id": publication.model_id,
            "instruct": publication.model_id.endswith("-it") or "instruct" in publication.model_id.lower(),
            "displayName": publication.model_id,
            "displayNameShort": publication.model_id,
            "updatedAt": publication.created,
        },
        "sourceset": common
        | {
            "modelId": publication.model_id,
            "name": publication.source_set,
            "description": publication.title or publication.source_set,
            "creatorName": publication.creator_name,
            "releaseName": release,
            "hasDashboards": True,
        },
        "source": common
        | {
            "id": source,
            "modelId": publication.model_id,
            "setName": publication.source_set,
            "hasDashboards": True,
            "dataset": first["dataset"],
            "num_prompts": first["n_prompts_total"],
            "num_tokens_in_prompt": first["n_tokens_in_prompt"],
        },
    }


def _feature(d: dict[str, Any], labelled: _Labelled, publication: Publication, source: str) -> dict[str, Any]:
    dropped = ("feature_index", "activations", "n_prompts_total", "n_tokens_in_prompt", "dataset")
    largest = max((max(context["values"], default=0.0) for context in d["activations"]), default=0.0)
    return {
        "modelId": publication.model_id,
        "layer": source,
        "index": str(d["feature_index"]),
        "creatorId": publication.creator_id,
        "createdAt": publication.created,
        "maxActApprox": largest,
        "hasVector": True,
        "vector": [float(f"{value:.6g}") for value in labelled.dictionary.W_dec[d["feature_index"]].tolist()],
        "vectorLabel": None,
        "vectorDefaultSteerStrength": largest,
        "hookName": labelled.dictionary.hook_name,
        "topkCosSimIndices": [],
        "topkCosSimValues": [],
    } | {key: value for key, value in d.items() if key not in dropped}


def _activations(d: dict[str, Any], publication: Publication, source: str) -> Iterator[dict[str, Any]]:
    for number, context in enumerate(d["activations"]):
        values = context["values"]
        yield {
            "id": _identity(publication, source, d["feature_index"], number),
            "tokens": context["tokens"],
            "index": str(d["feature_index"]),
            "layer": source,
            "modelId": publication.model_id,
            "maxValue": max(values),
            "maxValueTokenIndex": int(np.argmax(values)),
            "minValue": min(values),
            "values": values,
            "creatorId": publication.creator_id,
            "createdAt": publication.created,
            "dfaValues": [],
            "lossValues": [],
            "binMin": context["bin_min"],
            "binMax": context["bin_max"],
            "binContains": context["bin_contains"],
            "qualifyingTokenIndex": context["qualifying_token_index"],
        }


def _explanation(
    d: dict[str, Any], labelled: _Labelled, publication: Publication, source: str
) -> Iterator[dict[str, Any]]:
    label = labelled.label(d["feature_index"])
    if label:
        yield {
            "id": _identity(publication, source, d["feature_index"], "label"),
            "modelId": publication.model_id,
            "layer": source,
            "index": str(d["feature_index"]),
            "description": label,
            "authorId": publication.creator_id,
            "typeName": None,
            "explanationModelName": None,
            "notes": labelled.origin(d["feature_index"]),
            "createdAt": publication.created,
        }


def _identity(publication: Publication, source: str, latent: int, what: object) -> str:
    """Like the ids of Neuronpedia: a letter and 24 more; the same whenever the same is written."""
    text = f"{publication.model_id}/{source}/{latent}/{what}/{publication.creator_id}"
    return "c" + hashlib.sha256(text.encode()).hexdigest()[:24]


def _write_lines(file: Path, lines: Iterator[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, compresslevel=5, filename="") as stream:
        for line in lines:
            stream.write((_json(line) + "\n").encode())


def _json(value: Mapping[str, Any] | Sequence[Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
