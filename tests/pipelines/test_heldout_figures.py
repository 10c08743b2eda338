"""Held-out figures while training: what `evaluate` finds of the same weights, on schedule, without a trace in them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import EvaluateConfig, RunConfig, SinkConfig
from pipelines.dictionaries import load_trained
from pipelines.evaluation import evaluate_reconstruction, evaluate_splice
from pipelines.models import LanguageModel, resolve_model
from pipelines.progress import SilentReporter
from pipelines.run import Run, stage_sections
from pipelines.rundir import RunDir
from pipelines.train import EVALUATE_EVERY, make_job
from pipelines.train_worker import train_worker
from pipelines.training.calibration import starting_sample
from pipelines.training.heldout import SPLICED_FIGURES, Heldout
from sae import (
    BatchTopKConfig,
    CrosscoderConfig,
    Dictionary,
    SAEConfig,
    SparseLatents,
    StandardConfig,
    TopKConfig,
    Trainer,
    TrainerConfig,
    TranscoderConfig,
    build,
    fit_normaliser,
)
from storage import ActivationStore

FIRST, SECOND = "model.layers.1", "model.layers.0:input"


@pytest.mark.parametrize(
    ("config", "hooks"),
    [
        (BatchTopKConfig(d_in=32, d_sae=64, k=4), (FIRST,)),
        (StandardConfig(d_in=32, d_sae=48, l1_coefficient=0.1), (SECOND,)),
        (TranscoderConfig(d_in=32, d_out=32, d_sae=64, k=4, skip=True), (SECOND, FIRST)),
        (CrosscoderConfig(d_ins=(32, 32), d_sae=64, k=4), (FIRST, SECOND)),
    ],
    ids=lambda value: getattr(value, "architecture", ""),
)
def test_figures_are_those_of_the_exported_dictionary(
    config: SAEConfig, hooks: tuple[str, ...], store: ActivationStore
) -> None:
    sample = starting_sample(store, hooks, SinkConfig(), {})
    trainer = Trainer(
        build(config, seed=0),
        TrainerConfig(),
        20,
        normalisers=[fit_normaliser(part, "centre_scale") for part in sample],
    )
    trainer.fit([[part[i::20] for part in sample] for i in range(20)])
    found = Heldout(store, hooks, SinkConfig(), {}, n_tokens=10**6).figures(trainer.whole(), trainer.normalisers)
    with SilentReporter().stage("test", total=1, unit="tokens") as bar:
        dictionary = Dictionary(trainer.export(), hook_names=hooks)
        expected = evaluate_reconstruction(store, dictionary, sink_multiple=3.0, bar=bar)
    assert found["heldout_n_tokens"] == expected["n_heldout_tokens"] > 1000
    assert found["heldout_fvu"] == pytest.approx(expected["fvu"], rel=1e-4)
    assert found["heldout_l0"] == pytest.approx(expected["l0"], rel=1e-3)
    assert found["heldout_dead_share"] == pytest.approx(expected["dead_share"], abs=1 / 64)
    few = Heldout(store, hooks, SinkConfig(), {}, n_tokens=100).figures(trainer.whole(), trainer.normalisers)
    assert few["heldout_n_tokens"] == 100


def test_sparse_decoding_is_the_dense_one() -> None:
    sae = build(TopKConfig(d_in=16, d_sae=64, k=4), seed=0)
    x = torch.randn(33, 16, generator=torch.Generator().manual_seed(0))
    x[7] = -1e6 * sae.W_enc.detach().sum(dim=1)  # a token without an active latent, or with few
    torch.testing.assert_close(
        sae.decode_sparse(sae.encode_sparse(x), 33), sae.decode(sae.encode(x)), rtol=1e-5, atol=1e-2
    )
    nothing = SparseLatents(*(torch.zeros(0, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.float32)))
    assert torch.equal(sae.decode_sparse(nothing, 3), sae.b_dec.expand(3, -1))


def trained(collected: Run, store: ActivationStore, out: Path, **train: Any) -> tuple[list[dict[str, Any]], RunDir]:
    raw = collected.config.model_dump(mode="json")
    raw["saes"] = {"main": {"architecture": "topk", "d_sae": 64, "k": 4}}
    raw["train"] |= {"n_tokens": 7 * 256, **train}
    raw["collect"]["store"] = str(collected.dir.store_path)
    run, threads = RunDir(out), torch.get_num_threads()
    try:
        train_worker(make_job(RunConfig.model_validate(raw), run, "main", store))
    finally:
        torch.set_num_threads(threads)
    lines = (run.checkpoints("main") / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], run


def test_figures_are_written_on_schedule_and_at_the_end_and_change_no_weight(
    collected: Run, store: ActivationStore, tmp_path: Path
) -> None:
    lines, run = trained(collected, store, tmp_path / "often", evaluate_every=3)
    assert [line["step"] for line in lines if "heldout_fvu" in line] == [3, 6, 7]
    assert lines[-1]["heldout_fvu"] < lines[2]["heldout_fvu"]
    assert lines[-1]["heldout_l0"] == 4
    never, other = trained(collected, store, tmp_path / "never", evaluate_every=0)
    assert not any("heldout_fvu" in line for line in never)
    ours, theirs = ((r.trained("main") / "sae_weights.safetensors").read_bytes() for r in (run, other))
    assert ours == theirs


def test_ce_and_kl_scores_are_those_that_evaluate_finds(collected: Run, store: ActivationStore, tmp_path: Path) -> None:
    lines, run = trained(collected, store, tmp_path / "run", evaluate_every=4, evaluate_ce_tokens=128)
    assert [line["step"] for line in lines if "heldout_ce_loss_score" in line] == [4, 7]
    model = collected.config.model
    with SilentReporter().stage("test", total=1, unit="tokens") as bar:
        expected = evaluate_splice(
            LanguageModel(resolve_model(model), model),
            store,
            load_trained(run, "main"),
            EvaluateConfig(n_ce_tokens=128),
            sink_multiple=3.0,
            bar=bar,
        )
    assert expected["ce_spliced"] != expected["ce_clean"]
    for name in SPLICED_FIGURES:  # None where the tiny model does not mind zeros
        told = lines[-1][f"heldout_{name}"]
        assert told == (None if expected[name] is None else pytest.approx(expected[name], rel=1e-3)), name


def test_schedule_belongs_to_no_result_and_has_a_default(collected: Run, store: ActivationStore) -> None:
    assert collected.config.train is not None
    changed = collected.config.train.model_copy(update={"evaluate_every": 7, "evaluate_ce_tokens": 64})
    config = collected.config.model_copy(update={"train": changed})
    assert stage_sections(config)["train"] == stage_sections(collected.config)["train"]
    assert make_job(collected.config, collected.dir, "main", store).evaluate_every == EVALUATE_EVERY
    job = make_job(config, collected.dir, "main", store)
    assert (job.evaluate_every, job.model) == (7, config.model)
