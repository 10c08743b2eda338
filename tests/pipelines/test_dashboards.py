"""What other people's viewers get, against the keys that their own readers take."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.config import ModelConfig
from pipelines.dashboards import Publication, write_neuronpedia, write_saedashboard
from pipelines.errors import UsageError
from pipelines.models import LanguageModel, resolve_model
from sae import Dictionary, TopKConfig, build

# The constructors of SAEDashboard's NeuronpediaDashboardFeature and NeuronpediaDashboardActivation, without the DFA
# values of attention, and with what Neuronpedia's converter reads beside them.
DASHBOARD_FEATURE = {
    *("feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero"),
    *("freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
    *("n_prompts_total", "n_tokens_in_prompt", "dataset", "activations", "decoder_weights_dist"),
}
DASHBOARD_ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}
# The dataclasses of Neuronpedia's db_models: what has no default, and what else there is.
REQUIRED = {
    "model": {"id", "instruct", "creatorId"},
    "release": {"name", "description", "creatorName", "creatorId"},
    "sourceset": {"modelId", "name", "creatorId"},
    "source": {"id", "modelId", "setName", "creatorId"},
    "features": {"modelId", "layer", "index"},
    "activations": {
        *("id", "tokens", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex"),
        *("minValue", "values", "creatorId"),
    },
    "explanations": {"id", "modelId", "layer", "index", "description", "authorId"},
}
OPTIONAL = {
    "model": {"displayNameShort", "displayName", "createdAt", "updatedAt", "visibility"},
    "release": {"descriptionShort", "urls", "creatorNameShort", "createdAt", "visibility"},
    "sourceset": {"description", "creatorName", "releaseName", "hasDashboards", "createdAt", "visibility"},
    "source": {
        *("hasDashboards", "dataset", "num_prompts", "num_tokens_in_prompt", "createdAt", "visibility"),
    },
    "features": {
        *("creatorId", "createdAt", "maxActApprox", "hasVector", "vector", "vectorLabel", "hookName"),
        *("vectorDefaultSteerStrength", "topkCosSimIndices", "topkCosSimValues"),
        *(DASHBOARD_FEATURE - {"feature_index", "activations", "n_prompts_total", "n_tokens_in_prompt", "dataset"}),
    },
    "activations": {
        *("createdAt", "dfaValues", "lossValues", "binMin", "binMax", "binContains", "qualifyingTokenIndex"),
    },
    "explanations": {"typeName", "explanationModelName", "notes", "createdAt"},
}
PUBLICATION = Publication(
    model_id="tiny", source_set="res-24", creator_id="c123", creator_name="us", url="https://x.org"
)


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> LanguageModel:
    config = ModelConfig(source=str(tiny_model), dtype="float32")
    return LanguageModel(resolve_model(config), config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    provenance = {"context_size": 32, "text": [{"origin": "texts.jsonl"}]}
    sae = build(TopKConfig(d_in=32, d_sae=24, k=3), seed=0)
    features = {"latent": list(range(24)), "label": ["rivers", *[None] * 23], "density": [0.25, *[0.0] * 23]}
    Dictionary(sae, hook_name="model.layers.1", provenance=provenance).save(
        tmp_path / "main", features=pa.table(features)
    )
    examples = {
        "latent": [5, 0, 0, 0],
        "kind": ["top", "top", "quantile", "quantile"],
        "rank": [0, 0, 1, 1],
        "context": [3, 1, 2, 9],
        "peak": [0, 1, 0, 0],
        "token_ids": [[7], [4, 5], [6], [4]],
        "values": [[0.5], [0.0, 2.12345], [1.0], [0.75]],
        "max_value": [0.5, 2.12345, 1.0, 0.75],
        "text": ["g", "de", "f", "d"],
    }
    pq.write_table(pa.table(examples), tmp_path / "main" / "examples.parquet")
    return tmp_path / "main"


def lines(file: Path) -> list[dict[str, Any]]:
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in content.splitlines()]


def test_saedashboard_batches_hold_what_its_reader_takes(folder: Path, lm: LanguageModel, tmp_path: Path) -> None:
    (file,) = write_saedashboard(folder, tmp_path / "out", lm, PUBLICATION)
    batch = json.loads(file.read_text())
    assert {key: batch[key] for key in ("model_id", "layer", "sae_set", "sae_id_suffix")} == {
        "model_id": "tiny",
        "layer": 1,
        "sae_set": "res-24",
        "sae_id_suffix": None,
    }
    assert [feature["feature_index"] for feature in batch["features"]] == list(range(24))
    assert all(feature.keys() == DASHBOARD_FEATURE for feature in batch["features"])
    first = batch["features"][0]
    assert (first["frac_nonzero"], first["n_prompts_total"], first["n_tokens_in_prompt"]) == (0.25, 10, 32)
    strings = lm.token_strings()
    top, low, high = first["activations"]
    assert all(context.keys() == DASHBOARD_ACTIVATION for context in first["activations"])
    assert top == {
        "bin_min": -1,
        "bin_max": 2.123,
        "bin_contains": -1,
        "qualifying_token_index": 1,
        "tokens": [strings[4], strings[5]],
        "values": [0.0, 2.123],
    }
    assert [(c["bin_min"], c["bin_max"], c["bin_contains"]) for c in (low, high)] == [(0.75, 1.0, 0)] * 2
    assert batch["features"][7]["activations"] == []
    norm, W_U = lm.unembedding()
    logits = (Dictionary.load(folder).W_dec[0] * norm) @ W_U
    logits -= logits.mean()
    best = logits.topk(10)
    assert first["pos_str"] == [strings[i] for i in best.indices.tolist()]
    torch.testing.assert_close(torch.tensor(first["pos_values"]), best.values, atol=6e-4, rtol=0)
    assert first["neg_values"] == sorted(first["neg_values"])


def test_a_neuronpedia_bundle_holds_what_its_importer_takes(folder: Path, lm: LanguageModel, tmp_path: Path) -> None:
    place = write_neuronpedia(folder, tmp_path / "out", lm, PUBLICATION)
    assert place == tmp_path / "out" / "tiny" / "1-res-24"
    found = {kind: lines(place / f"{kind}.jsonl") for kind in ("model", "release", "sourceset", "source")}
    found |= {kind: lines(place / kind / "batch-0.jsonl.gz") for kind in ("features", "activations", "explanations")}
    for kind, records in found.items():
        for record in records:
            assert record.keys() >= REQUIRED[kind], kind
            assert record.keys() <= REQUIRED[kind] | OPTIONAL[kind], kind
    assert [len(found[kind]) for kind in ("features", "activations", "explanations")] == [24, 4, 1]
    assert found["source"][0]["id"] == found["features"][0]["layer"] == "1-res-24"
    assert found["explanations"][0]["description"] == "rivers"
    assert found["features"][0]["maxActApprox"] == 2.123
    vector = torch.tensor(found["features"][3]["vector"])
    torch.testing.assert_close(vector, Dictionary.load(folder).W_dec[3], atol=1e-6, rtol=1e-5)
    context = found["activations"][0]
    assert (context["index"], context["maxValueTokenIndex"], context["minValue"]) == ("0", 1, 0.0)
    ids = [record["id"] for record in found["activations"] + found["explanations"]]
    assert len(set(ids)) == 5
    assert all(len(one) == 25 for one in ids)
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    write_neuronpedia(folder, tmp_path / "out", lm, PUBLICATION)
    assert before == {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}, "the same every time"


def test_viewers_are_refused_what_they_cannot_show(folder: Path, lm: LanguageModel, tmp_path: Path) -> None:
    nobody = Publication(model_id="tiny", source_set="x")
    with pytest.raises(UsageError, match="needs `creator_id`"):
        write_neuronpedia(folder, tmp_path / "out", lm, nobody)
    examples = pq.read_table(folder / "examples.parquet")
    pq.write_table(examples.drop_columns(["token_ids", "values", "text"]), folder / "examples.parquet")
    with pytest.raises(UsageError, match="published without its texts"):
        write_saedashboard(folder, tmp_path / "out", lm, nobody)
    (folder / "examples.parquet").unlink()
    with pytest.raises(UsageError, match=r"has no examples\.parquet: run `sae label`"):
        write_saedashboard(folder, tmp_path / "out", lm, nobody)
    elsewhere = Dictionary(build(TopKConfig(d_in=32, d_sae=24, k=3), seed=0), hook_name="model.embed_tokens")
    with pytest.raises(UsageError, match=r"the hook 'model\.embed_tokens' is in none"):
        write_saedashboard(elsewhere.save(tmp_path / "e"), tmp_path / "out", lm, nobody)
    assert not (tmp_path / "out").exists()
