"""Dictionary + store → sparse latent activations of every counted token, the base of labels.

One piece per shard of the store, written whole and skipped on a rerun; sinks have no latents.
"""

import json
from pathlib import Path

import numpy as np
import torch

from pipelines.dictionaries import stored_input
from pipelines.progress import Reporter
from pipelines.rundir import RunDir
from sae import Dictionary
from storage import ActivationStore, LatentStore, LatentWriter

BLOCK_TOKENS = 4096
"""Tokens that are encoded at once, in whole contexts."""


def compute_latents(
    store: ActivationStore,
    dictionary: Dictionary,
    run: RunDir,
    name: str,
    ui: Reporter,
    *,
    sink_multiple: float,
    digest: str,
) -> LatentStore:
    """Encode the whole store; continues unfinished work.

    Args:
        digest: identity of the dictionary; latents of another one are refused.
    """
    spec = store.spec
    meta = {
        "d_sae": dictionary.d_sae,
        "n_shards": spec.n_shards,
        "n_rows": spec.n_tokens,
        "fingerprint": spec.fingerprint,
        "dictionary": digest,
        "sink_multiple": sink_multiple,
    }
    path = run.latents(name)
    writer = LatentWriter.create(path, meta)
    missing = writer.missing()
    hook = dictionary.required_hook_name
    done = sum(
        (stop - start) * spec.context_length
        for i in range(spec.n_shards)
        if i not in set(missing)
        for start, stop in [spec.shard_range(i)]
    )
    with ui.stage("latents", total=spec.n_tokens, unit="tokens", done=done) as bar:
        for shard in missing:
            start, stop = spec.shard_range(shard)
            if stop <= store.first_kept:  # deleted on purpose, after training on it
                writer.write_shard(shard, np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))
                bar.advance((stop - start) * spec.context_length)
                continue
            rows, latents, values = [], [], []
            step = max(1, BLOCK_TOKENS // spec.context_length)
            for low in range(start, stop, step):
                high = min(low + step, stop)
                x = stored_input(store, dictionary, low, high).flatten(0, 1)
                keep = torch.from_numpy(~store.sink_mask(hook, low, high, sink_multiple)).flatten().nonzero()[:, 0]
                with torch.inference_mode():
                    sparse = dictionary.encode_sparse(x[keep])
                rows.append(keep[sparse.row] + low * spec.context_length)
                latents.append(sparse.latent.to(torch.int32))
                values.append(sparse.value.float())
                bar.advance((high - low) * spec.context_length)
            writer.write_shard(shard, torch.cat(rows).numpy(), torch.cat(latents).numpy(), torch.cat(values).numpy())
    writer.seal()
    return LatentStore.open(path)


def dictionary_digest(folder: Path) -> str:
    """Identity of a dictionary's weights."""
    return str(json.loads((folder / "dictionary.json").read_text())["sha256"]["sae_weights.safetensors"])
