"""LLM labels as part of the label stage, on a real store, against real servers."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.parquet as pq
import pytest
from llm_runs import gather_labels, truth_server, with_llm

from pipelines.config import RunConfig
from pipelines.errors import RunError, UsageError
from pipelines.labels.external.shelf import Shelf, read_labels_of
from pipelines.labels.importing import import_labels
from pipelines.labels.run import label
from pipelines.progress import SilentReporter
from pipelines.run import Run, save_config, validate
from pipelines.rundir import RunDir
from tests.hostile_server import HostileServer

KEY = "sk-very-secret"


@contextmanager
def serving(behave) -> Iterator[HostileServer]:
    server = HostileServer(behave)
    yield server
    server.close()


@pytest.fixture(scope="module")
def labelled(trained: Run, tmp_path_factory) -> Run:
    """A run with rules, their tests, and latents; not to be changed."""
    fresh = Run(trained.config, RunDir(tmp_path_factory.mktemp("labelled") / "run"))
    shutil.copytree(trained.dir.checkpoints("main"), fresh.dir.checkpoints("main"))
    label(fresh.config, fresh.dir, SilentReporter())
    return fresh


def rows_of(run: Run) -> list[dict]:
    return pq.read_table(run.dir.labels("main") / "labels.parquet").to_pylist()


def test_without_llm_the_table_has_the_rules(labelled):
    rows = rows_of(labelled)
    assert [row["latent"] for row in rows] == list(range(96))
    assert {row["source"] for row in rows} == {"predicate"}


def made_by(run: Run, source: str = "llm:m") -> list[dict]:
    return [row for row in rows_of(run) if row["source"] == source]


def test_llm_labels_stand_beside_the_rules(labelled, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    with serving(lambda *_: "obey") as server:
        run = with_llm(labelled, tmp_path / "run", server.base_url, endpoint={"api_key_env": "TEST_KEY", "price_in": 2})
        figures = gather_labels(run)
    made, rules = made_by(run), made_by(run, "predicate")
    assert rules == rows_of(labelled)
    assert len(made) == 6
    for row in made:
        assert row["label"].startswith("label for ")
        assert (row["status"], row["judge"], row["author"]) == ("tested", "llm:m", "m")
        assert 0 < row["n_positive"] <= 20
        assert row["n_mismatch"] == 4
        assert row["tpr_low"] <= row["tpr"] <= row["tpr_high"]
        assert row["detection_random_low"] <= row["detection_random"] <= row["detection_random_high"]
        assert row["fuzz"] is not None
    assert figures["label_llm_calls"] == len(server.seen) == figures["label_llm_spent_calls"]
    assert figures["label_llm_money"] == pytest.approx(len(server.seen) * 100 * 2 / 1e6)
    assert run.dir.metrics()["main.label_llm_n_tested"] == 6
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    texts = [path for path in run.dir.path.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl", ".yaml")]
    assert len(texts) > 5
    assert all(KEY.encode() not in path.read_bytes() for path in run.dir.path.rglob("*") if path.is_file())


def test_explainer_sees_train_text_and_judge_heldout_text(labelled, tmp_path):
    with serving(lambda *_: "obey") as server:
        run = with_llm(labelled, tmp_path / "run", server.base_url)
        gather_labels(run)
    documents = pq.read_table(run.config.collect.store + "/documents.parquet").to_pylist()
    texts = {split: " ".join(d["text"] for d in documents if d["split"] == split) for split in ("train", "heldout")}
    n_seen = {"train": 0, "heldout": 0}
    for body in server.seen:
        system, user = (message["content"] for message in body["messages"])
        split, other = ("train", "heldout") if '"label"' in system else ("heldout", "train")
        for passage in json.loads(user)["passages"]:
            plain = "".join(c for c in passage if c not in "⟦⟧").strip()
            if len(plain) > 60:
                assert plain in texts[split]
                assert plain not in texts[other]
                n_seen[split] += 1
    assert min(n_seen.values()) > 20


def test_budget_that_runs_out_loses_nothing_and_is_resumed(labelled, tmp_path):
    with serving(lambda *_: "obey") as server:
        whole = with_llm(labelled, tmp_path / "whole", server.base_url)
        gather_labels(whole)
        n_all = len(server.seen)
        server.seen.clear()
        run = with_llm(labelled, tmp_path / "run", server.base_url, budget={"calls": n_all // 2})
        figures = gather_labels(run)
        half = [json.dumps(body) for body in server.seen]
        assert len(half) == n_all // 2 == figures["label_llm_spent_calls"]
        waiting = [row for row in made_by(run) if row["status"] == "waiting"]
        assert figures["label_llm_n_waiting"] == len(waiting) > 0
        assert all(row["passed"] is None and row["tpr"] is None for row in waiting)
        assert figures["label_llm_n_tested"] + len(waiting) == 6

        again = gather_labels(Run(whole.config, run.dir))
        asked = [json.dumps(body) for body in server.seen]
        assert len(asked) == len(set(asked)) == n_all  # nothing twice
        assert again["label_llm_spent_calls"] == n_all
        assert again["label_llm_n_waiting"] == 0
    assert without_dates(made_by(run)) == without_dates(made_by(whole))


def without_dates(rows: list[dict]) -> list[dict]:
    return [{**row, "date": None} for row in rows]


def test_failures_count_as_wrong_in_every_score(labelled, tmp_path):
    def behave(body, number):
        if '"label"' in body["messages"][0]["content"]:
            return ("say", "no idea") if number % 2 else "obey"
        return "say", '{"answers": [1, 1, 1]}'

    with serving(behave) as server:
        run = with_llm(labelled, tmp_path / "run", server.base_url, endpoint={"concurrency": 1}, windows_per_call=2)
        figures = gather_labels(run)
    made = made_by(run)
    failed, judged = ([row for row in made if row["status"] == status] for status in ("failed", "tested"))
    assert failed
    assert judged
    for row in made:
        assert (row["tpr"], row["detection_random"], row["fuzz"], row["passed"]) == (0, 0, 0, False)
        assert row["n_failed"] == row["n_positive"] + row["n_negative"]
        assert row["mismatch_rank"] == row["n_mismatch"] + 1
    assert all(row["label"] is None and json.loads(row["failures"]) == {"explain: rubbish": 1} for row in failed)
    assert all(json.loads(row["failures"])["detect: wrong_count"] > 5 for row in judged)
    assert figures["label_llm_share_passed"] == 0
    assert figures["label_llm_n_failed"] == len(failed)


def test_label_that_is_declined_is_abstained_and_not_judged(labelled, tmp_path):
    with serving(lambda *_: ("say", '{"found": false, "label": ""}')) as server:
        run = with_llm(labelled, tmp_path / "run", server.base_url)
        figures = gather_labels(run)
        assert len(server.seen) == 6
    assert {row["status"] for row in made_by(run)} == {"abstained"}
    assert figures["label_llm_share_passed"] is None


def test_endpoint_that_goes_down_leaves_what_was_done(labelled, tmp_path):
    with serving(lambda _, number: "obey" if number < 17 else ("status", 503)) as server:
        run = with_llm(labelled, tmp_path / "run", server.base_url, give_up_after=3, endpoint={"concurrency": 1})
        with pytest.raises(RunError, match=r"3 questions in a row.*rerun to continue"):
            gather_labels(run)
    made = made_by(run)
    print([(r["latent"], r["status"], r["failures"], r["label"]) for r in made])
    assert {row["status"] for row in made} == {"tested", "waiting"}
    metrics = run.dir.metrics()
    assert metrics["main.label_llm_spent_calls"] == 17
    with serving(lambda *_: "obey") as server:
        again = with_llm(labelled, tmp_path / "unused", server.base_url)
        assert gather_labels(Run(again.config, run.dir))["label_llm_n_tested"] == 6
        assert {row["status"] for row in made_by(run)} == {"tested"}


def test_missing_key_is_told_before_anything_runs(labelled, tmp_path):
    run = with_llm(labelled, tmp_path / "run", "http://127.0.0.1:9/v1", endpoint={"api_key_env": "NO_SUCH_KEY"})
    with pytest.raises(UsageError, match="NO_SUCH_KEY is not set: export it"):
        validate(run, ["label"])


def test_stage_asks_after_the_rules_and_fails_with_the_endpoint(labelled, tmp_path):
    with serving(lambda _, number: "obey" if number < 20 else ("status", 503)) as server:
        run = with_llm(labelled, tmp_path / "run", server.base_url, give_up_after=1, endpoint={"concurrency": 1})
        with pytest.raises(RunError, match="rerun to continue"):
            label(run.config, run.dir, SilentReporter())
    metrics, before = run.dir.metrics(), labelled.dir.metrics()
    assert metrics["main.label_llm_spent_calls"] == 20
    assert metrics["main.label_share_labelled"] == before["main.label_share_labelled"]


def test_where_and_how_fast_is_no_reason_to_label_again(labelled, tmp_path):
    run = with_llm(labelled, tmp_path / "a", "http://127.0.0.1:9/v1")
    moved = with_llm(labelled, tmp_path / "b", "http://127.0.0.1:10/v1", n_workers=2, endpoint={"concurrency": 9})
    other = with_llm(labelled, tmp_path / "c", "http://127.0.0.1:9/v1", endpoint={"model": "another"})
    assert run.keys["label"] == moved.keys["label"] != other.keys["label"]


# ---- labels of other people ------------------------------------------------------------------------------------------


def shelve(run: Run, tmp_path, labels: dict[int, str], source: str = "human:Ada", **options) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("latent,label\n" + "".join(f"{latent},{label}\n" for latent, label in labels.items()))
    found, _ = read_labels_of(file, source, date="2026-05-31")
    Shelf(run.dir.imports("main")).put(found, 96, **options)


def rare(run: Run, n: int) -> list[int]:
    """Latents that fire some twenty times on held-out documents: windows without a firing exist."""
    features = pq.read_table(run.dir.labels("main") / "features.parquet").to_pylist()
    by = sorted(features, key=lambda row: abs(row["n_heldout_active"] - 20))
    return sorted(row["latent"] for row in by[:n])


def test_true_label_with_a_judge_that_knows_passes_every_test(labelled, tmp_path):
    chosen = rare(labelled, 8)
    run = with_llm(labelled, tmp_path / "run", "http://127.0.0.1:9/v1", prefer=["human", "predicate"])
    server = truth_server(run, chosen)
    llm = {"judge": {"base_url": server.base_url, "model": "judge"}, "others": 4, "neighbours": 2}
    data = run.config.model_dump(mode="json")
    run = Run(RunConfig.model_validate(data | {"label": data["label"] | {"llm": llm}}), run.dir)
    shelve(run, tmp_path, {latent: f"unit {latent}" for latent in chosen})
    figures = gather_labels(run)
    server.close()
    rows = made_by(run, "human:Ada")
    assert [row["latent"] for row in rows] == chosen
    for row in rows:
        assert (row["judge"], row["author"], row["date"]) == ("llm:judge", "Ada", "2026-05-31")
        assert (row["tpr"], row["detection_random"], row["fuzz"]) == (1, 1, 1)
        assert row["n_failed"] == row["n_fuzz_failed"] == row["n_mismatch_failed"] == 0
    assert figures["label_human_Ada_n_tested"] == 8
    passed = {row["latent"] for row in rows if row["passed"]}
    assert passed
    features = pq.read_table(run.dir.labels("main") / "features.parquet").to_pylist()
    before = pq.read_table(labelled.dir.labels("main") / "features.parquet").to_pylist()
    for row, old in zip(features, before, strict=True):
        if row["latent"] in passed:
            assert (row["label"], row["label_source"]) == (f"unit {row['latent']}", "human:Ada")
            assert (row["label_kind"], row["labelled"]) == ("human", True)
        else:
            assert row == old
    back = Run(labelled.config, run.dir)
    gather_labels(back)
    assert pq.read_table(run.dir.labels("main") / "features.parquet").to_pylist() == before


def test_labels_of_others_are_judged_by_words_without_an_endpoint_and_outlive_every_rerun(labelled, tmp_path):
    run = Run(labelled.config, RunDir(shutil.copytree(labelled.dir.path, tmp_path / "run")))
    shelve(run, tmp_path, {3: "rivers", 5: "the words of the text"})
    gather_labels(run, only=frozenset({"human:Ada"}))
    rows = rows_of(run)
    assert [row for row in rows if row["source"] == "predicate"] == rows_of(labelled)
    rivers, nothing = (row for row in rows if row["source"] == "human:Ada")
    assert rivers["judge"] == nothing["judge"] == "lexical"
    assert (rivers["n_failed"], nothing["n_failed"]) == (0, nothing["n_positive"] + nothing["n_negative"])
    assert json.loads(rivers["provenance"])["file"] == "labels.csv"

    shelve(run, tmp_path, {3: "streams"}, source="csv:mine")
    off = RunConfig.model_validate(run.config.model_dump(mode="json") | {"label": {"enabled": False}})
    label(off, run.dir, SilentReporter())
    assert not run.dir.labels("main").exists()
    label(run.config, run.dir, SilentReporter())
    again = rows_of(run)
    assert [row for row in again if row["source"] == "human:Ada"] == [rivers, nothing]
    assert [row["label"] for row in again if row["source"] == "csv:mine"] == ["streams"]
    assert len(again) == 96 + 3


def test_import_tests_at_once_and_writes_the_dictionary_anew(labelled, tmp_path):
    run = Run(labelled.config, RunDir(shutil.copytree(labelled.dir.path, tmp_path / "run")))
    save_config(run)
    run.dir.mark_finished("label", run.keys["label"], 1.0)
    run.dir.dictionary("main").mkdir(parents=True)
    file = tmp_path / "ada.yaml"
    file.write_text("author: Ada\ndate: 2026-05-31\nlabels:\n  3: rivers\n  5: metals\n")
    assert import_labels(run.dir.path, file, "human", SilentReporter())["n_new"] == 2
    exported = pq.read_table(run.dir.dictionary("main") / "labels.parquet").to_pylist()
    assert [(row["latent"], row["status"]) for row in exported if row["source"] == "human:Ada"] == [
        (3, "tested"),
        (5, "tested"),
    ]
    assert run.dir.metrics()["main.label_human_Ada_n_tested"] == 2
    again = import_labels(run.dir.dictionary("main"), file, "human", SilentReporter())
    assert (again["n_new"], again["n_known"]) == (0, 2)
    assert pq.read_table(run.dir.dictionary("main") / "labels.parquet").to_pylist() == exported


def test_explainer_and_judge_may_be_different_endpoints(labelled, tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_A", "aaa")
    monkeypatch.setenv("KEY_B", "bbb")
    with serving(lambda *_: "obey") as explainer, serving(lambda *_: "obey") as judge:
        run = with_llm(
            labelled,
            tmp_path / "run",
            explainer.base_url,
            endpoint={"api_key_env": "KEY_A"},
            judge={"base_url": judge.base_url, "model": "j", "api_key_env": "KEY_B"},
        )
        gather_labels(run)
        assert len(explainer.seen) == 6
        assert len(judge.seen) > 30
        assert {headers["Authorization"] for headers in explainer.headers} == {"Bearer aaa"}
        assert {headers["Authorization"] for headers in judge.headers} == {"Bearer bbb"}
    assert {row["judge"] for row in made_by(run)} == {"llm:j"}
