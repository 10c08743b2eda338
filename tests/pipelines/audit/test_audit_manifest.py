"""Manifests show every change, hold no text, and are refused once edited."""

import json
from dataclasses import replace

import pytest

from pipelines.audit.examples import Example
from pipelines.audit.manifest import Manifest, ManifestError, plan_audit, read_manifest
from pipelines.audit.splits import split_by_group

EXAMPLES = [
    Example(text=f"secret text {i}", role="positive" if i < 30 else "hard_negative", group=f"g{i}") for i in range(60)
]


def plan(examples=EXAMPLES, *, seed=0, weights="w0", settings=None, name="c") -> Manifest:
    return plan_audit(
        examples,
        split_by_group(examples, seed=seed),
        concept={"name": name, "kind": "text"},
        dictionaries=[{"name": "main", "weights_sha256": weights}],
        settings=settings or {"max_candidates": 20},
        planned_tests=["discover: all latents"],
    )


def test_the_hash_shows_a_changed_text_label_split_dictionary_setting_or_test():
    changed = [
        plan([replace(EXAMPLES[0], text="new"), *EXAMPLES[1:]]),
        plan([replace(EXAMPLES[0], role="negative"), *EXAMPLES[1:]]),
        plan([*EXAMPLES[:-1], replace(EXAMPLES[-1], role="negative")]),
        plan(seed=3),
        plan(weights="w1"),
        plan(settings={"max_candidates": 21}),
        plan(name="d"),
    ]
    assert len({plan().sha256, *(p.sha256 for p in changed)}) == 8
    assert plan().sha256 == plan().sha256


def test_the_same_plan_is_the_same_bytes_and_reads_back(tmp_path):
    for name in ("a.json", "b.json"):
        plan().write(tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_manifest(tmp_path / "a.json") == plan()
    assert "secret" not in (tmp_path / "a.json").read_text()


def test_confirm_texts_have_one_hash_whatever_the_name_and_order():
    renamed = plan(name="other")
    assert renamed.sha256 != plan().sha256
    assert renamed.confirm_sha256 == plan().confirm_sha256 == plan(EXAMPLES[::-1]).confirm_sha256
    assert plan(seed=3).confirm_sha256 != plan().confirm_sha256
    assert len(plan().confirm_positives) == 9


def test_a_dictionary_is_known_by_its_weights_or_else_by_what_is_told_of_it():
    assert plan(weights="w0").dictionaries == ["w0"]
    nameless = [plan(weights=None).dictionaries, plan(weights="").dictionaries]
    assert len(nameless[0][0]) == 64
    assert nameless[0] != nameless[1]


@pytest.mark.parametrize("key", ["settings", "examples", "planned_tests", "sha256"])
def test_an_edited_manifest_is_refused(tmp_path, key):
    path = tmp_path / "manifest.json"
    plan().write(path)
    raw = json.loads(path.read_text())
    if key == "settings":
        raw["settings"]["max_candidates"] = 99
    elif key == "examples":
        raw["examples"][0][3] = "tune"
    elif key == "planned_tests":
        raw["planned_tests"].append("another")
    else:
        raw["sha256"] = "0" * 64
    path.write_text(json.dumps(raw))
    with pytest.raises(
        ManifestError, match=r"manifest.json was edited.*Restore the original; a changed plan is another"
    ):
        read_manifest(path)


def test_a_missing_damaged_or_older_manifest_is_refused(tmp_path):
    with pytest.raises(ManifestError, match="there is no manifest"):
        read_manifest(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"schema_version": 2, ')
    with pytest.raises(ManifestError, match=r"half.json is damaged"):
        read_manifest(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ManifestError, match=r"list.json was edited"):
        read_manifest(tmp_path / "list.json")
    Manifest(plan().body | {"schema_version": 1}).write(tmp_path / "old.json")
    with pytest.raises(ManifestError, match="has schema version 1, this version reads 2: run the audit again"):
        read_manifest(tmp_path / "old.json")
