"""`sae export --checkpoint`: any checkpoint as a dictionary folder like the finished one."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from command_line import must, sae_here, sentence

from pipelines.run import Run, save_config
from sae import Dictionary, load_checkpoint
from sae.checkpoint import checkpoints, exported_sae
from storage import ActivationStore


@pytest.fixture
def here(run: Run) -> Run:
    """The trained run with its config, so that commands find it."""
    save_config(run)
    return run


def steps(run: Run) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in checkpoints(run.dir.checkpoints("main"))]


def test_last_checkpoint_exports_as_the_trained_dictionary(here: Run) -> None:
    before, last = steps(here)
    told = json.loads(must(sae_here("export", here.dir.path, "--checkpoint", last, "--json")))
    folder = here.dir.path / f"dictionaries/main@{last}"
    assert told == {"dictionary": str(folder)}
    ours, theirs = ((f / "sae_weights.safetensors").read_bytes() for f in (folder, here.dir.trained("main")))
    assert ours == theirs
    provenance = Dictionary.load(folder).provenance
    assert (provenance["step"], provenance["hook_name"]) == (last, "model.layers.1")
    assert before < last


def test_earlier_checkpoint_is_folded_and_its_threshold_calibrated(
    here: Run, store: ActivationStore, tmp_path: Path
) -> None:
    step, _ = steps(here)
    must(sae_here("export", here.dir.path, "--checkpoint", step, "--to", tmp_path / "early"))
    early, final = Dictionary.load(tmp_path / "early"), Dictionary.load(here.dir.trained("main"))
    assert not torch.equal(early.sae.W_enc, final.sae.W_enc)
    start, stop = store.split_range("train")
    keep = ~torch.from_numpy(store.sink_mask("model.layers.1", start, stop, 3.0))
    x = store.activations("model.layers.1", start, stop).float()[keep]
    assert float(early.encode(x).count_nonzero()) / len(x) == pytest.approx(8, rel=0.01)
    folded = exported_sae(load_checkpoint(here.dir.checkpoints("main") / f"step-{step:08d}"))
    assert torch.equal(folded.W_enc, early.sae.W_enc)


def test_what_cannot_be_exported_is_told_in_one_sentence(here: Run, tmp_path: Path) -> None:
    first, last = steps(here)
    told = sentence(sae_here("export", here.dir.path, "--checkpoint", 7), 2)
    assert re.search(rf"has no checkpoint of step 7: choose from {first}, {last}", told)
    told = sentence(sae_here("export", here.dir.path, "--checkpoint", last, "--sae", "mian"), 2)
    assert "the run has no SAE 'mian': choose from main" in told
    told = sentence(sae_here("export", here.dir.path, "--checkpoint", last, "--to", tmp_path), 2)
    assert "exists: choose another --to" in told
    told = sentence(sae_here("export", here.dir.path, "--to", tmp_path), 2)
    assert "--sae and --to go with --checkpoint" in told
    damaged = here.dir.checkpoints("main") / f"step-{last:08d}"
    (damaged / "tensors.safetensors").write_bytes(b"")
    told = sentence(sae_here("export", here.dir.path, "--checkpoint", last), 2)
    assert "sha256 differs" in told
    shutil.rmtree(damaged)
