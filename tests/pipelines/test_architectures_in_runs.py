"""Every architecture from a config's entry to a dictionary that the later stages read, on the tiny model's store."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from pipelines.architectures import OF_ONE_HOOK, sae_config
from pipelines.config import _SETTINGS, EvaluateConfig, RunConfig, SAESpec
from pipelines.dictionaries import load_trained, stored_input
from pipelines.encode import Reader, encode_passages, passages_of, pool_documents
from pipelines.errors import UsageError
from pipelines.evaluation import evaluate_reconstruction, evaluate_splice
from pipelines.latents import compute_latents
from pipelines.models import LanguageModel
from pipelines.progress import SilentReporter
from pipelines.run import Run
from pipelines.rundir import RunDir
from pipelines.train import check_settings, make_job
from pipelines.train_worker import train_worker
from sae import CrosscoderConfig, TranscoderConfig
from storage import ActivationStore, ShuffledReader

FIRST, SECOND = "model.layers.1", "model.layers.0:input"

SPECS: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard", "l1_coefficient": 0.5},
    "gated": {"architecture": "gated", "l1_coefficient": 0.5},
    "topk": {"architecture": "topk", "k": 4},
    "jumprelu": {"architecture": "jumprelu"},
    "jumprelu_tanh": {"architecture": "jumprelu", "penalty": "tanh", "sparsity_coefficient": 1e-3},
    "matryoshka": {"architecture": "matryoshka_batchtopk", "k": 4, "prefix_sizes": [8, 64]},
    "matryoshka_sampled": {"architecture": "matryoshka_batchtopk", "k": 4, "n_sampled_prefixes": 3},
    "transcoder": {"architecture": "transcoder", "k": 4, "hook": SECOND, "target_hook": FIRST, "skip": True},
    "crosscoder": {"architecture": "crosscoder", "k": 4},
    "crosscoder_l1": {"architecture": "crosscoder", "sparsity": "l1", "hooks": [SECOND, FIRST]},
}


def configured(collected: Run, spec: dict[str, Any]) -> RunConfig:
    """The shared store's run with one other SAE, trained for six steps."""
    raw = collected.config.model_dump(mode="json")
    raw["saes"] = {"main": {"d_sae": 64, **spec}}
    raw["train"] |= {"n_tokens": 6 * 256, "normalize": "centre_scale"}
    raw["collect"]["store"] = str(collected.dir.store_path)
    return RunConfig.model_validate(raw)


@pytest.mark.parametrize("name", SPECS)
def test_entry_trains_to_a_dictionary_that_the_later_stages_read(
    name: str, collected: Run, store: ActivationStore, lm: LanguageModel, tmp_path: Any
) -> None:
    config, run = configured(collected, SPECS[name]), RunDir(tmp_path / "run")
    threads = torch.get_num_threads()
    figures = train_worker(make_job(config, run, "main", store))
    torch.set_num_threads(threads)
    assert figures["main"]["step"] == 6
    dictionary = load_trained(run, "main")
    assert dictionary.config.architecture == SPECS[name]["architecture"]
    assert dictionary.hook_names == config.hooks_of("main")

    bar = SilentReporter().stage("test", total=1, unit="tokens").__enter__()
    found = evaluate_reconstruction(store, dictionary, sink_multiple=3.0, bar=bar)
    assert 0 < found["l0"] <= 64
    assert 0 < found["fvu"] < 1.5
    spliced = evaluate_splice(lm, store, dictionary, EvaluateConfig(n_ce_tokens=128), sink_multiple=3.0, bar=bar)
    assert ("ce_spliced" in spliced) == (not name.startswith("crosscoder"))
    assert all(math.isfinite(value) for key, value in spliced.items() if key.startswith("ce_") and value is not None)

    latents = compute_latents(store, dictionary, run, "main", SilentReporter(), sink_multiple=3.0, digest="0")
    dense = dictionary.encode(stored_input(store, dictionary, 0, store.spec.n_contexts).flatten(0, 1).float())
    keep = ~torch.from_numpy(store.sink_mask(dictionary.hook_names[0], 0, store.spec.n_contexts, 3.0)).flatten()
    assert torch.equal(torch.from_numpy(latents.counts()).long(), dense[keep].count_nonzero(dim=0))
    rows, pooled = pool_documents(store, Reader(dictionary), split="heldout", sink_multiple=3.0)
    assert pooled.max_latents.shape == (len(rows), 64)
    passages = passages_of(lm, ["the heron waits", "a river runs"], max_tokens=16)
    (alone,) = encode_passages(lm, [Reader(dictionary)], passages)
    assert alone.max_latents.shape == (2, 64)
    assert alone.mean_activations.shape == (2, dictionary.d_in)
    assert alone.mean_reconstruction.shape == (2, dictionary.sae.d_out)


def test_training_that_diverges_names_the_step_and_the_last_good_checkpoint(
    collected: Run, store: ActivationStore, tmp_path: Any
) -> None:
    raw = configured(collected, {"architecture": "standard"}).model_dump(mode="json")
    raw["train"] |= {"lr": 1e25, "checkpoint_every": 1, "warmup_fraction": 0.0}
    config, run = RunConfig.model_validate(raw), RunDir(tmp_path / "run")
    threads = torch.get_num_threads()
    try:
        with pytest.raises(
            ValueError, match=r"loss must be finite, got \w+ at step 1 .*last good checkpoint is .*step-00000001\."
        ):
            train_worker(make_job(config, run, "main", store))
    finally:
        torch.set_num_threads(threads)
    assert not run.trained("main").exists()


def test_readers_of_two_hooks_give_the_same_rows(store: ActivationStore) -> None:
    def reader(hook: str) -> ShuffledReader:
        return ShuffledReader(store, hook, batch_size=256, seed=0, n_streams=16, sink_hook=FIRST, epochs=1)

    where = {}
    n_contexts = store.spec.n_contexts
    for x, y in zip(
        store.activations(FIRST, 0, n_contexts).flatten(0, 1),
        store.activations(SECOND, 0, n_contexts).flatten(0, 1),
        strict=True,
    ):
        where[tuple(x.float().tolist())] = y.float()
    n_batches = 0
    for first, second in zip(reader(FIRST), reader(SECOND), strict=True):
        assert all(torch.equal(where[tuple(x.tolist())], y) for x, y in zip(first.float(), second.float(), strict=True))
        n_batches += 1
    assert n_batches > 5


def test_settings_of_entries_are_fields_of_the_architectures_configurations() -> None:
    classes = OF_ONE_HOOK | {"transcoder": TranscoderConfig, "crosscoder": CrosscoderConfig}
    assert classes.keys() == _SETTINGS.keys()
    for architecture, names in _SETTINGS.items():
        fields = {field.name for field in dataclasses.fields(classes[architecture])}
        assert names - {"target_hook", "hooks"} <= fields
        config = sae_config(
            SAESpec.model_validate({"architecture": architecture, "target_hook": SECOND})
            if architecture == "transcoder"
            else SAESpec(architecture=architecture),  # type: ignore[arg-type]
            [16, 16],
        )
        assert config.architecture == architecture
        assert ("k" in fields) == (getattr(config, "k", None) == 32)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"architecture": "standard", "k": 4}, "k cannot be set for standard, which has l1_coefficient"),
        ({"architecture": "transcoder"}, "a transcoder needs `target_hook`"),
        ({"architecture": "transcoder", "target_hook": "model.layers.9"}, "names 'model.layers.9', which is not in"),
        ({"architecture": "crosscoder", "hooks": [FIRST]}, "a crosscoder, which needs at least two different hooks"),
        ({"architecture": "crosscoder", "hook": FIRST}, "a crosscoder reads `hooks`, not one `hook`"),
    ],
)
def test_entry_with_settings_that_do_not_fit_is_refused(collected: Run, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(collected, spec)


def test_prefixes_that_miss_the_width_are_refused_before_collecting(collected: Run) -> None:
    config = configured(collected, {"architecture": "matryoshka_batchtopk", "k": 4, "prefix_sizes": [8, 63]})
    with pytest.raises(UsageError, match=r"saes\.main: MatryoshkaBatchTopKConfig\.prefix_sizes must rise .*d_sae=64"):
        check_settings(config, {FIRST: 16, SECOND: 16})
