"""A cluster of three nodes on this machine, one of which goes down without a word while it collects."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import must, sae, shard_digests

from tests.tiny import tiny_config, write_texts

CLUSTER = Path(__file__).with_name("three_nodes.py")


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory):
    """A config, and the digests that its store must have."""
    folder = tmp_path_factory.mktemp("undisturbed")
    raw = tiny_config(tiny_model, write_texts(folder / "texts.jsonl", n=1600))
    raw["collect"] |= {"n_tokens": 60_000, "contexts_per_shard": 16, "batch_contexts": 1, "n_workers": 2}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    must(sae("collect", config, "--out", folder / "run"))
    return config, shard_digests(folder / "run/activations")


@pytest.mark.slow
@pytest.mark.parametrize("comes_back", [False, True], ids=["it stays away", "it comes back"])
def test_lost_node_changes_no_shard(comes_back, undisturbed, tmp_path):
    config, digests = undisturbed
    arguments = [str(config), str(tmp_path / "run"), *(["--comes-back"] if comes_back else [])]
    ended = subprocess.run([sys.executable, str(CLUSTER), *arguments], capture_output=True, text=True, timeout=380)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["harvester_on_lost_node"]
    assert 0 < told["shards_at_loss"] < told["shards"], "the node was lost too late to show anything"
    assert shard_digests(tmp_path / "run/activations") == digests
    assert [path.name for path in (tmp_path / "run/activations/staging").iterdir()] == [".keep"]
