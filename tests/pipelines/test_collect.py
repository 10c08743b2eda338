import numpy as np
import pytest
import torch

from pipelines.collect import Harvester, hook_widths, open_store, prepare_store
from pipelines.config import RunConfig
from pipelines.documents import DOCUMENTS_FILE, SPANS_FILE, Documents, Spans
from pipelines.errors import RunError, UsageError
from pipelines.models import LanguageModel
from pipelines.progress import SilentReporter
from pipelines.rundir import RunDir
from storage import ActivationStore, SpecMismatchError
from tests.tiny import tiny_config

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
