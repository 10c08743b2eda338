"""`train.init_from`: the same function as the dictionary, in the run's units; anything that does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.run import Run
from pipelines.rundir import RunDir
from pipelines.train import check_settings, make_job
from pipelines.train_worker import train_worker
from pipelines.training.warm_start import start_from
from sae import (
    SAE,
    BatchTopKConfig,
    CrosscoderConfig,
    Dictionary,
    GatedConfig,
    JumpReLUConfig,
    Normaliser,
    SAEConfig,
    StandardConfig,
    TopKConfig,
    TranscoderConfig,
    build,
)
from storage import ActivationStore

HOOKS = {"model.layers.1": 32, "model.layers.0:input": 32}
CONFIGS: list[SAEConfig] = [
    BatchTopKConfig(d_in=16, d_sae=48, k=4),
    JumpReLUConfig(d_in=16, d_sae=48),
    GatedConfig(d_in=16, d_sae=48),
    StandardConfig(d_in=16, d_sae=48),
    TranscoderConfig(d_in=16, d_out=12, d_sae=48, k=4, skip=True),
    CrosscoderConfig(d_ins=(16, 12), d_sae=48, sparsity="l1"),
]


def random_sae(config: SAEConfig, seed: int) -> SAE:
    sae, generator = build(config, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            if name != "W_dec":
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2)
    return sae


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.architecture)
def test_sae_computes_in_normalised_units_what_the_dictionary_does_in_raw_ones(config: SAEConfig) -> None:
    source, sae = random_sae(config, 1), build(config, seed=0)
    generator = torch.Generator().manual_seed(2)
    normalisers = [
        Normaliser(torch.randn(width, generator=generator), torch.tensor(0.3 + i))
        for i, width in enumerate(sae.batch_widths)
    ]
    start_from(sae, Dictionary(source), normalisers)
    raw = [torch.randn(64, width, generator=generator) * 3 for width in sae.batch_widths]
    x, _ = sae.input_and_target([n.apply(part) for n, part in zip(normalisers, raw, strict=True)])
    x_hat, latents = sae(x)
    expected, their_latents = source(source.input_and_target(raw)[0])
    of_target = sae.input_and_target([n.scale.expand(len(n.shift))[None] for n in normalisers])[1]
    shift = sae.input_and_target([n.shift[None] for n in normalisers])[1]
    torch.testing.assert_close(x_hat / of_target + shift, expected, rtol=1e-3, atol=1e-3)
    assert 0 < int((latents > 0).sum()) < latents.numel()
    assert torch.equal(latents > 0, their_latents > 0)


def test_dictionary_that_does_not_fit_is_refused() -> None:
    sae, identity = build(TopKConfig(d_in=16, d_sae=48, k=4), seed=0), [Normaliser.none(16)]
    with pytest.raises(ValueError, match="must be of the architecture topk, got batchtopk"):
        start_from(sae, Dictionary(random_sae(CONFIGS[0], 0)), identity)
    wider = Dictionary(build(TopKConfig(d_in=16, d_sae=64, k=4), seed=0))
    with pytest.raises(ValueError, match=r"W_dec \(48, 16\) here, \(64, 16\) there, W_enc .*\): set d_sae"):
        start_from(sae, wider, identity)
    long = build(TopKConfig(d_in=16, d_sae=48, k=4), seed=0)
    with torch.no_grad():
        long.W_dec[3] *= 2
    with pytest.raises(ValueError, match=r"norm 1 within 0\.01, one misses it by 1:"):
        start_from(sae, Dictionary(long), identity)
    other_k = build(TopKConfig(d_in=16, d_sae=48, k=8), seed=1)
    start_from(sae, Dictionary(other_k), identity)
    assert torch.equal(sae.W_enc, other_k.W_enc)


def configured(trained: Run, init_from: Any, **sae: Any) -> RunConfig:
    raw = trained.config.model_dump(mode="json")
    raw["saes"]["main"] |= sae
    raw["train"] |= {"n_tokens": 4 * 256, "warmup_fraction": 0.5, "init_from": init_from}
    return RunConfig.model_validate(raw)


def first_fvu(config: RunConfig, store: ActivationStore, run: RunDir) -> float:
    threads = torch.get_num_threads()
    try:
        train_worker(make_job(config, run, "main", store))
    finally:
        torch.set_num_threads(threads)
    return float(json.loads((run.checkpoints("main") / "metrics.jsonl").read_text().splitlines()[0])["batch_fvu"])


def test_training_goes_on_from_the_dictionary_and_says_so(
    trained: Run, store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.dir.path)
    source = str(trained.dir.trained("main").relative_to(trained.dir.path))
    run = RunDir(tmp_path / "warm")
    config = configured(trained, source)
    check_settings(config, HOOKS)
    job = make_job(config, run, "main", store)
    monkeypatch.chdir(tmp_path)  # a worker may run elsewhere
    assert job.members[0].init_from == str(trained.dir.trained("main"))
    monkeypatch.chdir(trained.dir.path)
    warm = first_fvu(config, store, run)
    cold = first_fvu(configured(trained, None), store, RunDir(tmp_path / "cold"))
    assert warm < 0.6 * cold
    told = Dictionary.load(run.trained("main")).provenance["init_from"]
    assert (told["path"], told["hook_names"]) == (source, ["model.layers.1"])
    assert len(told["sha256_of_tensors"]) == 64


@pytest.mark.parametrize(
    ("source", "sae", "message"),
    [
        ("/nowhere", {}, r"train\.init_from for saes\.main \(/nowhere\): A dictionary is a folder"),
        ({"mian": "/nowhere"}, {}, r"train\.init_from names 'mian', which is not under `saes:`"),
        ("TRAINED", {"d_sae": 64}, r"must have the shapes of the SAE .*W_dec \(64, 32\) here, \(96, 32\) there"),
        ({"main": "TRAINED"}, {"architecture": "topk"}, "must be of the architecture topk, got batchtopk"),
    ],
)
def test_start_that_cannot_be_is_refused_before_anything_is_collected(
    source: Any, sae: dict[str, Any], message: str, trained: Run
) -> None:
    folder = str(trained.dir.trained("main"))
    given = json.loads(json.dumps(source).replace("TRAINED", folder))
    with pytest.raises(UsageError, match=message):
        check_settings(configured(trained, given, **sae), HOOKS)
