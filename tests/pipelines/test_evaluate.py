from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dictionaries import perfect_dictionary, random_dictionary, zero_dictionary

from pipelines.config import EvaluateConfig, ModelConfig
from pipelines.dictionaries import load_trained
from pipelines.evaluate import evaluate
from pipelines.evaluation import evaluate_reconstruction, evaluate_splice, recovered
from pipelines.models import LanguageModel
from pipelines.progress import SilentReporter

HOOK = "model.layers.1"
MULTIPLE = 1.2
BAR = SimpleNamespace(advance=lambda n: None, note=lambda text: None)


@pytest.fixture(scope="module")
def bf16(resolved):
    """The model as the store's activations were made."""
    return LanguageModel(resolved, ModelConfig(source=resolved.source, device="cpu"))


def splice(lm, store, dictionary, n=512, batch_contexts=4, multiple=MULTIPLE):
    config = EvaluateConfig(n_ce_tokens=n, batch_contexts=batch_contexts)
    return evaluate_splice(lm, store, dictionary, config, sink_multiple=multiple, bar=BAR)


# -- reconstruction ----------------------------------------------------------------------------------------------------


def test_perfect_dictionary_leaves_nothing_unexplained(store):
    figures = evaluate_reconstruction(store, perfect_dictionary(HOOK), sink_multiple=MULTIPLE, bar=BAR)
    assert figures["fvu"] == figures["fvu_all"] == 0
    assert figures["l0"] == pytest.approx(32, rel=0.01)  # a coordinate that is zero has no latent
    assert figures["n_latents"] == 64


def test_reconstruction_figures_by_hand(store):
    dictionary = random_dictionary(HOOK)
    figures = evaluate_reconstruction(store, dictionary, sink_multiple=MULTIPLE, bar=BAR)
    start, stop = store.spec.split_range("heldout")
    x = store.activations(HOOK, start, stop).flatten(0, 1).double()
    sinks = torch.from_numpy(
        (store.position[start:stop] == 0)
        | (store.norms(HOOK, start, stop) >= store.statistics(HOOK).sink_threshold(MULTIPLE))
    ).flatten()
    latents = dictionary.encode(x.float())
    error = (x - dictionary.decode(latents).double()).square().sum(1)
    for suffix, keep in (("", ~sinks), ("_all", torch.ones_like(sinks))):
        variance = (x[keep] - x[keep].mean(0)).square().sum()
        assert figures[f"fvu{suffix}"] == pytest.approx(float(error[keep].sum() / variance), rel=1e-6)
        assert figures[f"l0{suffix}"] == pytest.approx(float((latents[keep] > 0).sum(1).double().mean()))
        assert figures[f"n_heldout_tokens{suffix}"] == int(keep.sum())
    fires = (latents[~sinks] > 0).any(0)
    assert figures["dead_share"] == pytest.approx(float((~fires).double().mean()))
    assert sum(figures["activation_frequency_counts"]) == int(fires.sum())
    assert len(figures["activation_frequency_log10_edges"]) == len(figures["activation_frequency_counts"]) + 1
    assert 0 < sinks.sum() < len(sinks)


# -- splice ------------------------------------------------------------------------------------------------------------


def test_perfect_dictionary_recovers_the_whole_loss(bf16, store):
    figures = splice(bf16, store, perfect_dictionary(HOOK))
    for suffix in ("", "_all"):
        assert figures[f"kl_div_score{suffix}"] == pytest.approx(1)
        assert figures[f"kl_spliced{suffix}"] == pytest.approx(0, abs=1e-9)
        assert figures[f"ce_spliced{suffix}"] == figures[f"ce_clean{suffix}"]


def test_score_is_the_recovered_share_and_none_where_zero_ablation_does_no_harm():
    assert recovered(2.0, 2.0, 10.0) == 1
    assert recovered(2.0, 10.0, 10.0) == 0
    assert recovered(2.0, 4.0, 10.0) == 0.75
    assert recovered(2.0, 2.5, 2.0) is None
    assert recovered(2.0, 2.5, 1.5) is None


def test_dictionary_that_outputs_zero_recovers_nothing(bf16, store):
    figures = splice(bf16, store, zero_dictionary(HOOK))
    for suffix in ("", "_all"):
        assert figures[f"kl_div_score{suffix}"] == pytest.approx(0)
        assert figures[f"ce_spliced{suffix}"] == figures[f"ce_zero{suffix}"]


def logits_by_hand(lm, tokens, position, change):
    """Logits of one context whose layer-1 output goes through `change`, by PyTorch's own hook."""
    handle = lm.model.model.layers[1].register_forward_hook(lambda module, args, output: change(output))
    try:
        with torch.inference_mode():
            return lm.model(input_ids=tokens[None], position_ids=position[None], use_cache=False).logits[0].double()
    finally:
        handle.remove()


def test_splice_figures_by_hand(lm, store):
    """Every sum of two contexts, prediction by prediction."""
    dictionary = random_dictionary(HOOK)
    n_contexts = 2
    figures = splice(lm, store, dictionary, n=n_contexts * store.spec.context_length)
    start, _ = store.spec.split_range("heldout")
    sums: dict[str, list[float]] = {}
    for context in range(start, start + n_contexts):
        found = store.contexts(context, context + 1)
        tokens, position = (torch.from_numpy(a[0]).long() for a in (found.tokens, found.position))
        sinks = torch.from_numpy(store.sink_mask(HOOK, context, context + 1, MULTIPLE)[0])[:, None]

        def splice_all(x):
            return dictionary.decode(dictionary.encode(x))

        changes = {
            "clean": lambda x: x,
            "spliced": lambda x, s=sinks: torch.where(s, x, splice_all(x)),
            "zero": lambda x, s=sinks: torch.where(s, x, 0.0),
            "spliced_all": splice_all,
            "zero_all": torch.zeros_like,
        }
        log_p = {name: logits_by_hand(lm, tokens, position, f).log_softmax(-1) for name, f in changes.items()}
        log_p["clean_all"] = log_p["clean"]
        for t in range(len(tokens) - 1):
            if position[t + 1] == 0:
                continue  # the next token begins another document
            for name, log_q in log_p.items():
                if not name.endswith("_all") and sinks[t]:
                    continue
                sums.setdefault(f"ce_{name}", []).append(-float(log_q[t, tokens[t + 1]]))
                kl = (log_p["clean"][t].exp() * (log_p["clean"][t] - log_q[t])).sum()
                sums.setdefault(f"kl_{name}", []).append(float(kl))
    mean = {name: float(np.mean(values)) for name, values in sums.items()}
    for suffix in ("", "_all"):
        assert figures[f"n_predictions{suffix}"] == len(sums[f"ce_clean{suffix}"])
        for name in ("clean", "spliced", "zero"):
            assert figures[f"ce_{name}{suffix}"] == pytest.approx(mean[f"ce_{name}{suffix}"], rel=1e-4)
        for name in ("spliced", "zero"):
            assert figures[f"kl_{name}{suffix}"] == pytest.approx(mean[f"kl_{name}{suffix}"], rel=1e-3)
        ce = [figures[f"ce_{name}{suffix}"] for name in ("clean", "spliced", "zero")]
        assert figures[f"ce_loss_score{suffix}"] == recovered(*ce)
        assert figures[f"kl_div_score{suffix}"] == pytest.approx(
            1 - mean[f"kl_spliced{suffix}"] / mean[f"kl_zero{suffix}"], rel=1e-3
        )
    assert figures["n_predictions"] < figures["n_predictions_all"]
    assert figures["n_ce_tokens"] == n_contexts * store.spec.context_length


def test_predictions_across_documents_never_count(bf16, store):
    figures = splice(bf16, store, zero_dictionary(HOOK))
    start, _ = store.spec.split_range("heldout")
    position = store.position[start : start + 512 // store.spec.context_length]
    within = int((position[:, 1:] > 0).sum())
    assert figures["n_predictions_all"] == within < position.size - len(position)


def test_splice_does_not_depend_on_the_batch(lm, store):
    one, many = (splice(lm, store, random_dictionary(HOOK), batch_contexts=n) for n in (1, 7))
    assert one.keys() == many.keys()
    for key in one:
        expected = None if many[key] is None else pytest.approx(many[key], rel=1e-3, abs=1e-6)
        assert one[key] == expected, key


def test_splice_uses_no_more_contexts_than_there_are(bf16, store):
    start, stop = store.spec.split_range("heldout")
    figures = splice(bf16, store, zero_dictionary(HOOK), n=10**9, batch_contexts=32)
    assert figures["n_ce_tokens"] == (stop - start) * store.spec.context_length
    assert splice(bf16, store, zero_dictionary(HOOK), n=1)["n_ce_tokens"] == store.spec.context_length


def test_splice_reads_input_hooks_too(bf16, store):
    figures = splice(bf16, store, perfect_dictionary("model.layers.0:input"), n=128)
    assert figures["ce_spliced_all"] == figures["ce_clean_all"]


# -- the stage ---------------------------------------------------------------------------------------------------------


def test_stage_writes_the_figures_of_every_sae(run, store):
    figures = evaluate(run.config, run.dir, SilentReporter())
    assert list(figures) == ["main"]
    assert {f"main.{key}": value for key, value in figures["main"].items()} == run.dir.metrics()
    assert 0 < figures["main"]["fvu"] < 1
    assert figures["main"]["l0"] == pytest.approx(8, rel=0.3)
    multiple = run.config.sinks.multiple
    direct = evaluate_reconstruction(store, load_trained(run.dir, "main"), sink_multiple=multiple, bar=BAR)
    assert figures["main"]["fvu"] == direct["fvu"]
