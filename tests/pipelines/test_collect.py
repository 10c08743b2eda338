import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.collect import Harvester, hook_widths, open_store, prepare_store
from pipelines.config import RunConfig
from pipelines.documents import DOCUMENTS_FILE, SPANS_FILE, Documents, Spans
from pipelines.errors import RunError, UsageError
from pipelines.harvester import SHARDS_IN_FLIGHT
from pipelines.models import LanguageModel, resolve_model
from pipelines.progress import SilentReporter
from pipelines.rundir import RunDir
from storage import ActivationStore, ActivationWriter, SpecMismatchError
from tests.tiny import tiny_config, write_texts, write_tiny_model

HOOKS = ["model.layers.1", "model.layers.0:input"]


@pytest.fixture
def config(tiny_model, tiny_texts):
    """A store of few shards; keyword arguments change its `collect` section."""

    def make(**collect) -> RunConfig:
        raw = tiny_config(tiny_model, tiny_texts, hooks=HOOKS)
        raw["collect"] |= {"n_tokens": 3000} | collect
        return RunConfig.model_validate(raw)

    return make


def prepare(config, run, resolved):
    return prepare_store(config, run, resolved, SilentReporter())


def harvester(config, run, resolved):
    return Harvester(run.store_path, resolved, config.model, config.collect.batch_contexts, n_threads=1)


def test_stored_activations_are_those_of_the_model(store, resolved, collected):
    lm = LanguageModel(resolved, collected.config.model)
    for shard in (0, store.spec.n_shards - 1):
        start, stop = store.spec.shard_range(shard)
        stop = min(stop, start + collected.config.collect.batch_contexts)  # one batch: the same sums in the same order
        found = store.contexts(start, stop)
        tokens, position = torch.from_numpy(found.tokens).long(), torch.from_numpy(found.position).long()
        captured = lm.capture(tokens, position, HOOKS)
        for hook in HOOKS:
            torch.testing.assert_close(store.activations(hook, start, stop), captured[hook], rtol=0, atol=0)
            norms = captured[hook].float().norm(dim=-1).numpy()
            np.testing.assert_allclose(store.norms(hook, start, stop), norms, rtol=1e-5)


def test_store_carries_its_documents_and_spans(store):
    documents = Documents.from_parquet(store.sidecar(DOCUMENTS_FILE))
    spans = Spans.from_parquet(store.sidecar(SPANS_FILE))
    assert store.document.max() == len(documents) - 1
    assert spans.length.sum() == store.spec.n_tokens
    assert set(documents.topic) == {"rivers", "metals", "birds", "chess"}
    train, heldout = (set(np.unique(store.document[slice(*store.spec.split_range(s))])) for s in ("train", "heldout"))
    assert not train & heldout
    assert {documents.split[row] for row in heldout} == {"heldout"}


def test_harvesting_twice_gives_the_same_bytes(config, resolved, tmp_path):
    digests = []
    for name in ("a", "b"):
        run = RunDir(tmp_path / name)
        writer = prepare(config(), run, resolved)
        harvest = harvester(config(), run, resolved).harvest
        digests.append([harvest(shard).digests for shard in reversed(writer.missing())])
        writer.seal()
    assert digests[0] == digests[1]


def test_overlapped_harvest_gives_the_same_bytes_from_two_buffers(config, resolved, tmp_path):
    digests = {}
    for name in ("one by one", "overlapped"):
        run = RunDir(tmp_path / name)
        shards = prepare(config(contexts_per_shard=16), run, resolved).missing()
        harvest = harvester(config(), run, resolved)
        receipts = map(harvest.harvest, shards) if name == "one by one" else harvest.harvest_all(iter(shards))
        digests[name] = [(receipt.shard, receipt.digests) for receipt in receipts]
        assert len(shards) > SHARDS_IN_FLIGHT
        assert harvest._buffers.qsize() == SHARDS_IN_FLIGHT
        assert not ActivationWriter.open(run.store_path).missing()
    assert digests["one by one"] == digests["overlapped"]


def test_failed_write_reaches_the_caller_of_its_shard_and_gives_the_buffer_back(config, resolved, tmp_path):
    run = RunDir(tmp_path)
    prepare(config(), run, resolved)
    harvest = harvester(config(), run, resolved)
    staging = run.store_path / "staging"
    shutil.rmtree(staging)
    staging.touch()
    for _ in range(SHARDS_IN_FLIGHT + 1):  # a buffer that was not given back would be waited for without end
        with pytest.raises(OSError, match="staging"):
            harvest.harvest(1)
    assert harvest._writer.missing() == list(range(harvest._writer.spec.n_shards))
    staging.unlink()
    assert [receipt.written for receipt in harvest.harvest_all([1, 0])] == [True, True]


def test_batches_do_not_depend_on_other_shards(config, resolved, tmp_path):
    """A shard's bytes are those of its own contexts in batches of `batch_contexts`, the last one shorter."""
    chosen = config(contexts_per_shard=12, batch_contexts=5)
    run = RunDir(tmp_path)
    prepare(chosen, run, resolved)
    harvester(chosen, run, resolved).harvest(2)
    store, lm = ActivationStore.open(run.store_path, tail=True), LanguageModel(resolved, chosen.model)
    parts = []
    for low, high in ((24, 29), (29, 34), (34, 36)):
        found = store.contexts(low, high)
        parts.append(
            lm.capture(torch.from_numpy(found.tokens).long(), torch.from_numpy(found.position).long(), HOOKS)[HOOKS[0]]
        )
    torch.testing.assert_close(store.activations(HOOKS[0], 24, 36), torch.cat(parts), rtol=0, atol=0)


def test_commits_say_which_machine_made_them(collected):
    commit = json.loads(next((collected.dir.store_path / "commits").glob("*.json")).read_text())
    info = commit["payload"]["info"]
    assert info["device"].startswith("cpu ")
    assert {"torch", "transformers", "numpy"} <= set(info["versions"])
    assert {"host", "cpu"} <= set(info["machine"])
    assert info["time"].startswith("20")


@dataclass(frozen=True)
class Begun:
    """A store that was begun, and the folders that its config names, which a test may change and must restore."""

    raw: dict[str, Any]
    model: Path
    texts: Path
    run: RunDir

    def prepare(self, **sections: Any) -> ActivationWriter:
        config = RunConfig.model_validate(self.raw | sections)
        return prepare(config, self.run, resolve_model(config.model))

    def section(self, name: str, **values: Any) -> dict[str, Any]:
        return {name: self.raw[name] | values}


@pytest.fixture(scope="module")
def begun(tiny_model, tiny_texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    model = Path(shutil.copytree(tiny_model, folder / "model"))
    texts = Path(shutil.copy(tiny_texts, folder))
    raw = tiny_config(model, texts, hooks=HOOKS)
    raw["collect"] |= {"n_tokens": 3000}
    store = Begun(raw, model, texts, RunDir(folder / "run"))
    store.prepare()
    return store


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


FILES_THAT_CHANGE_THE_BYTES = {
    "weights": ("model", lambda folder: write_tiny_model(folder, seed=1)),
    "model settings": ("model", lambda folder: edit_json(folder / "config.json", lambda v: v.update(rms_norm_eps=0.1))),
    "tokenizer": ("model", lambda folder: edit_json(folder / "tokenizer.json", lambda v: v["model"]["merges"].pop())),
    "text": ("texts", lambda path: write_texts(path, seed=1)),
}
KEYS_THAT_CHANGE_THE_BYTES = {
    "dtype": lambda begun: begun.section("model", dtype="float32"),
    "seed": lambda begun: {"seed": 1},
    "hooks": lambda begun: {"hooks": HOOKS[:1]},
    "order of hooks": lambda begun: {"hooks": HOOKS[::-1]},
} | {
    name: lambda begun, name=name, value=value: begun.section("collect", **{name: value})
    for name, value in {
        "n_tokens": 2000,
        "context_length": 64,
        "contexts_per_shard": 24,
        "batch_contexts": 8,
        "heldout_fraction": 0.5,
        "isolate_documents": False,
        "prepend_bos": True,
    }.items()
}


@pytest.mark.parametrize("change", FILES_THAT_CHANGE_THE_BYTES)
def test_file_that_changes_the_bytes_is_refused(change, begun, tmp_path):
    name, edit = FILES_THAT_CHANGE_THE_BYTES[change]
    path = getattr(begun, name)
    kept = path.rename(tmp_path / "kept")
    try:
        shutil.copytree(kept, path) if kept.is_dir() else shutil.copy(kept, path)
        begun.prepare()
        edit(path)
        with pytest.raises(SpecMismatchError):
            begun.prepare()
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        kept.rename(path)


@pytest.mark.parametrize("change", KEYS_THAT_CHANGE_THE_BYTES)
def test_key_that_changes_the_bytes_is_refused(change, begun):
    with pytest.raises(SpecMismatchError):
        begun.prepare(**KEYS_THAT_CHANGE_THE_BYTES[change](begun))


@pytest.mark.parametrize(
    "change", [{"n_workers": 2}, {"cpus_per_worker": 2}, {"gpus_per_worker": 1}], ids=lambda change: next(iter(change))
)
def test_what_only_spreads_the_work_is_not_refused(change, begun):
    assert begun.prepare(**begun.section("collect", **change)).missing()


def test_unfinished_store_continues_and_another_config_is_refused(config, resolved, tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(RunError, match=r"there is no activation store at .*: run `sae collect` first"):
        open_store(config(), run)
    writer = prepare(config(), run, resolved)
    harvester(config(), run, resolved).harvest(1)
    with pytest.raises(RunError, match=r"the activation store is unfinished .*: run `sae collect` again, it continues"):
        open_store(config(), run)
    again = prepare(config(), run, resolved)
    assert again.missing() == [shard for shard in range(writer.spec.n_shards) if shard != 1]
    with pytest.raises(SpecMismatchError, match="heldout_fraction"):
        prepare(config(heldout_fraction=0.5), run, resolved)


@pytest.mark.parametrize("isolate", [True, False])
def test_documents_see_each_other_only_when_they_are_not_isolated(config, resolved, tmp_path, isolate):
    chosen = config(isolate_documents=isolate)
    run = RunDir(tmp_path)
    prepare(chosen, run, resolved)
    harvester(chosen, run, resolved).harvest(0)
    store = ActivationStore.open(run.store_path, tail=True)
    spans = Spans.from_parquet(store.sidecar(SPANS_FILE))
    later = np.flatnonzero((spans.context < store.spec.contexts_per_shard) & (spans.start > 8) & (spans.length > 8))[0]
    context, second = int(spans.context[later]), int(spans.start[later])
    stop = second + int(spans.length[later])
    tokens = torch.from_numpy(store.tokens[context, second:stop].astype(np.int64))[None]
    lm = LanguageModel(resolved, chosen.model)
    alone = lm.capture(tokens, torch.arange(tokens.shape[1])[None], HOOKS[:1])[HOOKS[0]][0].float()
    packed = store.activations(HOOKS[0], context, context + 1)[0, second:stop].float()
    close = torch.allclose(packed, alone, rtol=0.02, atol=0.02 * float(alone.abs().max()))
    assert close == isolate


def test_hook_widths_name_a_wrong_hook(config, resolved):
    assert hook_widths(config(), resolved) == dict.fromkeys(HOOKS, 32)
    wrong = config().model_copy(update={"hooks": ("model.layers.7",)})
    with pytest.raises(UsageError, match=r"Nearest: model\.layers\."):
        hook_widths(wrong, resolved)
