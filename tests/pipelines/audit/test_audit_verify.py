"""A bundle verifies as written; whatever is edited in it is named."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from pipelines.audit.concepts import concept_from_dict, examples_of
from pipelines.audit.ledger import Ledger
from pipelines.audit.settings import AuditSettings
from pipelines.audit.stage import audit_concept
from pipelines.audit.verify import verify_audit
from pipelines.audit.views import View
from tests.pipelines.command_line import sae_here

D_SAE, D_IN, N = 200, 16, 160
SETTINGS = AuditSettings(n_permutations=300, n_confirm_permutations=999, n_simulated=50, max_candidates=6)


def views(n: int, seed: int = 0) -> list[View]:
    rng = np.random.default_rng(seed)
    positive = np.arange(n) < N // 2
    out = []
    for name in ("narrow", "wide"):
        scores = np.maximum(rng.normal(size=(n, D_SAE)) - rng.uniform(-1, 1.5, D_SAE), 0).astype(np.float32)
        scores[positive, 7] += 2.5
        dense = rng.normal(size=(n, D_IN)).astype(np.float32)
        dense[positive, 0] += 1
        out.append(
            View(
                identity={"name": name, "hook": "blocks.1", "weights_sha256": name},
                scores=scores,
                dense=dense,
                mean_latents=scores / 2,
                random=np.abs(rng.normal(size=(n, 40))).astype(np.float32),
                corpus=np.maximum(rng.normal(size=(50, D_SAE)) - 1, 0).astype(np.float32),
                directions=rng.normal(size=(D_SAE, D_IN)).astype(np.float32),
                labels={7: "the demo latent", 9: "demo words", 11: "something else"},
            )
        )
    return out


def texts(side: str) -> list[str]:
    rng = np.random.default_rng(len(side))
    return [" ".join(rng.choice([f"w{k}" for k in range(80)], 15)) + f" {side}{i}" for i in range(N // 2)]


@pytest.fixture(scope="module", params=["shown", "redacted"])
def bundle(request, tmp_path_factory) -> tuple[Path, Ledger]:
    folder = tmp_path_factory.mktemp("bundle")
    concept = concept_from_dict(
        {
            "name": "demo",
            "positives": texts("here"),
            "hard_negatives": texts("there"),
            "redact": request.param == "redacted",
        }
    )
    ledger = Ledger(folder / "ledger" / "ledger.jsonl")
    audit_concept(concept, examples_of(concept), views(N), folder / "audit", settings=SETTINGS, ledger=ledger)
    return folder / "audit", ledger


@pytest.fixture
def copied(bundle, tmp_path) -> tuple[Path, Ledger]:
    folder, ledger = bundle
    shutil.copytree(folder, tmp_path / "audit")
    shutil.copytree(ledger.path.parent, tmp_path / "ledger")
    return tmp_path / "audit", Ledger(tmp_path / "ledger" / "ledger.jsonl")


def edit(path: Path, change) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def problems(copied: tuple[Path, Ledger]) -> str:
    return "\n".join(verify_audit(copied[0], ledger=copied[1]).problems)


def test_an_audit_verifies_as_it_was_written(bundle):
    folder, ledger = bundle
    found = verify_audit(folder, ledger=ledger)
    assert found.problems == []
    assert found.n_figures > 1000


def without_ledger(copied: tuple[Path, Ledger]) -> tuple[Path, Ledger]:
    """As on another machine, where only the bundle speaks."""
    shutil.rmtree(copied[1].path.parent)
    return copied


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r["verdict"].update(auroc=0.999), "verdict.auroc says 0.999"),
        (lambda r: r["candidates"][0].update(low=0.99), r"candidates[0].low says 0.99"),
        (lambda r: r["candidates"][0].update(claim="robust"), "candidates[0].claim"),
        (lambda r: r["candidates"][0]["scores"].__setitem__(3, 9.0), "candidates[0].scores[3]"),
        (lambda r: r["candidates"][0]["recurrence"][0].update(auroc=0.001), "candidates[0].recurrence[0].auroc"),
        (lambda r: r["candidates"][0]["precision"][0].update(precision=0.9), "precision[0].precision"),
        (lambda r: r["power"]["detects"].__setitem__(0, 1.0), "power.detects[0]"),
        (lambda r: r["baselines"][0].update(auroc=0.01), "baselines[0].auroc"),
        (lambda r: r["gap"].update(value=-0.5), "gap.value"),
        (lambda r: r["shuffled_null"].update(upper=0.5001), "shuffled_null.upper"),
        (lambda r: r["discover"]["auroc"].__setitem__(5, 0.987), "discover.auroc[5]"),
        (lambda r: r.update(limits=[]), "limits"),
        (lambda r: r["opening"].update(reused=2), "opening.reused"),
        (lambda r: r["opening"]["records"][0].update(name="other"), "opening.records [0]"),
        (lambda r: r["settings"].update(alpha=0.2), "settings are not those of the manifest"),
        (lambda r: r["examples"][0].update(role="hard_negative"), "examples are not those of the manifest"),
    ],
)
def test_an_edited_figure_is_named(copied, change, named):
    folder, _ = without_ledger(copied)
    edit(folder / "audit.json", change)
    assert named in problems(copied)


def test_an_edit_of_what_cannot_be_computed_again_is_told_by_the_ledger(copied):
    edit(copied[0] / "audit.json", lambda r: r.update(created="2001-01-01T00:00:00+00:00"))
    assert "audit.json is not the file whose hash the ledger recorded" in problems(copied)


def test_an_edited_score_file_is_named(copied):
    path = copied[0] / "scores.safetensors"
    tensors = load(path.read_bytes())
    tensors["wide/values"] = tensors["wide/values"].copy()
    tensors["wide/values"][:2000] *= 3
    path.write_bytes(save(tensors))
    told = problems(copied)
    assert "scores.safetensors is not the file" in told
    assert "the scores give" in told


def test_scores_edited_together_with_their_hash_change_figures(copied):
    path = copied[0] / "scores.safetensors"
    tensors = load(path.read_bytes())
    tensors["wide/values"] = np.ones_like(tensors["wide/values"])
    path.write_bytes(save(tensors))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(copied[0] / "audit.json", lambda r: r.update(scores_sha256=digest))
    assert "the scores give" in problems(copied)


def test_a_damaged_score_file_is_named(copied):
    (copied[0] / "scores.safetensors").write_bytes(b"\x00" * 40)
    assert "scores.safetensors cannot be read" in problems(copied)


def test_an_edited_manifest_is_named(copied):
    edit(copied[0] / "manifest.json", lambda r: r["settings"].update(seed=5))
    assert "manifest.json was edited" in problems(copied)


def test_a_manifest_edited_with_its_hash_is_not_the_plan_of_the_audit(copied):
    from pipelines.audit.manifest import Manifest, read_manifest

    body = dict(read_manifest(copied[0] / "manifest.json").body)
    Manifest(body | {"planned_tests": []}).write(copied[0] / "manifest.json")
    assert "manifest.json is not the plan that audit.json names" in problems(copied)


def test_an_edited_ledger_is_named(copied):
    lines = copied[1].path.read_text().splitlines()
    copied[1].path.write_text("\n".join([lines[0].replace('"audit"', '"other"'), *lines[1:]]) + "\n")
    assert "was edited" in problems(copied)
    assert str(copied[1].path) in problems(copied)


def test_an_edited_page_is_named(copied):
    page = copied[0] / "report.html"
    page.write_text(page.read_text() + "<p>robust</p>")
    assert "report.html does not show what audit.json says" in problems(copied)


def test_an_abandoned_audit_is_told(copied):
    (copied[0] / "audit.json").unlink()
    assert "the audit was abandoned" in problems(copied)


def test_the_command_verifies_a_run_and_ends_with_1_where_something_was_edited(copied, monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_PIPELINES_LEDGER", str(copied[1].path))
    (tmp_path / "run" / "audit").mkdir(parents=True)
    moved = copied[0].rename(tmp_path / "run" / "audit" / "demo")
    done = sae_here("audit", "verify", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "all as recorded" in done.stdout
    edit(moved / "audit.json", lambda r: r["verdict"].update(auroc=0.999))
    done = sae_here("audit", "verify", moved)
    assert done.returncode == 1
    assert "verdict.auroc says 0.999" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["verify"], "give the folder of an audit"),
        (["verify", "."], "give the folder of one"),
        (["verify", ".", "--model", "m"], "drop the other options"),
        (["a.yaml", "b.yaml"], "sae audit verify BUNDLE"),
    ],
)
def test_wrong_usage_is_told_with_its_fix(arguments, fix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = sae_here("audit", *arguments)
    assert done.returncode == 2
    assert fix in done.stderr
