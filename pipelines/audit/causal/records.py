"""What audit.json says about causal tests, and what they change in the rest of it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from pipelines.audit.numbers import figure

if TYPE_CHECKING:
    from pipelines.audit.causal.family import Finding, Measured

UNTOUCHED = "No latent was switched off: association, not cause."
"""The limit of every audit without causal tests."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OneTest(_Record):
    """One test; effects are in standard deviations of the probe within a class, or in log-odds of tokens."""

    kind: Literal["necessity", "sufficiency"]
    dose: float
    effect: float
    low: float
    high: float
    """95 % interval of the mean over prompts."""
    n_matched: int
    """Matched controls that were run; fewer than planned where the test stopped early."""
    matched_band: tuple[float, float]
    """2.5th and 97.5th percentile of their effects."""
    n_random: int
    random_band: tuple[float, float]
    p: float
    p_holm: float
    """Over the whole family, which spans all concepts of the run."""


class CurveRecord(_Record):
    """Dose and response on neutral prompts; lists run over the doses."""

    doses: list[float]
    effects: list[float]
    kl: list[float]
    ce_growth: list[float]
    trend: float
    trend_p: float
    monotone: float
    window_dose: float | None
    """The dose with the largest effect among those with small side effects; null if there is none."""


class CausalFinding(_Record):
    """One latent, or a set of them that was switched as one."""

    dictionary: str
    latents: list[int]
    prompts: Literal["ood", "unused", "confirm"]
    """Where prompts with the concept come from: the out-of-distribution set, documents that the audit did not use, or,
    where both are too few, positives of the confirm part."""
    outcome: str
    tests: list[OneTest]
    curve: CurveRecord
    verdict: Literal["causal", "disruption", "no effect"]


class Causal(_Record):
    """The causal tests of one concept."""

    manifest_sha256: str
    """Of causal/manifest.json, the plan of the family."""
    n_tests: int
    """Of the family, over all concepts."""
    n_controls: int
    """Of each of the two kinds, for each test."""
    alpha: float
    neutral_reused: bool
    """Whether neutral prompts may begin documents that the audit read as negatives."""
    findings: list[CausalFinding]


def record_of(
    finding: "Finding", *, dictionary: str, prompts: Literal["ood", "unused", "confirm"], outcome: str
) -> CausalFinding:
    """A finding as audit.json holds it."""
    curve = finding.curve
    return CausalFinding(
        dictionary=dictionary,
        latents=list(finding.latents),
        prompts=prompts,
        outcome=outcome,
        tests=[_test(test) for test in finding.tests],
        curve=CurveRecord(
            doses=[float(d) for d in curve.doses],
            effects=[figure(e) for e in curve.effects.mean(axis=0)],
            kl=[figure(k) for k in curve.kl],
            ce_growth=[figure(g) for g in curve.ce_growth],
            trend=figure(curve.trend.statistic),
            trend_p=figure(curve.trend.p),
            monotone=figure(curve.monotone),
            window_dose=curve.window.dose,
        ),
        verdict=finding.verdict,
    )


def _test(test: "Measured") -> OneTest:
    return OneTest(
        kind=test.kind,
        dose=test.dose,
        effect=figure(test.effect),
        low=figure(test.low),
        high=figure(test.high),
        n_matched=test.matched.n_controls,
        matched_band=(figure(test.matched.band[0]), figure(test.matched.band[1])),
        n_random=test.random.n_controls,
        random_band=(figure(test.random.band[0]), figure(test.random.band[1])),
        p=figure(test.p),
        p_holm=figure(test.p_holm),
    )


def with_causal(found: Mapping[str, Any], causal: Causal) -> dict[str, Any]:
    """The figures of an audit once its latents were tested: claims, verdict and limits.

    The rung `causal` stands on all below it: only a robust latent reaches it.
    """
    shown = {(f.dictionary, f.latents[0]) for f in causal.findings if f.verdict == "causal" and len(f.latents) == 1}
    candidates = [
        c.model_copy(update={"claim": "causal"}) if c.claim == "robust" and (c.dictionary, c.latent) in shown else c
        for c in found["candidates"]
    ]
    top = max((c for c in candidates if c.claim == "causal"), key=lambda c: c.discover_z, default=None)
    verdict = found["verdict"]
    if top is not None:
        verdict = verdict.model_copy(
            update={
                "level": "causal",
                "sentence": f"{verdict.sentence} Changing latent {top.latent} changes what the model computes, beyond "
                "matched and random controls.",
                "dictionary": top.dictionary,
                "latent": top.latent,
                "auroc": top.auroc,
                "low": top.low,
                "high": top.high,
            }
        )
    limits = [limit for limit in found["limits"] if limit != UNTOUCHED]
    return {**found, "candidates": candidates, "verdict": verdict, "limits": [*_limits(causal), *limits]}


def _limits(causal: Causal) -> list[str]:
    tested = sum(len(f.latents) == 1 for f in causal.findings)
    out = [
        f"{tested} latents of this concept were switched off and turned up. The outcome is a direction in a later "
        "layer or the next token, not a judgement of whole answers."
        if tested
        else "No latent of this concept was among those that were switched off: association, not cause."
    ]
    if any(f.verdict == "no effect" for f in causal.findings):
        out.append(
            "Some latents did no more than their controls. That is what this number of prompts can see, not proof that "
            "they do nothing."
        )
    if any(f.prompts == "confirm" for f in causal.findings):
        out.append(
            "Causal tests used positives of the confirm part, as there were too few others: their texts were "
            "seen before."
        )
    if causal.neutral_reused:
        out.append(
            "Some neutral prompts may begin documents that were negatives of the audit: there were too few others."
        )
    return out
