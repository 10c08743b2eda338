"""A whole audit on planted truth, on nothing, and on a planted confound; and its artefacts."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.audit.baselines import bag_of_words, dense_logistic, logistic, mean_difference
from pipelines.audit.concepts import concept_from_dict, examples_of
from pipelines.audit.confirm import youden_threshold
from pipelines.audit.examples import Example
from pipelines.audit.ledger import Ledger
from pipelines.audit.manifest import read_manifest
from pipelines.audit.result import AuditResult, load_result
from pipelines.audit.settings import AuditSettings
from pipelines.audit.stage import audit_concept
from pipelines.audit.statistics import associate, auroc, holm, permutation_p
from pipelines.audit.views import View

N, D_SAE, D_IN = 160, 300, 24
SETTINGS = AuditSettings(n_permutations=300, n_confirm_permutations=999, n_simulated=50, max_candidates=10)
DICTIONARY = {"name": "main", "hook": "model.layers.8"}
ARRAYS = {"dense", "mean_latents", "reconstruction", "error", "random", "corpus", "directions", "labels"}


def neutral_texts(seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice([f"w{k}" for k in range(60)], size=20)) + f" id{seed}x{i}" for i in range(N // 2)]


def marked(texts: list[str]) -> list[str]:
    return [" ".join([*text.split()[:6], "marker", "m" + str(i % 2), f"id{i}"]) for i, text in enumerate(texts)]


def demo_concept(**changes):
    raw = {"name": "demo", "title": "Demo", "positives": neutral_texts(1), "hard_negatives": neutral_texts(2)}
    return concept_from_dict(raw | changes)


def noise(seed=0):
    rng = np.random.default_rng(seed)
    return np.maximum(rng.normal(size=(N, D_SAE)) - rng.uniform(-1, 1.5, D_SAE), 0).astype(np.float32)


def dense_activations(effect: float):
    x = np.random.default_rng(9).normal(size=(N, D_IN)).astype(np.float32)
    x[: N // 2, :4] += effect
    return x


def run(tmp_path, scores, concept=None, **options) -> AuditResult:
    concept = concept or demo_concept()
    tmp_path.mkdir(exist_ok=True)
    fresh = Ledger(Path(tempfile.mkdtemp(dir=tmp_path)) / "ledger.jsonl")
    arrays = {"dense": dense_activations(1.0)} | {key: options.pop(key) for key in ARRAYS & options.keys()}
    views = options.pop("views", None) or [View(identity=DICTIONARY, scores=scores, **arrays)]
    options = {"settings": SETTINGS, "ledger": fresh} | options
    return audit_concept(concept, examples_of(concept), views, tmp_path / "audit", **options)


def planted(effect=2.5):
    scores = noise()
    scores[: N // 2, 42] += effect
    return scores


def test_a_planted_latent_is_detected_and_nothing_else(tmp_path):
    result = run(tmp_path, planted(), labels={42: "' plant'"})
    assert result.verdict.level == "detects"
    assert result.verdict.latent == 42
    assert result.verdict.low > 0.7
    v = result.verdict
    assert v.sentence == (
        "Latent 42 responds to text about demo and detects it, on texts that had no part in choosing it: "
        f"AUROC {v.auroc:.2f} ({v.low:.2f}–{v.high:.2f})."
    )
    assert [c.latent for c in result.candidates if c.claim != "not_confirmed"] == [42]
    best = next(c for c in result.candidates if c.latent == 42)
    assert best.label == "' plant'"
    assert best.p_holm <= 0.05
    assert best.hard_negatives.auroc == best.auroc
    assert best.auroc > result.shuffled_null.upper


def test_nothing_planted_gives_nothing_found_with_the_effect_that_would_have_been(tmp_path):
    result = run(tmp_path, noise())
    assert result.verdict.level == "nothing_found"
    assert result.verdict.latent is None
    assert (
        f"A latent with a true AUROC of {result.verdict.minimum_detectable_auroc:.2f} or more would have been seen"
        in result.verdict.sentence
    )
    assert any("The model does carry the distinction" in limit for limit in result.limits)
    without = run(tmp_path, noise(), dense=dense_activations(0.0))
    assert not any("The model does carry" in limit for limit in without.limits)
    assert 0.7 < result.verdict.minimum_detectable_auroc < 0.9


def test_a_weak_latent_is_associated_and_no_more(tmp_path):
    scores = noise()
    scores[:, 42] = np.maximum(np.random.default_rng(1).normal(size=N) + 0.75 * (np.arange(N) < N // 2), 0)
    result = run(tmp_path, scores)
    assert result.verdict.level == "associated"
    assert "that it detects them is not shown" in result.verdict.sentence


def test_a_planted_confound_is_stamped_and_caps_the_claim(tmp_path):
    concept = demo_concept(positives=marked(neutral_texts(1)))
    result = run(tmp_path, planted(), concept=concept)
    assert result.verdict.confounded
    assert result.verdict.level == "associated"
    assert "Words alone separate these texts" in result.verdict.sentence
    assert result.limits[0].startswith("CONFOUNDED")


def test_candidates_are_chosen_without_the_confirm_half(tmp_path):
    concept = demo_concept()
    first = run(tmp_path, planted())
    confirm = [i for i, e in enumerate(first.examples) if e.part == "confirm"]
    scores = planted()
    scores[confirm] = np.random.default_rng(3).random((len(confirm), D_SAE))
    second = run(tmp_path, scores, concept=concept)
    assert [c.latent for c in first.candidates] == [c.latent for c in second.candidates]
    assert [c.threshold for c in first.candidates] == [c.threshold for c in second.candidates]
    assert first.discover == second.discover


def test_the_same_seed_gives_the_same_audit_and_json_reads_back(tmp_path):
    one, other = run(tmp_path, planted()), run(tmp_path, planted())
    volatile = {"created", "seconds", "opening"}
    assert one.model_dump(exclude=volatile) == other.model_dump(exclude=volatile)
    assert load_result(tmp_path / "audit" / "audit.json") == other
    raw = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert raw["schema_version"] == 2
    assert {key: raw[key] for key in ("causal", "suppression", "monitor", "comparison")} == dict.fromkeys(
        ("causal", "suppression", "monitor", "comparison")
    )


def test_figures_can_be_recomputed_from_the_written_scores(tmp_path):
    result = run(tmp_path, planted())
    confirm = np.array([e.part == "confirm" for e in result.examples])
    labels = np.array([e.role == "positive" for e in result.examples])
    for candidate in result.candidates:
        scores = np.array(candidate.scores)
        assert auroc(scores[confirm][:, None], labels[confirm])[0] == pytest.approx(candidate.auroc, abs=1e-6)
        above = scores[confirm & labels] > candidate.threshold
        assert above.mean() == pytest.approx(candidate.true_positive_rate, abs=1e-6)


def test_the_manifest_is_written_first_and_its_hash_is_in_the_result(tmp_path, monkeypatch):
    def stop(*_args, **_options):
        raise RuntimeError("stopped before statistics")

    result = run(tmp_path, planted())
    assert result.manifest_sha256 == read_manifest(tmp_path / "audit" / "manifest.json").sha256
    monkeypatch.setattr("pipelines.audit.stage.before_opening", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        audit_concept(
            demo_concept(),
            examples_of(demo_concept()),
            [View(identity=DICTIONARY, scores=planted())],
            tmp_path / "stopped",
        )
    assert [p.name for p in (tmp_path / "stopped").iterdir()] == ["manifest.json"]


def test_redacted_concepts_leave_no_text_in_any_artefact(tmp_path):
    concept = demo_concept(redact=True)
    run(tmp_path, planted(), concept=concept)
    for path in (tmp_path / "audit").iterdir():
        content = path.read_bytes().decode(errors="replace")
        assert not any(item.content in content for item in (*concept.positives, *concept.hard_negatives))


def test_corpus_rates_give_precision_at_base_rates(tmp_path):
    corpus = noise(5)
    result = run(tmp_path, planted(), corpus=corpus)
    best = next(c for c in result.candidates if c.latent == 42)
    assert best.corpus_rate == pytest.approx((corpus[:, 42] > best.threshold).mean(), abs=1e-6)
    at_one_percent = best.precision[0]
    hits = 0.01 * best.true_positive_rate
    assert at_one_percent.base_rate == 0.01
    assert at_one_percent.precision == pytest.approx(hits / (hits + 0.99 * best.corpus_rate), rel=1e-3)
    assert run(tmp_path, planted()).candidates[0].corpus_rate is None


def test_positives_that_no_confirmed_latent_sees_are_counted(tmp_path):
    scores = planted()
    scores[:20, 42] = 0
    result = run(tmp_path, scores)
    confirm = [i for i, e in enumerate(result.examples) if e.part == "confirm" and e.role == "positive"]
    best = next(c for c in result.candidates if c.latent == 42)
    expected = np.mean([best.scores[i] <= best.threshold for i in confirm])
    assert result.completeness.unseen_share == pytest.approx(expected, abs=1e-6)
    assert any("seen by none of the confirmed latents" in limit for limit in result.limits)


def test_paired_examples_stay_together_and_are_audited(tmp_path):
    examples = [replace(e, group=f"pair{i % (N // 2)}") for i, e in enumerate(examples_of(demo_concept()))]
    result = audit_concept(
        demo_concept(),
        examples,
        [View(identity=DICTIONARY, scores=planted())],
        tmp_path / "pairs",
        settings=SETTINGS,
    )
    assert result.verdict.latent == 42
    assert result.counts["confirm"].groups == 24


def test_silent_scores_find_nothing_without_warnings(tmp_path):
    result = run(tmp_path, np.zeros((N, D_SAE), np.float32), dense=None)
    assert result.verdict.level == "nothing_found"
    assert result.candidates == []
    assert result.discover.n_tested == 0


def test_wrong_arrays_and_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one row per example \(160\).*scores has shape \(159, 300\)"):
        run(tmp_path, planted()[1:])
    with pytest.raises(ValueError, match=r"dense has shape \(3, 24\).*Encode the examples in their order"):
        run(tmp_path, planted(), dense=dense_activations(1)[:3])
    with pytest.raises(ValueError, match=r"corpus has shape \(5, 4\) for scores"):
        run(tmp_path, planted(), corpus=np.zeros((5, 4), np.float32))
    with pytest.raises(ValueError, match="dense holds values that are not finite"):
        run(tmp_path, planted(), dense=np.full((N, 2), np.nan))
    with pytest.raises(ValueError, match="n_permutations must be at least 100; got 3"):
        AuditSettings(n_permutations=3)
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1; got 5"):
        AuditSettings(alpha=5)
    (tmp_path / "old.json").write_text('{"schema_version": 9}')
    with pytest.raises(
        ValueError,
        match=r"old.json is not an audit.*wrong or missing: schema_version, created.*Run the audit again",
    ):
        load_result(tmp_path / "old.json")


def test_youden_threshold_equals_a_value_computed_by_hand():
    labels = np.array([True, True, True, False, False, False])
    assert youden_threshold(np.array([3.0, 2.0, 0.0, 1.0, 0.0, 0.0]), labels) == 1.0
    assert youden_threshold(np.zeros(6), labels) == 0.0


def test_baselines_find_what_is_planted_and_score_chance_on_what_is_not():
    labels = np.arange(N) < N // 2
    texts = [*marked(neutral_texts(1)), *neutral_texts(2)]
    half = np.arange(N) % 2 == 0
    pick = lambda rows: [texts[i] for i in np.flatnonzero(rows)]  # noqa: E731
    assert auroc(bag_of_words(pick(half), labels[half], pick(~half))[:, None], labels[~half])[0] > 0.95
    x = dense_activations(1.5)
    for probe in (dense_logistic, mean_difference):
        assert auroc(probe(x[half], labels[half], x[~half])[:, None], labels[~half])[0] > 0.85
        x_null = dense_activations(0.0)
        assert 0.3 < auroc(probe(x_null[half], labels[half], x_null[~half])[:, None], labels[~half])[0] < 0.7
    assert bag_of_words(["a", "b"], np.array([True, False]), ["a"]).tolist() == [0.0]


def test_logistic_minimises_its_objective():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(40, 3)), rng.random(40) < 0.5
    w, b = logistic(x, labels, penalty=0.5)
    y = np.where(labels, 1, -1)
    slope = -y / (1 + np.exp(y * (x @ w + b)))
    assert np.allclose(x.T @ slope + 0.5 * w, 0, atol=1e-3)
    assert slope.sum() == pytest.approx(0, abs=1e-3)


def test_example_digests_identify_texts():
    one = Example(text="a", role="positive", group="g")
    assert one.digest == "ca978112ca1bbdca"


def test_confirmations_are_false_in_5_of_100_audits_at_most_when_nothing_is_planted():
    """Choosing the best latents first costs nothing, because they are judged on texts that had no part in it."""
    rng = np.random.default_rng(2)
    labels, groups = np.arange(60) < 30, np.arange(60)
    n_audits, false = 200, 0
    for seed in range(n_audits):
        halves = np.maximum(rng.normal(size=(2, 60, 120)) - rng.uniform(-1, 1.5, 120), 0).astype(np.float32)
        found = associate(halves[0], labels, groups, n_permutations=100, seed=seed)
        chosen = np.argsort(-np.where(found.tested, found.z, -np.inf))[:10]
        p = permutation_p(halves[1][:, chosen], labels, groups, n_permutations=499, seed=seed)
        false += bool(holm(p).min() <= 0.05)
    assert false / n_audits <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_audits)
