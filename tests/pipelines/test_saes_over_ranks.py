"""`train.layout: saes`: each of two ranks trains some of the SAEs, which come out as from one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import RunConfig
from pipelines.run import Run
from pipelines.rundir import RunDir
from pipelines.train import make_job
from pipelines.train_worker import train_worker
from pipelines.training.interruption import Interrupted
from pipelines.training.job import TrainJob
from storage import ActivationStore
from tests.sae.ranks import run_ranks

pytestmark = pytest.mark.slow
HOOKS = ("model.layers.1", "model.layers.0:input")
SAES: dict[str, dict[str, Any]] = {
    "first": {"d_sae": 64, "k": 4},
    "wild": {"architecture": "jumprelu", "d_sae": 64, "sparsity_coefficient": 3e38},
    "other_hook": {"architecture": "topk", "d_sae": 64, "k": 4, "hook": HOOKS[1]},
}


def a_rank(rank: int, job: TrainJob, stop_at: int) -> dict[str, Any]:
    """One rank of the job; told to stop, on rank 1 alone, after `stop_at` steps."""
    asked = 0

    def interrupted() -> bool:
        nonlocal asked
        asked += 1
        return rank == 1 and asked == stop_at

    try:
        return {"figures": train_worker(job, rank=rank, world_size=2, interrupted=interrupted)}
    except (ValueError, Interrupted) as error:
        return {"error": str(error)}


def trained(run: RunDir, name: str) -> tuple[bytes, list[dict[str, Any]]]:
    lines = (run.checkpoints(name) / "metrics.jsonl").read_text().splitlines()
    steps = [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]
    return (run.trained(name) / "sae_weights.safetensors").read_bytes(), steps


def test_two_ranks_train_each_their_saes_and_stop_together(
    collected: Run, store: ActivationStore, tmp_path: Path
) -> None:
    raw = collected.config.model_dump(mode="json")
    raw["saes"] = SAES
    raw["train"] |= {"n_tokens": 8 * 256, "checkpoint_every": 3, "evaluate_every": 4}
    raw["train"] |= {"layout": "saes", "num_workers": 2}
    raw["collect"]["store"] = str(collected.dir.store_path)
    config = RunConfig.model_validate(raw)
    together, apart = RunDir(tmp_path / "together"), RunDir(tmp_path / "apart")
    threads = torch.get_num_threads()
    job = make_job(config, apart, list(SAES), store)
    with pytest.raises(ValueError, match=r"^wild: The loss must be finite"):
        train_worker(make_job(config, together, list(SAES), store))
    torch.set_num_threads(threads)
    for folder in ("stopped", "again"):
        (tmp_path / folder).mkdir()
    stopped = "stopped after step 4 of 8, which is saved"
    assert run_ranks(a_rank, 2, tmp_path / "stopped", job, 4) == [{"error": stopped}] * 2
    assert (apart.checkpoints("other_hook") / "step-00000004").is_dir()
    zero, one = run_ranks(a_rank, 2, tmp_path / "again", job, 0)
    assert sorted(zero["figures"]) == ["first", "other_hook"]
    assert one["error"].startswith("wild: The loss must be finite")
    for name in ("first", "other_hook"):
        assert trained(apart, name) == trained(together, name)
    assert not apart.trained("wild").exists()
