import json
import warnings
from pathlib import Path

import pytest
import torch

from sae import BatchTopKConfig, Trainer, TrainerConfig, build, latest_checkpoint, load_checkpoint, save_checkpoint
from sae.checkpoint import checkpoints

STATE = {
    "step": 3,
    "reader": {"epoch": 1, "seeds": [1, 2]},
    "W": torch.arange(6.0).view(2, 3),
    "count": torch.tensor(7),
}


def test_checkpoint_round_trips_tensors_and_values(tmp_path: Path) -> None:
    loaded = load_checkpoint(save_checkpoint(tmp_path, 3, STATE))
    assert loaded.keys() == STATE.keys()
    assert torch.equal(loaded["W"], STATE["W"])
    assert loaded["count"].item() == 7
    assert loaded["reader"] == STATE["reader"]


def test_trainer_resumes_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    def fresh() -> Trainer:
        return Trainer(build(BatchTopKConfig(d_in=8, d_sae=32, k=2), seed=0), TrainerConfig(), 6)

    batches = [torch.randn(64, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    whole, first, second = fresh(), fresh(), fresh()
    whole.fit(batches)
    first.fit(batches, lambda metrics: metrics.step < 3)
    second.load_state_dict(
        load_checkpoint(save_checkpoint(tmp_path, 3, {**first.state_dict(), "reader": {"batch": 3}}))
    )
    second.fit(batches[3:])
    for ours, theirs in zip(whole.sae.parameters(), second.sae.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_checkpoint_keeps_the_two_newest(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save_checkpoint(tmp_path, step, STATE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00000020"]


def test_checkpoint_keeps_as_many_as_it_is_told(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save_checkpoint(tmp_path, step, STATE, keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000010", "step-00000015", "step-00000020"]


def test_checkpoint_of_a_step_can_be_saved_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, STATE)
    save_checkpoint(tmp_path, 5, {"x": 1})
    assert load_checkpoint(tmp_path / "step-00000005") == {"x": 1}


def test_latest_checkpoint_is_the_newest_or_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 5, STATE)
    newest = save_checkpoint(tmp_path, 10, STATE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest_checkpoint(tmp_path) == newest


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no json"])
def test_latest_checkpoint_falls_back_to_the_one_before_and_says_so(damage: str, tmp_path: Path) -> None:
    before = save_checkpoint(tmp_path, 5, STATE)
    newest = save_checkpoint(tmp_path, 10, STATE)
    tensors = newest / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif damage == "truncate":
        tensors.write_bytes(content[:-4])
    elif damage == "remove":
        tensors.unlink()
    else:
        (newest / "state.json").write_text("{")
    with pytest.warns(UserWarning, match=r"Skipping a damaged checkpoint.*step-00000010"):
        assert latest_checkpoint(tmp_path) == before


def test_abandoned_staging_is_not_a_checkpoint_and_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000099.abc.tmp").mkdir()
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 5, STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_load_checkpoint_names_the_file_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"state\.json is missing"):
        load_checkpoint(tmp_path)
    folder = save_checkpoint(tmp_path, 5, STATE)
    record = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(record | {"schema_version": 99}))
    with pytest.raises(ValueError, match=r"`schema_version` in .*state\.json must be 1"):
        load_checkpoint(folder)
