"""A peer's TopK SAE trained on the batches of `train_quality`; run by it in the peers' environment.

    python quality_peers.py PEER LR FOLDER THREADS

Each peer gets the normalisation that it offers itself and, where it has the setting, a warm-up of 5 % and a decay over
the last 30 % of the steps, as ours has; its defaults are made for runs of many thousand steps.
"""

import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import serve
from tests.benchmarks.quality_data import BATCH, D_SAE, N_STEPS, K, Reconstruct, measure, rows

WARM_UP, DECAY = round(0.05 * N_STEPS), round(0.3 * N_STEPS)


def saelens(d_in: int, lr: float, folder: Path) -> Reconstruct:
    """SAETrainer.fit with `normalize_activations: expected_average_only_in`."""
    from itertools import chain

    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = TopKTrainingSAEConfig(
        d_in=d_in, d_sae=D_SAE, k=K, normalize_activations="expected_average_only_in", apply_b_dec_to_input=True
    )
    sae: Any = TopKTrainingSAE(config)
    n_norm = 20
    settings = SAETrainerConfig(
        total_training_samples=N_STEPS * BATCH,
        train_batch_size_samples=BATCH,
        lr=lr,
        lr_end=lr / 10,
        lr_warm_up_steps=WARM_UP,
        lr_decay_steps=DECAY,
        n_batches_for_norm_estimate=n_norm,
        logger=LoggingConfig(log_to_wandb=False),
    )
    first = [x for x, _ in zip(rows(folder / "train.npy", BATCH), range(n_norm), strict=False)]
    SAETrainer(settings, sae, chain(iter(first), rows(folder / "train.npy", BATCH))).fit()

    def reconstruct(x: Any) -> tuple[Any, Any]:
        latents = sae.encode(x)
        latents = latents.to_dense() if latents.is_sparse else latents
        return sae.decode(latents), latents > 0

    return reconstruct


def dictionary_learning(d_in: int, lr: float, folder: Path) -> Reconstruct:
    """TopKTrainer on activations of unit mean squared norm, as `trainSAE(normalize_activations=True)` makes them."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    batches = rows(folder / "train.npy", BATCH)
    norm = math.sqrt(float(next(rows(folder / "train.npy", 20 * BATCH)).pow(2).sum(1).mean()))
    trainer = TopKTrainer(
        steps=N_STEPS,
        activation_dim=d_in,
        dict_size=D_SAE,
        k=K,
        layer=0,
        lm_name="none",
        lr=lr,
        warmup_steps=WARM_UP,
        decay_start=N_STEPS - DECAY,
        seed=0,
        device="cpu",
    )
    for step, x in zip(range(N_STEPS), batches, strict=False):
        trainer.update(step, x / norm)

    def reconstruct(x: Any) -> tuple[Any, Any]:
        latents = trainer.ae.encode(x / norm)
        return trainer.ae.decode(latents) * norm, latents > 0

    return reconstruct


def sparsify(d_in: int, lr: float, folder: Path) -> Reconstruct:
    """SparseCoder with Adam and its linear schedule, the calls in the order of `Trainer.fit`; no normalisation."""
    import torch
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder
    from transformers import get_linear_schedule_with_warmup

    torch.manual_seed(0)
    sae = SparseCoder(d_in, SparseCoderConfig(num_latents=D_SAE, k=K))
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    schedule = get_linear_schedule_with_warmup(optimizer, WARM_UP, N_STEPS)
    for step, x in zip(range(N_STEPS), rows(folder / "train.npy", BATCH), strict=False):
        if step == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x=x, y=x, dead_mask=None, total_variance=(x - x.mean(0)).pow(2).sum())
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    def reconstruct(x: Any) -> tuple[Any, Any]:
        out = sae.encode(x)
        on = torch.zeros(len(x), D_SAE, dtype=torch.bool).scatter_(1, out.top_indices, out.top_acts > 0)
        return sae.decode(out.top_acts, out.top_indices), on

    return reconstruct


PEERS: dict[str, Callable[[int, float, Path], Reconstruct]] = {
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
}


def prepare() -> dict[str, Callable[..., Any]]:
    """The one request: train and measure."""
    import torch

    peer, lr, folder, threads = sys.argv[1:]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)

    def run() -> dict[str, float]:
        d_in = next(rows(Path(folder) / "train.npy", 1)).shape[1]
        return measure(PEERS[peer](d_in, float(lr), Path(folder)), Path(folder))

    return {"run": run}


if __name__ == "__main__":
    serve(prepare)
