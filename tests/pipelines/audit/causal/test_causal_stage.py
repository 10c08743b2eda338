"""Causal tests of a finished run: planned before the first test, resumable, and part of an audit that verifies."""

import json
import shutil
from pathlib import Path

import pytest

from pipelines.audit.causal.records import UNTOUCHED, Causal, with_causal
from pipelines.audit.causal.stage import choose
from pipelines.audit.result import load_result
from pipelines.audit.run import audit
from pipelines.audit.verify import verify_audit
from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.progress import SilentReporter
from pipelines.rundir import RunDir
from pipelines.yamlfiles import load_yaml

QUICK = {"enabled": True, "n_features": 2, "n_prompts": 6, "n_tokens": 12, "alpha": 0.4}


@pytest.fixture
def run(finished, tmp_path) -> tuple[dict, RunDir]:
    shutil.copytree(finished.out, tmp_path / "run")
    return load_yaml(finished.config.read_text()), RunDir(tmp_path / "run")


def made(run: tuple[dict, RunDir], **options) -> Path:
    raw, folder = run
    raw["audit"]["causal"] = {**QUICK, **options}
    audit(RunConfig.model_validate(raw), folder, SilentReporter())
    return folder.path


def findings_in(out: Path) -> list:
    results = [load_result(path) for path in sorted(out.glob("audit/*/audit.json"))]
    return [finding for result in results if result.causal for finding in result.causal.findings]


def test_a_run_gets_its_causal_verdicts_resumes_and_verifies(run):
    before = {p.parent.name: load_result(p) for p in run[1].path.glob("audit/*/audit.json")}
    chosen = choose(list(before.values()), QUICK["n_features"])
    assert chosen, "the planted topics are confirmed"
    out = made(run)
    manifest = json.loads((out / "causal/manifest.json").read_text())
    lines = (out / "causal/tests.jsonl").read_text().splitlines()
    assert len(lines) == 2 * len(chosen) == 2 * len(manifest["tests"])
    assert manifest["settings"]["n_controls"] >= len(lines) / QUICK["alpha"] - 1
    findings = findings_in(out)
    assert len(findings) == len(chosen)
    for finding in findings:
        assert [t.kind for t in finding.tests] == ["necessity", "sufficiency"]
        assert finding.curve.effects != [0.0] * len(finding.curve.doses)
        assert all(t.p <= t.p_holm for t in finding.tests)
    for folder in sorted(out.glob("audit/*")):
        assert verify_audit(folder).problems == []
        assert not any(limit == UNTOUCHED for limit in load_result(folder / "audit.json").limits)
    for folder in out.glob("audit/*"):  # the audits themselves were not made again
        assert load_result(folder / "audit.json").created == before[folder.name].created

    # A run that was cut off: the last test is lost, the others are not made again.
    (out / "causal/tests.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40] + "\n")
    (out / ".stages/causal.json").unlink()
    made(run)
    again = [json.loads(x) for x in (out / "causal/tests.jsonl").read_text().splitlines() if x.endswith("}")]
    assert again == [json.loads(line) for line in lines]
    assert findings_in(out) == findings


def test_bad_input_is_refused_by_name(run):
    with pytest.raises(UsageError, match=r"limit is 0\.0 min"):
        made(run, max_minutes=1e-6)
    with pytest.raises(UsageError, match="has no outcome_tokens"):
        made(run, outcome="tokens")
    with pytest.raises(UsageError, match="lower it"):
        made(run, n_tokens=100_000)
    with pytest.raises(UsageError, match=r"matched controls"):
        made(run, alpha=0.001)


def test_only_a_robust_latent_reaches_the_causal_rung(finished):
    result = next(load_result(p) for p in sorted(finished.out.glob("audit/*/audit.json")))
    first = result.candidates[0]
    figures = {"candidates": result.candidates, "verdict": result.verdict, "limits": result.limits}
    finding = {
        "dictionary": first.dictionary,
        "latents": [first.latent],
        "prompts": "ood",
        "outcome": "probe",
        "tests": [],
        "curve": {
            "doses": [0.0],
            "effects": [0.0],
            "kl": [0.0],
            "ce_growth": [0.0],
            "trend": 0.0,
            "trend_p": 1.0,
            "monotone": 0.0,
            "window_dose": None,
        },
        "verdict": "causal",
    }
    record = {"manifest_sha256": "x", "n_tests": 2, "n_controls": 39, "alpha": 0.05, "findings": [finding]}
    record["neutral_reused"] = True
    for claim, verdict, expected in (
        ("robust", "causal", "causal"),
        ("robust", "disruption", "robust"),
        ("associated", "causal", "associated"),
    ):
        finding["verdict"] = verdict
        figures["candidates"] = [first.model_copy(update={"claim": claim})]
        changed = with_causal(figures, Causal.model_validate(record))
        assert changed["candidates"][0].claim == expected
        assert (changed["verdict"].level == "causal") == (expected == "causal")
        assert UNTOUCHED in result.limits
        assert UNTOUCHED not in changed["limits"]
        assert any("neutral prompts" in limit for limit in changed["limits"])
