"""The whole evaluation on the tiny store: every figure has a definition, and nothing depends on how it is computed."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from dictionaries import perfect_dictionary, random_dictionary, zero_dictionary

from pipelines.audit.concepts import concept_from_dict
from pipelines.config import EvaluateConfig
from pipelines.evaluate import concept_texts, evaluate
from pipelines.evaluation import METRICS, Evaluation, evaluate_dictionaries, recovery
from pipelines.evaluation.concepts import ConceptTexts
from pipelines.evaluation.record import evaluation_record
from pipelines.models import LanguageModel
from pipelines.progress import SilentReporter
from pipelines.rundir import read_json
from sae import Dictionary, TopKConfig, build
from storage import ActivationStore

HOOK = "model.layers.1"
ROLES = ("input_score", "output_score")  # of a sample of latents
SETTINGS = EvaluateConfig(n_ce_tokens=256, n_resamples=100, probe_documents=200, score_latents=16)


def evaluated(store: ActivationStore, lm: LanguageModel, settings: EvaluateConfig = SETTINGS, **more) -> Evaluation:
    dictionaries = more.pop("dictionaries", {"a": random_dictionary(HOOK)})
    return evaluate_dictionaries(store, lm, dictionaries, settings, sink_multiple=1.2, **more)["a"]


def same(found: Evaluation, expected: Evaluation, rel: float, but: tuple[str, ...] = ()) -> bool:
    """Whether the values are equal; fails naming the first that is not. Zero ablation may do no harm here: None."""
    for name, figure in expected.figures.items():
        if name not in but:
            value = None if figure.value is None else pytest.approx(figure.value, rel=rel, abs=rel / 100)
            assert found.figures[name].value == value, name
    return True


@pytest.fixture(scope="module")
def one(store: ActivationStore, lm: LanguageModel) -> Evaluation:
    return evaluated(store, lm)


def test_every_figure_is_there_defined_and_within_its_interval(one: Evaluation) -> None:
    assert one.left_out.keys() <= {"absorption"}
    absent = {name for name in METRICS.keys() - one.figures.keys() if "absorption" not in name}
    assert not absent
    for name, figure in one.figures.items():
        assert METRICS[name].better in ("higher", "lower", "none")
        assert METRICS[name].unit
        assert METRICS[name].definition
        assert figure.n > 0, name
        if figure.value is not None:
            assert figure.low is not None, name
            # Percentile intervals of figures at an end of their range need not hold the point; none here is far off.
            assert figure.low - 0.05 * abs(figure.low) - 1e-9 <= figure.value <= figure.high * 1.05 + 1e-9, name


def test_the_record_is_json_without_nan_and_refuses_figures_without_a_definition(one: Evaluation) -> None:
    record = json.loads(json.dumps(evaluation_record({}, {"a": one}), allow_nan=False))
    assert record["metrics_schema"]["fvu"]["better"] == "lower"
    assert record["saes"]["a"]["figures"]["fvu"]["n"] == one.figures["fvu"].n
    wrong = replace(one, figures=one.figures | {"new": one.figures["fvu"]})
    with pytest.raises(AssertionError, match="new"):
        evaluation_record({}, {"a": wrong})


def test_dictionaries_evaluated_together_have_the_figures_that_each_has_alone(
    store: ActivationStore, lm: LanguageModel, one: Evaluation
) -> None:
    """Also with a dictionary of another hook beside it, and the clean model runs once for all."""
    runs: list[int] = []
    two = {"a": random_dictionary(HOOK), "b": random_dictionary(HOOK, seed=1)}
    original = recovery.logits_of
    recovery.logits_of = lambda *args: runs.append(1) or original(*args)
    try:
        found = evaluate_dictionaries(
            store,
            lm,
            {
                **two,
                "c": perfect_dictionary("model.layers.0:input"),
            },
            SETTINGS,
            sink_multiple=1.2,
        )
    finally:
        recovery.logits_of = original
    assert same(found["a"], one, 1e-6)
    assert found["b"].figures["fvu"].value != found["a"].figures["fvu"].value
    assert found["b"].figures["probe_neurons_auroc_k1"] == found["a"].figures["probe_neurons_auroc_k1"]
    # per batch 1 clean, per site 3 ablations, per dictionary 2 splices; once per site with layers to skip a check
    assert len(runs) == 2 * (1 + 2 * 3 + 3 * 2) + 1


def test_figures_do_not_depend_on_batches_or_blocks(
    store: ActivationStore, lm: LanguageModel, one: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("reconstruction", "pools"):
        monkeypatch.setattr(f"pipelines.evaluation.{module}.BLOCK_TOKENS", 96)
    monkeypatch.setattr("pipelines.evaluation.roles.LATENTS_AT_ONCE", 5)
    other = evaluated(store, lm, SETTINGS.model_copy(update={"batch_contexts": 3}))
    assert same(other, one, 2e-3)
    assert other.figures["fvu"].value == pytest.approx(one.figures["fvu"].value, rel=1e-7)


def test_figures_do_not_depend_on_the_order_of_latents(
    store: ActivationStore, lm: LanguageModel, one: Evaluation
) -> None:
    dictionary, order = random_dictionary(HOOK), torch.randperm(96, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        dictionary.sae.W_enc.copy_(dictionary.sae.W_enc[:, order])
        dictionary.sae.b_enc.copy_(dictionary.sae.b_enc[order])
        dictionary.sae.W_dec.copy_(dictionary.sae.W_dec[order])
    other = evaluated(store, lm, SETTINGS.model_copy(update={"score_latents": 0}), dictionaries={"a": dictionary})
    assert same(other, one, 1e-4, but=ROLES)


def test_scaling_latents_against_the_decoder_changes_norms_only(
    store: ActivationStore, lm: LanguageModel, one: Evaluation
) -> None:
    dictionary = random_dictionary(HOOK)
    dictionary.sae.scale_latents(4.0)
    other = evaluated(store, lm, SETTINGS.model_copy(update={"score_latents": 0}), dictionaries={"a": dictionary})
    assert same(other, one, 1e-3, but=(*ROLES, "decoder_norm"))
    assert other.figures["decoder_norm"].value == pytest.approx(one.figures["decoder_norm"].value / 4)


def test_known_answers_at_both_ends(store: ActivationStore, lm: LanguageModel) -> None:
    few = SETTINGS.model_copy(update={"probe_documents": 0, "score_latents": 0})
    perfect = evaluated(store, lm, few, dictionaries={"a": perfect_dictionary(HOOK)}).figures
    assert perfect["fvu"].value == perfect["mse"].value == 0
    for name in ("cosine", "norm_ratio", "relative_bias", "kl_div_score", "kl_div_score_mean"):
        assert perfect[name].value == pytest.approx(1, abs=1e-6), name
        assert perfect[name].low == pytest.approx(1, abs=1e-6), name
    assert perfect["ce_increase"].value == 0
    nothing = evaluated(store, lm, few, dictionaries={"a": zero_dictionary(HOOK)}).figures
    assert nothing["kl_div_score"].value == pytest.approx(0, abs=1e-6)
    assert nothing["norm_ratio"].value == nothing["cosine"].value == 0
    mean = build(TopKConfig(d_in=32, d_sae=64, k=1), seed=0)
    with torch.no_grad():
        mean.W_dec.zero_()
        mean.b_dec.copy_(torch.from_numpy(np.asarray(store.statistics(HOOK).mean)))
    found = evaluated(store, lm, few, dictionaries={"a": Dictionary(mean, hook_name=HOOK)}).figures
    assert found["kl_div_score_mean"].value == pytest.approx(0, abs=1e-6)
    assert found["fvu"].value == pytest.approx(1, abs=0.01)  # the mean of all tokens, not of the held-out ones


def test_random_latents_are_as_good_as_those_of_a_random_dictionary(one: Evaluation) -> None:
    """Nothing was learnt, so the two baselines and the dictionary lie together."""
    for k in (5, 16):
        ours, theirs = (one.figures[f"probe_{name}_auroc_k{k}"].value for name in ("latents", "random"))
        assert abs(ours - theirs) < 0.15
    assert one.figures["probe_dense_auroc"].value > 0.8  # the topics have words of their own


def test_what_is_left_out_says_why(store: ActivationStore, lm: LanguageModel) -> None:
    none = evaluated(store, lm, SETTINGS.model_copy(update={"probe_documents": 0, "score_latents": 0}))
    assert none.left_out["probes"] == "evaluate.probe_documents is 0"
    assert none.left_out["input and output scores"] == "evaluate.score_latents is 0"
    other = evaluated(store, lm, SETTINGS.model_copy(update={"probe_column": "colour", "score_latents": 0}))
    assert "no column 'colour'; they have id, source" in other.left_out["probes"]
    ids = evaluated(store, lm, SETTINGS.model_copy(update={"probe_column": "id", "score_latents": 0}))
    assert "fewer than two values of the column 'id'" in ids.left_out["probes"]


def test_absorption_of_a_concept_of_ones_own(store: ActivationStore, lm: LanguageModel, run) -> None:
    """Texts about two topics that the model tells apart; the texts of the concept are split by group."""
    from tests.tiny import COMMON, TOPICS

    rng = np.random.default_rng(0)

    def texts(topic: str) -> list[str]:
        return [" ".join(rng.choice(TOPICS[topic] * 2 + COMMON, size=25)) for _ in range(60)]

    concept = concept_from_dict({"name": "chess", "positives": texts("chess"), "negatives": texts("rivers")})
    found = evaluated(
        store,
        lm,
        SETTINGS.model_copy(update={"probe_documents": 0, "score_latents": 0}),
        concepts={"chess": ConceptTexts.of(concept)},
    )
    detail = found.details["concept_absorption"]["chess"]
    assert isinstance(detail, dict), detail
    assert detail["probe_f1"] > 0.6
    assert 5 <= detail["n_documents"] <= 30
    assert 0 <= found.figures["concept_absorption_fraction"].value <= 1


def test_a_concept_of_chats_is_refused() -> None:
    chats = [{"messages": [{"role": "user", "content": f"text {i}"}]} for i in range(80)]
    concept = concept_from_dict({"name": "c", "positives": chats[:40], "negatives": chats[40:]})
    with pytest.raises(ValueError, match=r"evaluate.concepts: c holds chats, but absorption is measured on texts"):
        ConceptTexts.of(concept)


def test_texts_of_a_group_stay_on_one_side() -> None:
    positive = np.arange(80) % 2 == 0
    texts = ConceptTexts(("t",) * 80, positive, tuple(f"g{i // 4}" for i in range(80)))
    first = texts.in_train(0)
    groups = np.array(texts.group)
    assert not set(groups[first]) & set(groups[~first])
    assert first.sum() == 40


def test_the_stage_writes_intervals_beside_the_flat_figures(run) -> None:
    config = run.config.model_copy(update={"evaluate": SETTINGS.model_copy(update={"score_latents": 0})})
    flat = evaluate(config, run.dir, SilentReporter())["main"]
    record = read_json(run.dir.evaluation_path)
    assert record["schema_version"] == 1
    assert record["data"]["store_fingerprint"]
    for name, figure in record["saes"]["main"]["figures"].items():
        assert run.dir.metrics()[f"main.{name}"] == figure["value"] == flat[name]
    before = run.dir.evaluation_path.read_bytes()
    evaluate(config, run.dir, SilentReporter())
    assert run.dir.evaluation_path.read_bytes() == before
    assert not any(isinstance(v, float) and math.isnan(v) for v in flat.values())


def test_concepts_that_cannot_be_used_are_all_named(run) -> None:
    settings = run.config.evaluate.model_copy(update={"concepts": ("topic_biology", "nothing-of-this-name")})
    with pytest.raises(ValueError, match=r"(?s)topic_biology is a topic of the corpus.*no shipped concept 'nothing"):
        concept_texts(run.config.model_copy(update={"evaluate": settings}))
