import re

import pytest
import torch

from pipelines.collect import Harvester, prepare_store
from pipelines.config import RunConfig
from pipelines.info import describe
from pipelines.models import LanguageModel
from pipelines.progress import SilentReporter
from pipelines.rundir import RunDir
from storage import ActivationStore, verify
from tests.tiny import tiny_config

HOOK = "model.layers.1"


@pytest.mark.parametrize(
    ("settings", "read", "facts"),
    [
        ({"stored_dtype": "int8", "compression": "blosc"}, torch.bfloat16, "as int8 and blosc, .* squared error"),
        ({"stored_dtype": "float32", "compression": "blosc"}, torch.float32, "as blosc, .* times smaller, median"),
        ({"stored_dtype": "float16"}, torch.float16, "float16, median norm .* sinks at 3 median norms$"),
    ],
)
def test_activations_are_stored_as_the_config_says(tiny_model, tiny_texts, resolved, tmp_path, settings, read, facts):
    raw = tiny_config(tiny_model, tiny_texts, hooks=[HOOK])
    raw["model"]["dtype"] = "bfloat16"
    raw["collect"] |= {"n_tokens": 1500} | settings
    config, run = RunConfig.model_validate(raw), RunDir(tmp_path)
    writer = prepare_store(config, run, resolved, SilentReporter())
    harvester = Harvester(run.store_path, resolved, config.model, config.collect.batch_contexts, n_threads=1)
    for shard in writer.missing():
        harvester.harvest(shard)
    writer.seal()
    assert verify(run.store_path) == []
    store = ActivationStore.open(run.store_path)
    batch = config.collect.batch_contexts
    found = store.contexts(0, batch)
    given = LanguageModel(resolved, config.model).capture(
        torch.from_numpy(found.tokens).long(), torch.from_numpy(found.position).long(), [HOOK]
    )[HOOK]
    stored = store.activations(HOOK, 0, batch)
    assert stored.dtype == read
    if settings["stored_dtype"] == "int8":
        largest = given.float().abs().amax(dim=-1, keepdim=True)
        assert ((stored.float() - given.float()).abs() <= largest * (1 / 254 + 2**-8)).all()
    else:
        assert torch.equal(stored, given.to(read))
    assert re.search(facts, describe(run.store_path)[HOOK])
