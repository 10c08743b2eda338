"""What a training worker says of stores, checkpoints and settings that it cannot work with; nothing good is lost."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import SAESpec, SinkConfig, TrainConfig
from pipelines.train_worker import train_worker
from pipelines.training.job import MemberJob, TrainJob
from sae import Dictionary, latest_checkpoint, load_checkpoint
from storage import ActivationWriter, HookSpec, StoreSpec

HOOK, LENGTH, WIDTH = "model.layers.1", 16, 8
PROVENANCE = {"model_name": "tiny", "context_size": LENGTH, "text": [], "packing": {"prepend_bos": False}}


@pytest.fixture(autouse=True)
def _threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def write_store(path: Path, n_train: int = 64, bad_row: tuple[int, int] | None = None, value: float = np.nan) -> Path:
    """Random activations, every context one document; `bad_row` is (context, position)."""
    n_contexts = n_train + 16
    spec = StoreSpec(
        n_contexts=n_contexts,
        context_length=LENGTH,
        contexts_per_shard=16,
        n_train_contexts=n_train,
        hooks=(HookSpec(HOOK, WIDTH, "float32"),),
        tables=(),
        provenance={},
    )
    shape = (n_contexts, LENGTH)
    writer = ActivationWriter.create(
        path,
        spec,
        tokens=np.zeros(shape, np.int64),
        document=np.broadcast_to(np.arange(n_contexts)[:, None], shape).copy(),
        position=np.broadcast_to(np.arange(LENGTH), shape).copy(),
    )
    values = np.random.default_rng(0).normal(1.0, 1.0, (*shape, WIDTH)).astype(np.float32)
    if bad_row is not None:
        values[bad_row[0], bad_row[1], 3] = value
    for shard in writer.missing():
        start, stop = spec.shard_range(shard)
        writer.write_shard(shard, {HOOK: values[start:stop]})
    writer.seal()
    return path


def job(store: Path, out: Path, *, n_steps: int = 8, train_on_sinks: bool = False, **train: Any) -> TrainJob:
    settings = {"batch_size": 64, "streams": 4, "checkpoint_every": 2, "shuffle_contexts": 32, "max_same_context": 100}
    config = TrainConfig.model_validate(settings | {"n_tokens": n_steps * 64, **train})
    members = tuple(
        MemberJob(
            name=name,
            title=f"tiny/{name}",
            hooks=(HOOK,),
            spec=SAESpec(d_sae=16, k=2),
            seed=seed,
            checkpoints=str(out / name),
            output=str(out / name / "dictionary"),
            provenance=PROVENANCE,
        )
        for seed, name in enumerate(("main", "second"))
    )
    sinks = SinkConfig(train_on_them=train_on_sinks, multiple=100)
    return TrainJob(str(store), members, config, sinks, seed=0, n_threads=1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_count_as_sinks_and_are_left_out(value: float, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", bad_row=(20, 5), value=value)
    figures = train_worker(job(store, tmp_path))
    assert figures["main"]["step"] == 8
    assert torch.isfinite(Dictionary.load(tmp_path / "main/dictionary").W_dec).all()


def test_rows_that_are_not_finite_stop_every_sae_with_its_state_saved(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", n_train=640, bad_row=(600, 5))  # beyond what the scale is measured on
    with pytest.raises(
        ValueError,
        match=r"finite sum, got 1 of 64 rows with NaN or infinity at step (\d+)\. .*look for the shard.*"
        r"main: The last good checkpoint is .*main/step-(\d+)\. second: The last good checkpoint is .*step-\d+\.$",
    ) as raised:
        train_worker(job(store, tmp_path, n_steps=160, train_on_sinks=True))
    step = int(str(raised.value).partition("at step ")[2].partition(".")[0])
    assert step > 2
    for name in ("main", "second"):
        found = latest_checkpoint(tmp_path / name)
        assert found is not None
        state = load_checkpoint(found)
        assert state["step"] == step
        assert torch.isfinite(state["sae.W_enc"]).all()
        assert not (tmp_path / name / "dictionary").exists()


@pytest.mark.parametrize(("n_train", "selection"), [(0, {}), (64, {"document": [10**6]})], ids=["empty", "selected"])
def test_store_without_a_usable_token_is_refused(n_train: int, selection: Any, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", n_train=n_train)
    with pytest.raises(
        ValueError, match=rf"got none in the {n_train} training contexts of .*store at {HOOK}\. Collect"
    ):
        train_worker(replace(job(store, tmp_path), selection=selection))
    assert latest_checkpoint(tmp_path / "main") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 5e-4}, r"the same run settings\. trainer_config: saved .*'lr': None.*now .*'lr': 0\.0005"),
        ({"n_steps": 9}, r"n_steps: saved 8, now 9"),
        ({"normalize": "none"}, r"normaliser_scales: saved .*now \[1\.0\]"),
    ],
)
def test_resume_with_another_config_is_refused_and_changes_nothing(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store")
    train_worker(job(store, tmp_path / "run"))
    folders = sorted((tmp_path / "run").rglob("*"))
    before = {path: path.stat().st_mtime_ns for path in folders if path.is_file()}
    with pytest.raises(ValueError, match=message):
        train_worker(job(store, tmp_path / "run", **changes))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_loss_that_turns_nan_stops_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    wild = job(store, tmp_path, lr=1e25, warmup_fraction=0.0, checkpoint_every=1)
    with pytest.raises(
        ValueError, match=r"^main: The loss must be finite, got \w+ at step 1 .*step-00000001\. second: The loss must"
    ):
        train_worker(wild)
    assert load_checkpoint(tmp_path / "main/step-00000001")["step"] == 1
