import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from chats import CHATML
from dictionaries import random_dictionary
from pydantic import ValidationError

from pipelines.audit.run import audit
from pipelines.chat import ROLES
from pipelines.collect import Harvester, open_store, prepare_store
from pipelines.config import RunConfig
from pipelines.documents import documents_of
from pipelines.encode import Reader, pool_documents
from pipelines.errors import RunError, UsageError
from pipelines.evaluate import evaluate
from pipelines.evaluation import evaluate_reconstruction, evaluate_splice
from pipelines.labels.run import label
from pipelines.labels.stage import read_token_table
from pipelines.progress import SilentReporter
from pipelines.rundir import RunDir
from pipelines.selection import kept, selected
from pipelines.train import make_job, train
from pipelines.train_worker import train_worker
from pipelines.training.calibration import calibration_batches
from sae.metrics import FVU
from storage import ShuffledReader
from tests.tiny import COMMON, TOPICS, tiny_config

HOOK = "model.layers.1"
BAR = SimpleNamespace(advance=lambda n: None)
ASSISTANT = {"role": [ROLES["assistant"]]}


@pytest.fixture(scope="module")
def config(tiny_model, tiny_texts, tmp_path_factory):
    """Plain texts and chats, two thirds of the tokens from chats."""
    folder, rng = tmp_path_factory.mktemp("chats"), np.random.default_rng(0)
    words = COMMON + TOPICS["birds"]
    (folder / "template.jinja").write_text(CHATML)
    with (folder / "chats.jsonl").open("w") as file:
        for i in range(150):
            chat = [
                {"role": role, "content": " ".join(rng.choice(words) for _ in range(rng.integers(4, 14)))}
                for role in ("user", "assistant") * int(rng.integers(1, 3))
            ]
            file.write(json.dumps({"id": str(i), "messages": chat, "licence": f"L{i % 3}"}) + "\n")
    raw = tiny_config(
        tiny_model,
        tiny_texts,
        text=[
            {"path": str(tiny_texts), "topic_field": "topic", "id": "plain"},
            {
                **{"path": str(folder / "chats.jsonl"), "messages_field": "messages", "id": "chats"},
                **{"columns": ["licence"], "weight": 2},
            },
        ],
    )
    raw["collect"] |= {"n_tokens": 6000, "chat_template_path": str(folder / "template.jinja")}
    return raw


def run_config(raw, **select):
    """The config with a `select` in each of the given stages."""
    stages = {stage: {**raw.get(stage, {}), "select": value} for stage, value in select.items()}
    return RunConfig.model_validate(raw | stages)


@pytest.fixture(scope="module")
def run(config, resolved, tmp_path_factory):
    chosen, run = run_config(config), RunDir(tmp_path_factory.mktemp("run"))
    writer = prepare_store(chosen, run, resolved, SilentReporter())
    harvester = Harvester(run.store_path, resolved, chosen.model, chosen.collect.batch_contexts, n_threads=1)
    for shard in writer.missing():
        harvester.harvest(shard)
    writer.seal()
    return run


@pytest.fixture(scope="module")
def chat_store(config, run):
    return open_store(run_config(config), run)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "codes"),
    [
        (None, {}),
        ({}, {}),
        ({"role": ["assistant", "text"]}, {"role": [0, 3]}),
        ({"role": "user", "turn": [0, 2]}, {"role": [2], "turn": [0, 2]}),
        ({"source": ["chats"]}, {"source": [1]}),
        ({"source": 0}, {"source": [0]}),
        ({"source": [1, "plain"]}, {"source": [0, 1]}),
    ],
)
def test_names_become_codes(config, select, codes):
    assert run_config(config, evaluate=select).selection("evaluate") == codes
    assert run_config(config, evaluate=select).selection("label") == {}


def test_source_may_be_named_by_its_path(config):
    path = config["text"][0]["path"]
    assert run_config(config, audit={"source": [path]}).selection("audit") == {"source": [0]}


@pytest.mark.parametrize("stage", ["train", "evaluate", "label", "audit"])
@pytest.mark.parametrize(
    ("select", "reason"),
    [
        ({"role": ["assistent"]}, "there is no role 'assistent'; the nearest is 'assistant'"),
        ({"source": ["chat"]}, "there is no source 'chat'; the nearest is 'chats'"),
        ({"source": [2]}, "source 2 must be a position in the list of 2 text sources"),
        ({"turn": [-1]}, "turn counts messages from 0, got -1"),
        ({"role": []}, "role is empty, which selects nothing: name at least one, or drop it"),
    ],
)
def test_what_selects_nothing_is_refused_with_its_stage(config, stage, select, reason):
    with pytest.raises(ValidationError, match=rf"{stage}\.select: {reason}"):
        run_config(config, **{stage: select})


# -- stages ------------------------------------------------------------------------------------------------------------


def test_store_keeps_roles_turns_sources_and_columns(chat_store):
    documents, n = documents_of(chat_store), chat_store.spec.n_contexts
    role, source = chat_store.table("role", 0, n), chat_store.table("source", 0, n)
    assert set(role[source == 0].tolist()) == {ROLES["text"]}
    assert set(role[source == 1].tolist()) == {ROLES["user"], ROLES["assistant"], ROLES["template"]}
    assert set(chat_store.table("turn", 0, n)[role == ROLES["assistant"]].tolist()) == {1, 3}
    rows = np.flatnonzero(source.reshape(-1) == 1)[:50]
    assert set(documents.values_at(chat_store, rows, "licence")) <= {"L0", "L1", "L2"}
    plain = np.flatnonzero(source.reshape(-1) == 0)[:5]
    assert documents.values_at(chat_store, plain, "licence") == [None] * 5


def test_kept_tokens_are_selected_and_no_sinks(chat_store):
    sinks = chat_store.sink_mask(HOOK, 2, 9, 1.5)
    chosen = chat_store.table("role", 2, 9) == ROLES["assistant"]
    assert (kept(chat_store, HOOK, 2, 9, 1.5, ASSISTANT) == (chosen & ~sinks)).all()
    assert (kept(chat_store, HOOK, 2, 9, 1.5) == ~sinks).all()
    assert selected(chat_store, 2, 9).all()


def test_reconstruction_figures_are_over_selected_tokens(chat_store):
    dictionary = random_dictionary(HOOK)
    found = evaluate_reconstruction(chat_store, dictionary, sink_multiple=1.5, bar=BAR, selection=ASSISTANT)
    start, stop = chat_store.spec.split_range("heldout")
    x = chat_store.activations(HOOK, start, stop).float()
    for name, mask in (
        ("fvu", kept(chat_store, HOOK, start, stop, 1.5, ASSISTANT)),
        ("fvu_all", selected(chat_store, start, stop, ASSISTANT)),
    ):
        fvu, rows = FVU(dictionary.d_in), x[torch.from_numpy(mask)]
        fvu.update(rows, dictionary.decode(dictionary.encode(rows)))
        assert found[name] == pytest.approx(fvu.compute(), rel=1e-5)
        assert found["n_heldout_tokens" if name == "fvu" else "n_heldout_tokens_all"] == mask.sum() > 0
    with pytest.raises(RunError, match=r"no held-out token to count: correct evaluate\.select"):
        evaluate_reconstruction(chat_store, dictionary, sink_multiple=1.5, bar=BAR, selection={"turn": [99]})


def test_predictions_count_where_they_are_made(chat_store, lm, config):
    settings = run_config(config).evaluate
    found = evaluate_splice(
        lm, chat_store, random_dictionary(HOOK), settings, sink_multiple=1.5, bar=BAR, selection=ASSISTANT
    )
    start, _ = chat_store.spec.split_range("heldout")
    stop = start + settings.n_ce_tokens // chat_store.spec.context_length
    inside = chat_store.contexts(start, stop).position[:, 1:] > 0
    chosen = selected(chat_store, start, stop, ASSISTANT)[:, :-1]
    assert found["n_predictions_all"] == (chosen & inside).sum()
    assert found["n_predictions"] == (kept(chat_store, HOOK, start, stop, 1.5, ASSISTANT)[:, :-1] & inside).sum()


def test_pools_and_labels_see_selected_tokens(chat_store):
    rows, pooled = pool_documents(
        chat_store, Reader(random_dictionary(HOOK)), split="heldout", sink_multiple=1.5, selection=ASSISTANT
    )
    start, stop = chat_store.spec.split_range("heldout")
    mask = kept(chat_store, HOOK, start, stop, 1.5, ASSISTANT)
    counts = np.bincount(chat_store.document[start:stop][mask])
    assert pooled.n_tokens.tolist() == counts[rows].tolist()
    assert counts.sum() == pooled.n_tokens.sum()
    table = read_token_table(chat_store, HOOK, 1.5, selection=ASSISTANT, contexts_at_once=7)
    everything = kept(chat_store, HOOK, 0, chat_store.spec.n_contexts, 1.5, ASSISTANT)
    assert (table.usable == everything.reshape(-1)).all()


@pytest.fixture
def with_dictionary(run, chat_store, tmp_path):
    """A fresh run on the store, with a random dictionary in the place of a trained one, and its config."""
    fresh = RunDir(tmp_path / "run")
    random_dictionary(HOOK).save(fresh.trained("main"))

    def make(config, **select):
        chosen = run_config(config, **select)
        collect = chosen.collect.model_copy(update={"store": str(run.store_path)})
        return chosen.model_copy(update={"collect": collect})

    return fresh, make


def test_evaluate_stage_takes_its_selection_from_the_config(config, with_dictionary, chat_store):
    run, make = with_dictionary
    figures = evaluate(make(config, evaluate={"role": "assistant"}), run, SilentReporter())["main"]
    start, stop = chat_store.spec.split_range("heldout")
    assert figures["n_heldout_tokens_all"] == selected(chat_store, start, stop, ASSISTANT).sum()


def test_label_stage_takes_its_selection_from_the_config(config, with_dictionary):
    run, make = with_dictionary
    firings = []
    for stage in ({}, {"label": {"role": "assistant"}}):
        label(make(config, **stage), run, SilentReporter())
        table = pq.read_table(run.labels("main") / "features.parquet")
        firings.append(sum(table["n_train_active"].to_pylist()))
    assert 0 < firings[1] < firings[0] / 2


def test_audit_stage_takes_its_selection_from_the_config(config, with_dictionary, tmp_path):
    run, make = with_dictionary
    (tmp_path / "birds.yaml").write_text("{name: birds, topic: {positive: birds}}")
    raw = config | {"audit": {"concepts": [str(tmp_path / "birds.yaml")]}}
    with pytest.raises(UsageError, match=r"audit\.select leaves no document of the held-out corpus: correct it"):
        audit(make(raw, audit={"turn": [99]}), run, SilentReporter())
    with pytest.raises(UsageError, match="birds"):  # no chat has a topic
        audit(make(raw, audit={"source": "chats"}), run, SilentReporter())


def test_selection_with_less_than_a_batch_is_refused_before_training(config, with_dictionary):
    run, make = with_dictionary
    run = RunDir(run.path / "empty")
    with pytest.raises(
        UsageError, match=r"train\.select leaves 0 of [0-9,]+ training tokens, too few for one batch of 256"
    ):
        train(make(config, train={"turn": 99}), run, SilentReporter())


def test_training_reads_selected_tokens_alone(config, run, chat_store, tmp_path, monkeypatch):
    short = {**config["train"], "n_tokens": 512, "batch_size": 128, "checkpoint_every": 2}
    chosen = run_config(config | {"train": short}, train={"role": "assistant", "source": "chats"})
    chosen = chosen.model_copy(update={"collect": chosen.collect.model_copy(update={"store": str(run.store_path)})})
    job = make_job(chosen, RunDir(tmp_path / "run"), "main", chat_store)
    assert job.selection == {"role": [ROLES["assistant"]], "source": [1]}
    start, stop = chat_store.spec.split_range("train")
    mask = kept(chat_store, HOOK, start, stop, chosen.sinks.multiple, ASSISTANT)
    expected = chat_store.activations(HOOK, start, stop).float()[torch.from_numpy(mask)]
    parts = calibration_batches(chat_store, (HOOK,), job.sinks, job.selection, 10**6)
    assert torch.equal(torch.cat([x for (x,) in parts]), expected)
    reader = ShuffledReader(chat_store, HOOK, batch_size=128, seed=0, select=job.selection)
    assert reader.n_rows == kept(chat_store, HOOK, start, stop, 3.0, ASSISTANT).sum()

    class Asked(Exception):
        """Ends the training where it asks for its reader."""

    def ask(*_, select, **__):
        raise Asked(select)

    monkeypatch.setattr("pipelines.training.batches.ShuffledReader", ask)
    with pytest.raises(Asked) as asked:
        train_worker(job)
    assert asked.value.args == (job.selection,)
