"""What a user gets for a mistake or a damaged file: exit code, one message with the fix, nothing half-written."""

import json
import re
import shutil
from pathlib import Path

import filelock
import pytest
import yaml
from command_line import FinishedRun, files, must, sae, sae_here, sentence, stages

from pipelines.run import STAGES
from storage import verify


def altered(finished: FinishedRun, tmp_path: Path, **sections: object) -> Path:
    """The finished run's config with sections replaced, as a new file."""
    config = yaml.safe_load(finished.config.read_text()) | sections
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


# -- requests that cannot be right: exit 2, and the run directory is not even made -------------------------------------

SETTINGS = {
    "unknown key": (
        "collect.n_token=5",
        r"unknown key `collect\.n_token`; the nearest valid key is `n_tokens`",
    ),
    "unknown architecture": (
        "saes.main.architecture=relu",
        r"`saes\.main\.architecture`: Input should be 'standard', .* or 'crosscoder' \(got 'relu'\)",
    ),
    "missing model": (
        "model.source=/nowhere/llama",
        r"model '/nowhere/llama' is neither a folder here nor could it be fetched .*check the name",
    ),
    "missing text": (
        "text.0.path=/nowhere/texts.jsonl",
        r"there is no file /nowhere/texts\.jsonl; check the path in the config",
    ),
    "text of a package that is not installed": (
        "text.0.path=package://no_such_package/texts.json",
        r"the package 'no_such_package' is not installed; `make demo` installs the demo's packages",
    ),
    "wrong digest": (
        "text.0.sha256=" + "f" * 64,
        r"its SHA-256 is [0-9a-f]{64}, the config expects f{64}; install the pinned file, or change the config",
    ),
    "unknown hook": (
        "hooks.0=model.layers.7",
        r"must be the path of a module of LlamaForCausalLM, got 'model\.layers\.7'\. Nearest: model\.layers\.\d",
    ),
    "k above d_sae": (
        "saes.main.k=97",
        r"saes\.main\.k is 97, more than its 96 latents: lower k, or raise d_sae",
    ),
    "a batch that does not divide": (
        "train.batch_size=200",
        r"train\.batch_size \(200\) must be a multiple of train\.streams \(16\)",
    ),
    "streams that do not divide": (
        "train.num_workers=3",
        r"train\.streams \(16\) must be a multiple of train\.num_workers \(3\)",
    ),
    "too small a shuffle": (
        "train.shuffle_contexts=20",
        r"train\.shuffle_contexts \(20\) mixes too little for .* \(256\): .* about 13 others .*; raise it to 32",
    ),
    "more workers than CPUs": (
        "train.num_workers=4",
        r"train\.num_workers and train\.cpus_per_worker ask for 4 CPUs, the local Ray has 2: lower them, or raise",
    ),
    "unknown concept": (
        "audit.concepts=[topic_biologie]",
        r"there is no shipped concept 'topic_biologie'; the nearest is 'topic_biology'",
    ),
}


def test_command_ends_with_one_sentence_and_its_exit_code(finished: FinishedRun, tmp_path):
    told = sentence(sae("run", finished.config, "--out", tmp_path / "run", "--set", "train.learning_rate=1"), 2)
    assert re.fullmatch(
        r"config .*whole\.yaml: unknown key `train\.learning_rate`; the nearest valid key is `\w+`", told
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("setting", "message"), SETTINGS.values(), ids=SETTINGS.keys())
def test_run_refuses_before_it_makes_anything(finished: FinishedRun, tmp_path, setting, message):
    told = sentence(sae_here("run", finished.config, "--out", tmp_path / "run", "--set", setting), 2)
    assert re.search(message, told), told
    assert not (tmp_path / "run").exists()


def test_run_refuses_a_concept_with_one_class_and_a_misspelt_key_listing_all_problems(finished: FinishedRun, tmp_path):
    one_class = tmp_path / "one_class.yaml"
    one_class.write_text(yaml.safe_dump({"name": "one", "positives": [f"text {i}" for i in range(40)]}))
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text(yaml.safe_dump({"name": "two", "topics": {"positive": "birds"}}))
    config = altered(finished, tmp_path, audit={"concepts": [str(one_class), str(misspelt)]})
    told = sentence(sae_here("run", config, "--out", tmp_path / "run"), 2)
    assert re.search(r"one_class\.yaml is not a usable concept: .*a concept needs both classes, and this one is", told)
    assert re.search(
        r"misspelt\.yaml is not a usable concept: unknown key 'topics'; the nearest valid .* 'topic'", told
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("weights", r"dictionary\.path: .*sae_weights\.safetensors"),
        ("folder", r"dictionary\.path: .*nowhere"),
        ("width", r"has d_in 32, but model\.layers\.0\.mlp\.gate_proj of this model has width 64: choose the hook"),
    ],
)
def test_run_refuses_an_unusable_dictionary(finished: FinishedRun, tmp_path, damage, message):
    dictionary = tmp_path / "dictionary"
    shutil.copytree(finished.out / "dictionaries/main", dictionary)
    hook = "model.layers.0.mlp.gate_proj" if damage == "width" else "model.layers.1"
    if damage == "weights":
        (dictionary / "sae_weights.safetensors").unlink()
    if damage == "folder":
        dictionary = tmp_path / "nowhere"
    saes = {"main": {"d_sae": 96, "k": 8}}
    config = altered(finished, tmp_path, hooks=[hook], saes=saes, train=None, dictionary={"path": str(dictionary)})
    told = sentence(sae_here("run", config, "--out", tmp_path / "run"), 2)
    assert re.search(message, told), told
    assert not (tmp_path / "run").exists()


def test_run_refuses_a_config_that_is_not_there(tmp_path):
    told = sentence(sae_here("run", tmp_path / "none.yaml", "--out", tmp_path / "run"), 2)
    assert re.search(r"there is no config or run directory .*none\.yaml; shipped configs: .*quickstart", told)


def test_run_refuses_a_folder_that_is_no_run_directory(tmp_path):
    assert "is not a run directory: it has no config.yaml" in sentence(sae_here("run", tmp_path), 2)


# -- texts that turn out too small while they are packed ---------------------------------------------------------------


def test_collect_refuses_too_few_documents_and_leaves_no_store(finished: FinishedRun, tmp_path):
    told = sentence(
        sae_here("run", finished.config, "--out", tmp_path / "run", "--set", "collect.n_tokens=1_000_000"), 2
    )
    assert re.search(r"holds [\d,]+ tokens, the config asks for 1,000,000: lower collect\.n_tokens", told)
    assert not (tmp_path / "run/activations").exists()
    assert stages(tmp_path / "run", "stage finished") == []


def test_audit_refuses_a_topic_with_too_few_documents_and_leaves_no_audit(finished: FinishedRun, tmp_path):
    run = finished.copy(tmp_path / "run", without=("audit",))
    concept = tmp_path / "few.yaml"
    concept.write_text(yaml.safe_dump({"name": "few", "topic": {"positive": "cats"}}))
    told = sentence(sae_here("audit", run.out, "--set", f"audit.concepts=[{concept}]"), 2)
    assert re.search(r"names topics that the documents do not have: cats\. They have: birds, chess, metals", told)
    assert not (run.out / "audit/few").exists()


# -- one run directory, one config, one process ------------------------------------------------------------------------


def test_run_refuses_a_shared_store_of_another_config_naming_the_keys(finished: FinishedRun, tmp_path):
    collect = yaml.safe_load(finished.config.read_text())["collect"] | {"store": str(finished.out / "activations")}
    config = altered(finished, tmp_path, collect=collect | {"context_length": 16}, seed=3)
    before = files(finished.out)
    told = sentence(sae_here("run", config, "--out", tmp_path / "run"), 2)
    assert "context_length" in told
    assert "seed" in told
    assert files(finished.out) == before
    assert stages(tmp_path / "run", "stage finished") == []


def test_run_refuses_a_run_directory_where_another_process_works(finished: FinishedRun, tmp_path):
    run = finished.copy(tmp_path / "run", without=("audit",))
    before = files(run.out)
    with filelock.FileLock(run.out / ".lock"):
        told = sentence(sae_here("run", run.out), 1)
    assert told == f"another process is working in {run.out}: wait for it, or choose another --out"
    assert files(run.out) == before


def test_run_refuses_a_damaged_run_config(finished: FinishedRun, tmp_path):
    run = finished.copy(tmp_path / "run", without=("audit",))
    (run.out / "config.yaml").write_text("name: tiny\nhooks: [")
    assert re.search(r"config\.yaml is not valid YAML", sentence(sae_here("run", finished.config, "--out", run.out), 2))


# -- damaged files -----------------------------------------------------------------------------------------------------


def last_shard(out: Path) -> Path:
    """The file of the last shard of the hook that the SAE reads: held-out contexts."""
    folder = out / "activations/data.zarr/hooks/model.layers.1/activations"
    return max((path for path in (folder / "c").rglob("*") if path.is_file()), key=lambda path: int(path.parts[-2]))


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_evaluate_stops_at_a_damaged_shard_and_names_it(finished: FinishedRun, tmp_path, damage):
    run = finished.copy(tmp_path / "run", without=STAGES[2:])
    shard = last_shard(run.out)
    damage(shard)
    before = (run.out / "metrics.json").read_bytes()
    told = sentence(sae_here("evaluate", run.out), 1)
    assert str(shard) in told
    assert f"shard {shard.parts[-2]}" in told
    assert (run.out / "metrics.json").read_bytes() == before
    assert stages(run.out, "stage failed") == ["evaluate"]
    # What `sae verify` says of the store, as the message's reader would ask next.
    verified = sae_here("verify", run.out / "activations")
    assert verified.returncode == 1
    assert shard.parts[-2] in verified.stdout
    assert len(verify(run.out / "activations")) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_train_stops_at_a_damaged_shard_and_names_it(finished: FinishedRun, tmp_path, damage):
    run = finished.copy(tmp_path / "run", without=STAGES[1:])
    shard = last_shard(run.out).parents[1] / "3/0"
    damage(shard)
    told = sentence(sae("train", run.out), 1)
    assert str(shard) in told
    assert "(shard 3)" in told
    assert not (run.out / "checkpoints/main/dictionary").exists()
    assert stages(run.out, "stage failed") == ["train"]


@pytest.mark.slow
def test_damaged_store_is_filled_again_once_it_is_repaired(finished: FinishedRun, tmp_path):
    run = finished.copy(tmp_path / "run")
    shard = last_shard(run.out)
    whole = shard.read_bytes()
    flip_a_bit(shard)
    told = sae_here("verify", run.out / "activations", "--repair")
    assert told.returncode == 1
    assert f"discarded shards {shard.parts[-2]}; run `sae collect {run.out}`" in told.stdout
    must(sae("run", run.out))
    assert stages(run.out, "stage finished") == ["collect"]
    assert shard.read_bytes() == whole


@pytest.mark.parametrize("file", ["sae_weights.safetensors", "cfg.json", "dictionary.json"])
def test_evaluate_stops_at_a_damaged_dictionary_and_says_how_to_get_it_back(finished: FinishedRun, tmp_path, file):
    run = finished.copy(tmp_path / "run", without=("evaluate", "export"))
    trained = run.out / "checkpoints/main/dictionary"
    (trained / file).unlink()
    told = sentence(sae_here("evaluate", run.out), 1)
    assert "run `sae train" in told
    assert "evaluate" not in stages(run.out, "stage finished")


@pytest.mark.slow
def test_deleted_dictionary_is_trained_again_from_the_last_checkpoint(finished: FinishedRun, tmp_path):
    run = finished.copy(tmp_path / "run", without=("evaluate", "export"))
    trained = "checkpoints/main/dictionary"
    shutil.rmtree(run.out / trained)
    must(sae("train", run.out))
    record = json.loads((run.out / trained / "dictionary.json").read_text())
    assert record["sha256"] == json.loads((finished.out / trained / "dictionary.json").read_text())["sha256"]
