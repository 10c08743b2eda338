"""Whole runs of the real command on a tiny model: every stage through the engine that production uses."""

import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
import zarr
from command_line import FinishedRun, events, files, must, outcome, sae, sentence, shard_digests, stages

from pipelines.documents import DOCUMENTS_FILE, SPANS_FILE, Documents, Spans
from pipelines.models import load_tokenizer, resolve_model
from pipelines.run import STAGES
from sae import Dictionary
from storage import ActivationStore, verify
from tests.tiny import DICTIONARY_FILES, TOPICS, tiny_config, write_tiny_model

HOOKS = ("model.layers.0", "model.layers.1")


# -- one run -----------------------------------------------------------------------------------------------------------


def test_run_leaves_every_artefact_of_a_run_directory(finished: FinishedRun):
    expected = {
        "config.yaml",
        "metrics.json",
        "activations/seal.json",
        "activations/data.zarr/zarr.json",
        "checkpoints/main/metrics.jsonl",
        "latents/main/seal.json",
        *(f"dictionaries/main/{name}" for name in DICTIONARY_FILES),
        "dictionaries/main/pages/index.html",
        *(
            f"audit/{name}/{file}"
            for name in ("birds", "rivers_written")
            for file in ("manifest.json", "audit.json", "report.html")
        ),
    }
    found = set(files(finished.out))
    assert not expected - found
    assert not [name for name in found if ".partial" in name or "/staging/0" in name or ".ray" in name]


def test_run_records_each_stage_once_and_in_order(finished: FinishedRun):
    assert stages(finished.out, "stage started") == stages(finished.out, "stage finished") == list(STAGES)


def test_run_config_has_every_default_and_the_versions(finished: FinishedRun):
    text = (finished.out / "config.yaml").read_text()
    resolved = yaml.safe_load(text)
    assert resolved["train"]["lr"] is None
    assert resolved["sinks"] == {"multiple": 3.0, "train_on_them": False}
    assert re.search(r"^# torch: 2\.", text, re.MULTILINE)


def test_run_ends_with_a_table_of_what_it_found(finished: FinishedRun):
    table = finished.output[finished.output.rindex("tiny / main") :]
    for row in ("tokens", "L0", "FVU", "loss recovered", "dead latents", "labelled", "birds", "rivers_written"):
        assert re.search(rf"│ {row} +│", table), f"no row {row!r} in\n{table}"
    for path in ("dictionaries/main", "audit/birds/report.html", "metrics.json"):
        assert str(finished.out / path) in table


def test_run_dictionary_is_what_the_metrics_say(finished: FinishedRun):
    dictionary = Dictionary.load(finished.out / "dictionaries/main")
    metrics = json.loads((finished.out / "metrics.json").read_text())
    assert (dictionary.hook_name, dictionary.d_in, dictionary.d_sae) == ("model.layers.1", 32, 96)
    own = {key.removeprefix("main."): value for key, value in metrics.items() if key.startswith("main.")}
    assert dictionary.metrics == own
    assert metrics["main.l0"] == pytest.approx(8, abs=1)
    assert 0 < metrics["main.fvu"] < 0.8
    assert dictionary.features is not None
    assert dictionary.features.num_rows == 96
    contexts = pq.read_table(finished.out / "dictionaries/main/examples.parquet")
    assert set(contexts["latent"].to_pylist()) <= set(range(96))


def test_run_audits_a_topic_and_written_texts(finished: FinishedRun):
    for name, title in (("birds", "Birds"), ("rivers_written", "rivers written")):
        record = json.loads((finished.out / "audit" / name / "audit.json").read_text())
        report = (finished.out / "audit" / name / "report.html").read_text()
        assert record["concept"]["name"] == name
        assert title in report
        # The same sentence in the file and in the table that the user reads first, apart from line breaks.
        words = record["verdict"]["sentence"].split()[:4]
        assert re.search(r"\s+".join(map(re.escape, words)), finished.output)


# -- the store ---------------------------------------------------------------------------------------------------------


def test_store_opens_with_stock_zarr_and_holds_the_rows_of_our_reader(finished: FinishedRun):
    store = ActivationStore.open(finished.out / "activations")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(finished.out / "activations/data.zarr", mode="r")
        for name in ("tokens", "document", "position"):
            assert np.array_equal(group[name][:], getattr(store, name))
        for hook in HOOKS:
            array = group[f"hooks/{hook}/activations"]
            assert array.attrs["hook_name"] == hook
            rows = torch.from_numpy(array[:]).view(torch.bfloat16)
            assert torch.equal(rows, store.activations(hook, 0, store.spec.n_contexts).flatten(0, 1))
            norms = rows.float().norm(dim=1)
            torch.testing.assert_close(torch.from_numpy(group[f"hooks/{hook}/norms"][:]), norms)


def test_store_of_a_run_verifies(finished: FinishedRun):
    assert verify(finished.out / "activations") == []
    assert "every file is as it was committed" in must(sae("verify", finished.out / "activations"))


def test_store_leads_from_any_row_back_to_its_text(finished: FinishedRun):
    store = ActivationStore.open(finished.out / "activations")
    documents = Documents.from_parquet(store.sidecar(DOCUMENTS_FILE))
    spans = Spans.from_parquet(store.sidecar(SPANS_FILE))
    tokenizer = load_tokenizer(resolve_model(_model_of(finished)))
    _, stop = store.spec.split_range("train")
    for span in np.random.default_rng(0).choice(len(spans.context), 50, replace=False):
        context, start, length = int(spans.context[span]), int(spans.start[span]), int(spans.length[span])
        row = int(spans.document[span])
        assert (store.document[context, start : start + length] == row).all()
        piece = tokenizer.decode(store.tokens[context, start : start + length])
        assert piece in documents.text[row]
        assert documents.split[row] == ("train" if context < stop else "heldout")
        assert documents.topic[row] in TOPICS
        words = set(documents.text[row].rstrip(".").split())
        assert words & set(TOPICS[documents.topic[row]])


def _model_of(run: FinishedRun):
    from pipelines.configio import load_config

    return load_config(run.config).model


# -- again -------------------------------------------------------------------------------------------------------------


def test_rerun_does_nothing_and_says_so(finished: FinishedRun):
    before = files(finished.out)
    output = must(sae("run", finished.config, "--out", finished.out, timeout=20))
    assert output.startswith(f"nothing to do: run is finished in {finished.out}")
    assert finished.output.endswith(output[output.index("tiny / main") :])
    assert files(finished.out) == before


def test_rerun_takes_the_run_directory_for_the_config(finished: FinishedRun):
    assert must(sae("run", finished.out, timeout=20)).startswith("nothing to do")


@pytest.mark.parametrize("setting", ["collect.n_workers=3", "train.num_workers=2", "train.checkpoint_every=7"])
def test_rerun_with_other_workers_is_still_the_same_run(finished: FinishedRun, setting):
    assert must(sae("run", finished.out, "--set", setting, timeout=20)).startswith("nothing to do")


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        (["train.lr=5e-4", "saes.main.k=9"], ["saes.main.k", "train.lr"]),
        (["collect.n_tokens=9000"], ["collect.n_tokens"]),
        (["seed=1"], ["seed"]),
        (["sinks.multiple=4"], ["sinks.multiple"]),
    ],
)
def test_rerun_with_other_activations_or_weights_is_refused_naming_the_keys(finished: FinishedRun, settings, keys):
    before = files(finished.out)
    overrides = [part for setting in settings for part in ("--set", setting)]
    message = sentence(sae("run", finished.config, "--out", finished.out, *overrides), 2)
    assert f"was made with another config (different: {', '.join(keys)})" in message
    assert "Choose another --out, or delete" in message
    assert files(finished.out) == before


@pytest.mark.parametrize(
    ("setting", "rerun"),
    [
        ("audit.alpha=0.01", ["audit"]),
        ("evaluate.n_ce_tokens=256", ["evaluate", "export"]),
        ("label.enabled=false", ["label", "export", "audit"]),
    ],
)
def test_rerun_with_another_setting_of_a_late_stage_runs_what_depends_on_it(
    finished: FinishedRun, tmp_path, setting, rerun
):
    run = finished.copy(tmp_path / "run")
    must(sae("run", run.out, "--set", setting))
    assert stages(run.out, "stage finished") == rerun
    assert shard_digests(run.out / "activations") == shard_digests(finished.out / "activations")
    if setting.startswith("label"):
        assert Dictionary.load(run.out / "dictionaries/main").features is None
        assert not [key for key in json.loads((run.out / "metrics.json").read_text()) if "label" in key]


def test_rerun_makes_again_what_was_removed(finished: FinishedRun, tmp_path):
    run = finished.copy(tmp_path / "run")
    shutil.rmtree(run.out / "dictionaries/main")
    shutil.rmtree(run.out / "audit/birds")
    must(sae("run", run.out))
    assert stages(run.out, "stage finished") == ["export", "audit"]
    assert outcome(run.out)["weights"] == outcome(finished.out)["weights"]
    assert set(outcome(run.out)["audits"]) == {"birds", "rivers_written"}


# -- other runs, by the config alone -----------------------------------------------------------------------------------


def test_run_from_an_existing_dictionary_finds_the_same_without_training(finished: FinishedRun, tmp_path):
    config = yaml.safe_load(finished.config.read_text())
    del config["train"]
    config["collect"]["store"] = str(finished.out / "activations")
    config["dictionary"] = {"path": str(finished.out / "dictionaries"), "subfolder": "main"}
    path = tmp_path / "imported.yaml"
    path.write_text(yaml.safe_dump(config))
    store_before = files(finished.out / "activations")
    must(sae("run", path, "--out", tmp_path / "run"))
    ours, theirs = (json.loads((out / "metrics.json").read_text()) for out in (tmp_path / "run", finished.out))
    assert repr(ours) == repr(theirs)
    exported = Dictionary.load(tmp_path / "run/dictionaries/main")
    assert torch.equal(exported.W_dec, Dictionary.load(finished.out / "dictionaries/main").W_dec)
    assert exported.provenance["imported_from"]["hook_name"] == "model.layers.1"
    assert not (tmp_path / "run/activations").exists(), "a shared store was named"
    assert files(finished.out / "activations") == store_before
    assert must(sae("run", path, "--out", tmp_path / "run", timeout=20)).startswith("nothing to do")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, another text and another architecture: nothing but the YAML differs."""
    folder = tmp_path_factory.mktemp("other")
    model = write_tiny_model(folder / "model", d_model=48, n_layers=2, seed=1)
    rng = np.random.default_rng(1)
    words = [word for topic in TOPICS.values() for word in topic]
    (folder / "texts.txt").write_text("".join(" ".join(rng.choice(words, size=30)) + "\n" for _ in range(300)))
    config = tiny_config(model, folder / "texts.txt", name="other", hooks=["model.layers.1.mlp:input"])
    config["text"] = [{"path": str(folder / "texts.txt")}]
    config["collect"] |= {"n_tokens": 6000, "prepend_bos": True, "n_workers": 2}
    config["saes"] = {"wide": {"architecture": "topk", "expansion_factor": 3, "k": 6}}
    config["train"] |= {"n_tokens": 10_000, "num_workers": 2}
    (folder / "other.yaml").write_text(yaml.safe_dump(config))
    return folder / "other.yaml"


def test_stages_run_one_by_one_and_refuse_to_run_out_of_order(other, tmp_path):
    out = tmp_path / "run"
    needs = {"train": "collect", "evaluate": "train", "label": "train", "export": "evaluate", "audit": "label"}
    for stage, need in needs.items():
        message = sentence(sae(stage, other, "--out", out), 1)
        assert message.startswith(f"`sae {stage}` needs the results of {need}")
        assert message.endswith(f"run `sae {need} CONFIG --out {out}` first")
    assert not out.exists()
    must(sae("collect", other, "--out", out))
    assert sentence(sae("audit", out), 1).endswith(f"run `sae label {out}` first")
    for stage in STAGES[1:]:
        must(sae(stage, out))
    assert stages(out, "stage finished") == list(STAGES)
    for stage in STAGES:
        assert f"nothing to do: {stage} is finished in {out}" in must(sae(stage, out, timeout=20))
    dictionary = Dictionary.load(out / "dictionaries/wide")
    assert (dictionary.config.architecture, dictionary.d_in, dictionary.d_sae) == ("topk", 48, 144)
    assert dictionary.hook_name == "model.layers.1.mlp:input"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["wide.l0"] <= 6
    assert ActivationStore.open(out / "activations").tokens[0, 0] == 0, "prepend_bos"
    assert [line for line in events(out) if line["event"] == "shard"]
