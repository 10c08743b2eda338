import json
from pathlib import Path

from pipelines.config import RunConfig
from pipelines.run import Run
from pipelines.rundir import RunDir
from pipelines.summary import summary
from tests.tiny import tiny_config

VERDICT = {"level": "nothing_found", "latent": None, "auroc": None, "low": None, "high": None, "sentence": "None."}


def write_audit(run: Run, name: str) -> Path:
    folder = run.dir.audit(name)
    folder.mkdir(parents=True)
    (folder / "audit.json").write_text(json.dumps({"verdict": VERDICT}))
    (folder / "report.html").touch()
    return folder / "report.html"


def test_summary_lists_the_audits_of_the_last_audit_stage_and_no_older_ones(tmp_path: Path) -> None:
    run = Run(
        RunConfig.model_validate(tiny_config(Path("m"), Path("t.jsonl"), audit={"concepts": ["file.yaml"]})),
        RunDir(tmp_path),
    )
    assert summary(run)["audits"] == {}
    write_audit(run, "dropped")
    report = write_audit(run, "named-otherwise-than-its-file")
    run.dir.mark_finished("audit", "key", 1.0, [report])
    audits = summary(run)["audits"]
    assert list(audits) == ["named-otherwise-than-its-file"]
    assert audits["named-otherwise-than-its-file"] == VERDICT | {"report": str(report)}
