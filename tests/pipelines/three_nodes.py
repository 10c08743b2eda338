"""Run by `test_nodes`: `sae collect CONFIG --out OUT` on a head and two worker nodes, of which one is killed.

Prints one JSON object. A process of its own, because Ray can be imported only once with one set of settings.
"""

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
os.environ |= {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "three-nodes-" + "0" * 32,
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": str(ROOT),
}

import psutil  # noqa: E402
from command_line import Driver, events  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


def harvesters_below(raylet_pid: int) -> list[psutil.Process]:
    """The actor processes of one node."""
    return [p for p in psutil.Process(raylet_pid).children(recursive=True) if "ray::Harvester" in " ".join(p.cmdline())]


def main() -> None:
    """Kill a node once some shards are done; bring a new one when asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--comes-back", action="store_true")
    asked = parser.parse_args()

    def n_shards() -> int:
        return sum(line["event"] == "shard" for line in events(asked.out))

    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": health, **SMALL})
    try:
        _, lost = cluster.add_node(num_cpus=1, **SMALL), cluster.add_node(num_cpus=1, **SMALL)
        cluster.wait_for_nodes()
        driver = Driver(
            *("collect", asked.config, "--out", asked.out, "--set", f"ray.address={cluster.address}"),
            log=asked.out.with_suffix(".log"),
        )
        (raylet,) = (p.process.pid for p in lost.all_processes["raylet"])
        driver.wait_until(lambda: n_shards() >= 8 and bool(harvesters_below(raylet)))
        on_lost, at_loss = len(harvesters_below(raylet)), n_shards()
        cluster.remove_node(lost, allow_graceful=False)
        if asked.comes_back:
            driver.wait_until(lambda: n_shards() >= at_loss + 4)
            cluster.add_node(num_cpus=1, **SMALL)
        driver.finish()
        print(json.dumps({"harvester_on_lost_node": on_lost, "shards_at_loss": at_loss, "shards": n_shards()}))
    finally:
        cluster.shutdown()


main()
