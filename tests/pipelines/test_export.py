import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.dictionaries import load_trained
from pipelines.errors import RunError
from pipelines.evaluate import evaluate
from pipelines.export import export
from pipelines.features import read_labels
from pipelines.latents import compute_latents, dictionary_digest
from pipelines.progress import SilentReporter
from sae import Dictionary, JumpReLUConfig, build
from tests.tiny import DICTIONARY_FILES

FEATURES = pa.table({"latent": list(range(96)), "label": ["rivers", None] * 48})


@pytest.fixture
def complete(run, store):
    """The run with everything that export takes in."""
    evaluate(run.config, run.dir, SilentReporter())
    compute_latents(
        store,
        load_trained(run.dir, "main"),
        run.dir,
        "main",
        SilentReporter(),
        sink_multiple=3.0,
        digest=dictionary_digest(run.dir.trained("main")),
    )
    run.dir.labels("main").mkdir(parents=True)
    pq.write_table(FEATURES, run.dir.labels("main") / "features.parquet")
    pq.write_table(pa.table({"latent": [0]}), run.dir.labels("main") / "examples.parquet")
    pq.write_table(pa.table({"latent": [0], "source": ["human:Ada"]}), run.dir.labels("main") / "labels.parquet")
    run.dir.update_metrics("main", {"label_share_labelled": 0.25})
    run.dir.update_metrics("mainly", {"fvu": 0.123})
    return run


def test_export_writes_everything_a_user_needs(complete, store):
    folder = complete.dir.dictionary("main")
    assert export(complete.config, complete.dir, SilentReporter()) == {"main": str(folder)}
    assert {path.name for path in folder.iterdir()} == DICTIONARY_FILES | {"pages"}
    exported, trained = Dictionary.load(folder), load_trained(complete.dir, "main")
    x = store.activations("model.layers.1", 0, 4)
    torch.testing.assert_close(exported.encode(x), trained.encode(x), rtol=0, atol=0)
    assert exported.hook_name == "model.layers.1"
    assert exported.provenance == trained.provenance
    assert exported.metrics["label_share_labelled"] == 0.25
    assert exported.metrics["fvu"] == complete.dir.metrics()["main.fvu"] != 0.123
    assert not any("mainly" in name for name in exported.metrics)  # another SAE's
    assert exported.features.equals(FEATURES)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["saes"].keys() == {"main"}
    assert evaluation["saes"]["main"]["figures"]["fvu"]["value"] == exported.metrics["fvu"]


def test_exported_firing_shares_are_those_of_the_latents(complete, store):
    export(complete.config, complete.dir, SilentReporter())
    exported = Dictionary.load(complete.dir.dictionary("main"))
    x = store.activations("model.layers.1", 0, store.spec.n_contexts)
    sinks = store.sink_mask("model.layers.1", 0, store.spec.n_contexts, 3.0)
    share = (exported.encode(x).numpy()[~sinks] > 0).mean(0)
    found = 10 ** exported.log10_frequency.double().numpy()
    np.testing.assert_allclose(found[share > 0], share[share > 0], rtol=1e-3)


def test_card_has_the_figures_the_origin_and_code_that_loads(complete, tiny_texts, tiny_model):
    export(complete.config, complete.dir, SilentReporter())
    card = (complete.dir.dictionary("main") / "README.md").read_text(encoding="utf-8")
    metrics = complete.dir.metrics()
    assert card.startswith("---\nlibrary_name: sae-pipelines\n")
    assert "# tiny / main" in card
    assert f"A batchtopk sparse autoencoder on `model.layers.1` of `{tiny_model}`." in card
    assert f"| FVU | {metrics['main.fvu']:.4g} |" in card
    assert f"| KL score | {metrics['main.kl_div_score']:.4g} |" in card
    assert f"silent on the {metrics['main.n_heldout_tokens']:,} held-out tokens" in card
    assert "| Labelled | 0.25 |" in card
    assert f"- `{tiny_texts}`" in card
    assert json.loads(card.split("```json\n")[1].split("```")[0])["seed"] == 0
    code = (
        card.split("```python\n")[1]
        .split("```")[0]
        .replace("path/to/this/folder", str(complete.dir.dictionary("main")))
    )
    names: dict[str, object] = {"x": torch.zeros(2, 32)}
    exec(code, names)
    assert names["latents"].shape == (2, 96)


def test_export_without_labels_and_metrics_still_loads(run):
    export(run.config, run.dir, SilentReporter())
    folder = run.dir.dictionary("main")
    assert not (folder / "features.parquet").exists()
    assert Dictionary.load(folder).features is None
    assert read_labels(folder) == {}
    assert "| FVU |" not in (folder / "README.md").read_text(encoding="utf-8")


def test_export_replaces_an_older_folder_whole(complete):
    folder = complete.dir.dictionary("main")
    export(complete.config, complete.dir, SilentReporter())
    (folder / "stale").touch()
    (complete.dir.labels("main") / "examples.parquet").unlink()
    export(complete.config, complete.dir, SilentReporter())
    assert not (folder / "stale").exists()
    assert not (folder / "examples.parquet").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["main"]


def test_card_names_the_architecture_of_an_imported_dictionary(run):
    provenance = load_trained(run.dir, "main").provenance
    imported = Dictionary(build(JumpReLUConfig(d_in=32, d_sae=64), seed=0), hook_name="model.layers.1")
    imported.save(run.dir.trained("main"), provenance=provenance, overwrite=True)
    export(run.config, run.dir, SilentReporter())
    assert "A jumprelu sparse autoencoder" in (run.dir.dictionary("main") / "README.md").read_text(encoding="utf-8")


def test_export_before_training_says_what_to_run(run):
    (run.dir.trained("main") / "cfg.json").unlink()
    with pytest.raises(RunError, match=r"the run has no trained dictionary 'main': run `sae train` first"):
        export(run.config, run.dir, SilentReporter())


def test_read_labels_skips_latents_without_one(complete):
    labels = read_labels(complete.dir.labels("main"))
    assert labels == dict.fromkeys(range(0, 96, 2), "rivers")
