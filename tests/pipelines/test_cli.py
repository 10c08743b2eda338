import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.configio import load_config
from pipelines.run import STAGES, save_config
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "transformers", "zarr", "pyarrow", "scipy", "plotly", "numpy", "safetensors", "yaml")
METRICS = {
    "fvu": 0.5,
    "fvu_all": 0.4,
    "l0": 8.0,
    "ce_loss_score": 0.9,
    "ce_loss_score_all": 0.8,
    "kl_div_score": 0.7,
    "dead_share": 0.25,
    "n_latents": 96,
    "n_heldout_tokens": 1234,
}


def sae(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_sentence(result, code: int) -> str:
    """The message of a command that stopped as it should: one line on stderr, nothing else."""
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("sae: ")
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Commands write below the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tmp_path, tiny_model, tiny_texts) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tiny_model, tiny_texts)))
    return path


@pytest.fixture
def finished(run):
    """A run whose stages all have their markers."""
    save_config(run)
    for stage in STAGES:
        run.dir.mark_finished(stage, run.keys[stage], 1.0)
    run.dir.update_metrics("main", METRICS | {"activation_frequency_counts": [1, 2]})
    return run


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["verify", "--help"], ["init", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import sys, sae_pipelines_entry
sys.argv = ["sae", *{arguments!r}]
try:
    sae_pipelines_entry.main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("heavy:", [name for name in {HEAVY!r} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Usage" in result.stdout
    assert result.stdout.splitlines()[-1] == "heavy: []"
    assert result.stderr == ""


def test_help_lists_every_stage():
    result = sae("--help")
    assert result.exit_code == 0
    for stage in ("run", *STAGES, "plan", "info", "verify", "init"):
        assert f"  {stage} " in result.stdout


def test_unknown_command_and_option_are_bad_usage():
    assert sae("trian").exit_code == 2
    assert sae("run", "--lr", 3).exit_code == 2
    assert sae("run").exit_code == 2


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_config_that_does_not_exist_lists_the_shipped_ones():
    message = one_sentence(sae("run", "nowhere"), 2)
    assert "there is no config or run directory nowhere; shipped configs: quickstart" in message


def test_folder_that_is_no_run_is_refused(tmp_path):
    assert "is not a run directory: it has no config.yaml" in one_sentence(sae("run", tmp_path), 2)


def test_unknown_key_is_refused_with_the_nearest(config):
    message = one_sentence(sae("run", config, "--set", "train.learning=1"), 2)
    assert f"config {config}: unknown key `train.learning`; the nearest valid key is `" in message
    assert not Path("runs").exists()


def test_unknown_hook_is_refused_before_anything_starts(config):
    message = one_sentence(sae("run", config, "--set", "hooks=[model.layer.1]"), 2)
    assert "got 'model.layer.1'. Nearest: model.layers.1" in message
    assert not Path("runs/tiny/activations").exists()


def test_unknown_concept_is_refused_before_anything_starts(config):
    message = one_sentence(sae("run", config, "--set", "audit.concepts=[decepton]"), 2)
    assert "there is no shipped concept 'decepton'; the nearest is 'deception'" in message


def test_stage_without_its_inputs_names_the_command_that_makes_them(config):
    message = one_sentence(sae("train", config, "--out", "here"), 1)
    assert "`sae train` needs the results of collect: run `sae collect CONFIG --out here` first" in message


def test_run_directory_of_another_config_is_refused(finished):
    (finished.dir.path / "activations").mkdir()
    result = sae("run", finished.dir.path, "--set", "collect.context_length=16", "--set", "train.lr=1")
    message = one_sentence(result, 2)
    assert "was made with another config (different: collect.context_length, train.lr)" in message
    assert "Choose another --out, or delete" in message


def test_run_directory_with_a_damaged_config_is_refused(finished, config):
    finished.dir.config_path.write_text("name: tiny\nsead: 0\n")
    message = one_sentence(sae("run", config, "--out", finished.dir.path), 2)
    assert f"config {finished.dir.config_path}: " in message
    assert "unknown key `sead`; the nearest valid key is `seed`" in message


def test_damaged_store_is_told_without_a_traceback(collected, tmp_path):
    store = Path(shutil.copytree(collected.dir.store_path, tmp_path / "store"))
    (store / "spec.json").write_text("{")
    assert "spec.json" in one_sentence(sae("info", store), 1)


def test_ctrl_c_says_how_to_go_on(config, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.run.execute", interrupted)
    message = one_sentence(sae("run", config), 130)
    assert "stopped; the same command continues from the last finished piece of work" in message


def test_a_bug_keeps_its_traceback(config, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("pipelines.run.execute", broken)
    result = sae("run", config)
    assert isinstance(result.exception, ZeroDivisionError)


# -- finished runs -----------------------------------------------------------------------------------------------------


def test_finished_run_does_nothing(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.dir.path.rglob("*")}
    result = sae("run", finished.dir.path)
    assert result.exit_code == 0
    assert f"nothing to do: run is finished in {finished.dir.path}" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.dir.path.rglob("*")} == before
    for figure in ("0.500", "8.0", "0.900", "25.0%", "1,234"):
        assert figure in result.stdout
    assert "nothing to do: train is finished" in sae("train", finished.dir.path).stdout


def test_json_has_stdout_to_itself(finished):
    result = sae("run", finished.dir.path, "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["run"] == str(finished.dir.path)
    assert told["saes"]["main"]["fvu"] == 0.5
    assert "nothing to do" in result.stderr


# -- info and verify ---------------------------------------------------------------------------------------------------


def facts(path: Path) -> dict:
    result = sae("info", path, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_info_of_a_store(collected, store):
    told = facts(collected.dir.store_path)
    assert told["kind"] == "activation store"
    assert told["fingerprint"] == store.spec.fingerprint
    assert told["shards"] == f"{store.spec.n_shards} of {store.spec.n_shards}"
    assert told["sealed"] is True
    arrays = (path for path in (collected.dir.store_path / "data.zarr").rglob("c/**/*") if path.is_file())
    assert told["bytes"] == sum(path.stat().st_size for path in arrays)
    assert told["model.layers.1"].startswith("d_in 32, bfloat16, median norm ")
    assert "kind             activation store" in sae("info", collected.dir.store_path).stdout


def test_info_of_an_unfinished_store(collected, tmp_path):
    store = Path(shutil.copytree(collected.dir.store_path, tmp_path / "store"))
    (store / "seal.json").unlink()
    (store / "commits" / "000002.json").unlink()
    told = facts(store)
    assert told["sealed"] is False
    assert told["shards"].split(" of ")[0] == str(int(told["shards"].split(" of ")[1]) - 1)


def test_info_of_a_store_changes_nothing(collected, tmp_path):
    """What a killed worker left staged is for the next writer to install or remove."""
    store = Path(shutil.copytree(collected.dir.store_path, tmp_path / "store"))
    (store / "seal.json").unlink()
    commit = json.loads((store / "commits/000001.json").read_text())
    staged = store / "staging" / commit["attempt"]
    staged.mkdir()
    for file in commit["files"]:
        (store / file["key"]).rename(staged / file["staged"])
    (store / "staging/000001-of-a-loser").mkdir()
    (store / "staging/000001-of-a-loser/000").touch()
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    facts(store)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_info_of_a_dictionary(run):
    told = facts(run.dir.trained("main"))
    assert (told["kind"], told["architecture"], told["hook_name"]) == ("dictionary", "batchtopk", "model.layers.1")
    assert (told["d_in"], told["d_sae"], told["features"]) == (32, 96, 0)


def test_info_of_a_run(finished):
    finished.dir.forget("audit")
    told = facts(finished.dir.path)
    assert told["kind"] == "run"
    assert told["stages"] == dict.fromkeys(STAGES, "finished") | {"audit": "to do"}
    assert told["metrics"] == {f"main.{name}": value for name, value in METRICS.items()}


def test_info_of_anything_else_says_what_it_looks_for(tmp_path):
    message = one_sentence(sae("info", tmp_path / "nothing"), 2)
    assert "is not a store (spec.json or meta.json), a dictionary (cfg.json, or another tool's files)" in message
    assert "or a run directory (config.yaml)" in message


def test_info_of_a_damaged_dictionary(run):
    folder = run.dir.trained("main")
    (folder / "sae_weights.safetensors").write_bytes(b"")
    assert str(folder) in one_sentence(sae("info", folder), 2)


def test_verify_finds_nothing_in_a_good_store(collected):
    result = sae("verify", collected.dir.store_path)
    assert result.exit_code == 0
    assert "every file is as it was committed" in result.stdout
    assert json.loads(sae("verify", collected.dir.store_path, "--json").stdout) == []


def test_verify_names_the_file_with_a_flipped_byte(collected, tmp_path):
    store = Path(shutil.copytree(collected.dir.store_path, tmp_path / "store"))
    shard = max((path for path in store.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    name = str(shard.relative_to(store))
    result = sae("verify", store)
    assert result.exit_code == 1
    assert result.stdout.startswith(f"{name}: ")
    assert f"{store}: 1 problem" in result.stdout
    [problem] = json.loads(sae("verify", store, "--json").stdout)
    assert (problem["file"], problem["kind"]) == (name, "wrong digest")


def test_quick_verify_sees_sizes_but_does_not_read_the_data(collected, tmp_path):
    store = Path(shutil.copytree(collected.dir.store_path, tmp_path / "store"))
    shard = max((path for path in store.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert sae("verify", store, "--quick").stdout == f"{store}: every file is there, with its size\n"
    shard.write_bytes(data[:-1])
    result = sae("verify", store, "--quick", "--json")
    assert result.exit_code == 1
    assert [problem["kind"] for problem in json.loads(result.stdout)] == ["wrong size"]


def test_verify_of_no_store_is_bad_usage(tmp_path):
    for arguments in ([], ["--repair"]):
        message = one_sentence(sae("verify", tmp_path, *arguments), 2)
        assert "is not a store: it has neither spec.json (activations) nor meta.json (latents)" in message


# -- init --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["HuggingFaceTB/SmolLM2-135M", "/models/a 'b': \"c\"/", "package://p/m.gguf", "3b"])
@pytest.mark.parametrize("text", ["texts.jsonl", "a: b.txt", "package://p/t.json"])
def test_init_writes_a_config_that_loads(model, text):
    result = sae("init", "--model", model, "--hook", "model.layers.8:input", "--text", text)
    assert result.exit_code == 0, result.output
    assert "wrote sae.yaml; read it, then: sae run sae.yaml" in result.stdout
    config = load_config(Path("sae.yaml"))
    assert config.model.source == model
    assert config.hooks == ("model.layers.8:input",)
    assert config.text[0].path == text
    assert "#" in Path("sae.yaml").read_text(encoding="utf-8")


def test_init_takes_a_dataset_id():
    sae("init", "--model", "m", "--hook", "h", "--text", "Salesforce/wikitext", "--to", "other.yaml")
    config = load_config(Path("other.yaml"))
    assert (config.text[0].dataset, config.text[0].path) == ("Salesforce/wikitext", None)
    assert "sae run other.yaml" in Path("other.yaml").read_text(encoding="utf-8")


def test_init_never_overwrites():
    Path("sae.yaml").write_text("mine")
    message = one_sentence(sae("init", "--model", "m", "--hook", "h"), 1)
    assert "sae.yaml exists: choose another --to, or remove it" in message
    assert Path("sae.yaml").read_text() == "mine"
