"""A driver that takes shards of a store from a `ShardQueue` and prints each when it is done.

python leasing_driver.py STORE PAUSE_S
"""

import sys
import time

import example_store

from storage import ActivationWriter


def main(url: str, pause_s: float) -> None:
    writer = ActivationWriter.open(url)
    values = example_store.activations(writer.spec)
    with writer.queue() as queue:
        while queue.open():
            shard = queue.take()
            if shard is None:
                time.sleep(0.02)
                continue
            print("taken", shard, flush=True)
            time.sleep(pause_s)
            start, stop = writer.spec.shard_range(shard)
            receipt = writer.write_shard(shard, {hook: array[start:stop] for hook, array in values.items()})
            queue.done(shard)
            print("written" if receipt.written else "found", shard, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
