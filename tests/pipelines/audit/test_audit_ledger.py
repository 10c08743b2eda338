"""The ledger counts openings under any name, survives kills and two writers, and is refused once edited."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from test_audit_manifest import EXAMPLES, plan

from pipelines.audit.ledger import Ledger, LedgerError, default_ledger

OPENER = """
import sys
from pathlib import Path
from test_audit_manifest import plan
from pipelines.audit.ledger import Ledger
ledger, n, weights = Ledger(Path(sys.argv[1])), int(sys.argv[2]), sys.argv[3]
manifest = plan(weights=weights)
print("ready", flush=True)
for i in range(n):
    print(ledger.open_confirm(manifest, name=f"{weights}-{i}").seq, flush=True)
"""


def opener(path, n, weights):
    here = os.path.dirname(__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-c", OPENER, str(path), str(n), weights], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def book(ledger) -> Ledger:
    return Ledger.default()


def test_the_ledger_stands_where_the_environment_says_and_else_with_the_user(monkeypatch, ledger, tmp_path):
    assert default_ledger() == ledger
    monkeypatch.delenv("SAE_PIPELINES_LEDGER")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_ledger() == tmp_path / "sae-pipelines" / "ledger.jsonl"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_ledger().parts[-4:] == (".local", "share", "sae-pipelines", "ledger.jsonl")


def test_the_first_opening_is_free_and_later_ones_are_stamped_whatever_their_name(book):
    first = book.open_confirm(plan(), name="one")
    assert (first.reused, first.stamp, first.earlier, first.seq) == (0, None, [], 0)
    book.finish(first, level="detects", result_sha256="r")
    second = book.open_confirm(plan(name="renamed", settings={"max_candidates": 3}), name="two")
    assert (second.reused, second.stamp) == (1, "REUSED(1)")
    assert [(e.name, e.outcome, e.shared) for e in second.earlier] == [("one", "detects", 9)]
    third = book.open_confirm(plan(settings={"max_candidates": 4}), name="one")
    assert third.stamp == "REUSED(2)"
    assert [e.outcome for e in third.earlier] == ["detects", None]  # the second was abandoned
    assert third.since == first.time
    assert [r["seq"] for r in third.records] == [0, 2, 3]


def test_the_same_plan_may_be_carried_out_again_and_counts_what_it_counted(book):
    book.open_confirm(plan(), name="one")
    second = book.open_confirm(plan(settings={"max_candidates": 3}), name="two")
    again = book.open_confirm(plan(), name="one")
    assert (again.reused, again.stamp, len(again.earlier)) == (0, None, 2)
    assert book.open_confirm(plan(settings={"max_candidates": 3}), name="two").reused == second.reused == 1


def test_another_dictionary_or_other_texts_are_no_reuse(book):
    book.open_confirm(plan(), name="one")
    assert book.open_confirm(plan(weights="w1"), name="one").reused == 0
    others = [type(e)(text=f"other {i}", role=e.role, group=e.group) for i, e in enumerate(EXAMPLES)]
    assert book.open_confirm(plan(others), name="one").reused == 0


def test_another_seed_or_a_few_other_texts_are_reuse_all_the_same(book):
    book.open_confirm(plan(), name="one")
    assert set(plan(seed=3).confirm_positives) & set(plan().confirm_positives)
    assert book.open_confirm(plan(seed=3), name="reseeded").reused == 1
    fewer = [e for e in EXAMPLES if e.digest != plan().confirm_positives[0]]
    assert book.open_confirm(plan(fewer), name="trimmed").reused == 2


def test_no_text_is_in_the_ledger(book):
    book.open_confirm(plan(), name="one")
    assert "secret" not in book.path.read_text()


@pytest.mark.parametrize("edit", ["changed", "removed", "cut", "swapped", "emptied", "deleted", "inserted", "head"])
def test_an_edited_ledger_is_refused_and_nothing_is_opened(book, edit):
    for name in ("one", "two", "three"):
        book.open_confirm(plan(), name=name)
    lines = book.path.read_text().splitlines(keepends=True)
    head = book.path.with_suffix(".head")
    if edit == "changed":
        book.path.write_text("".join(lines).replace('"name": "two"', '"name": "twx"'))
    elif edit == "removed":
        book.path.write_text(lines[0] + lines[2])
    elif edit == "cut":
        book.path.write_text(lines[0] + lines[1])
    elif edit == "swapped":
        book.path.write_text(lines[1] + lines[0] + lines[2])
    elif edit == "emptied":
        book.path.write_text("")
    elif edit == "deleted":
        book.path.unlink()
    elif edit == "inserted":
        book.path.write_text(lines[0] + json.dumps({"seq": 1}) + "\n" + "".join(lines[1:]))
    else:
        head.unlink()
    with pytest.raises(LedgerError, match=r"ledger.jsonl was edited: .*Restore it from a backup"):
        book.open_confirm(plan(), name="four")


def test_half_a_line_of_a_killed_writer_is_dropped(book):
    book.open_confirm(plan(), name="one")
    with book.path.open("a") as file:
        file.write('{"seq": 1, "prev": "ab')
    assert book.open_confirm(plan(), name="two").seq == 1
    assert [r["seq"] for r in book.records()] == [0, 1]


def test_a_record_that_the_head_does_not_know_yet_counts(book):
    book.open_confirm(plan(), name="one")
    head = book.path.with_suffix(".head")
    before = head.read_bytes()
    book.open_confirm(plan(), name="two")
    head.write_bytes(before)  # killed between the two files
    assert len(book.open_confirm(plan(), name="three").earlier) == 2


def test_a_ledger_that_cannot_be_written_opens_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="so nothing was opened: free the disk or the permission, or point"):
        Ledger(tmp_path / "file" / "ledger.jsonl").open_confirm(plan(), name="one")


def test_two_processes_open_one_after_the_other(book):
    processes = [opener(book.path, 5, "same") for _ in range(2)]
    seqs = [int(line) for p in processes for line in p.communicate(timeout=60)[0].split()]
    assert sorted(seqs) == list(range(10))
    assert len(book.open_confirm(plan(weights="same"), name="last").earlier) == 10


def test_a_writer_killed_at_any_moment_loses_no_opening_that_it_was_told_of(book):
    told = -1
    for round_ in range(3):
        process = opener(book.path, 1000, "same")
        time.sleep(0.05 + 0.03 * round_)
        process.send_signal(signal.SIGKILL)
        heard = process.communicate(timeout=60)[0].split("\n")[:-1]
        told = max([told, *(int(line) for line in heard)])
        records = book.records()
        assert len(records) > told
    assert len(book.open_confirm(plan(weights="same"), name="last").earlier) == len(records)
