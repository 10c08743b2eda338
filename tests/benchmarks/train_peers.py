"""One training step of SAELens, dictionary_learning or sparsify; run by `train` in the peers' environment.

    python train_peers.py PEER ARCHITECTURE D_SAE AUTOCAST THREADS

Each step is what the peer's own trainer does for a batch: its trainer object where it has one that takes batches, and
for sparsify, whose trainer insists on a language model, the body of its loop with its own modules and optimizer.
"""

import sys
import time
import warnings
from collections.abc import Callable
from itertools import cycle
from typing import Any

from tests.benchmarks.harness import serve
from tests.benchmarks.train_setting import BATCH, D_IN, K, batches


def saelens(architecture: str, d_sae: int, autocast: bool) -> Callable[[Any], object]:
    """SAETrainer, as its `fit` calls it."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae: Any
    if architecture == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=d_sae, k=K))
    else:
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=d_sae, k=K))
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-4,
        autocast=autocast,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, iter(()))

    def step(x: Any) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def dictionary_learning(architecture: str, d_sae: int, autocast: bool) -> Callable[[Any], object]:
    """The trainers' `update`, as `trainSAE` calls it."""
    import torch
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = (TopKTrainer if architecture == "topk" else BatchTopKTrainer)(
        steps=10**6, activation_dim=D_IN, dict_size=d_sae, k=K, layer=0, lm_name="none", lr=1e-3, device="cpu"
    )
    n_steps = 0

    def step(x: Any) -> None:
        nonlocal n_steps
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            trainer.update(n_steps, x)
        n_steps += 1

    return step


def sparsify(architecture: str, d_sae: int, autocast: bool) -> Callable[[Any], object]:
    """SparseCoder with the default optimizer, the calls in the order of `Trainer.fit`."""
    import torch
    from schedulefree import ScheduleFreeWrapper
    from sparsify.config import SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    from sparsify.sparse_coder import SparseCoder

    if architecture != "topk":
        raise ValueError("sparsify has no BatchTopK")
    sae = SparseCoder(D_IN, SparseCoderConfig(num_latents=d_sae, k=K))
    optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=5e-3 / (d_sae / 2**14) ** 0.5), momentum=0.95)
    optimizer.train()
    did_fire = torch.zeros(d_sae, dtype=torch.bool)
    since_fired = torch.zeros(d_sae, dtype=torch.long)

    def step(x: Any) -> None:
        sae.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = sae(x=x, y=x, dead_mask=None, total_variance=variance)
        did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            since_fired.add_(len(x))
            since_fired[did_fire] = 0
            did_fire.zero_()

    return step


def prepare() -> dict[str, Callable[..., Any]]:
    """Build the peer's trainer; what it takes is not measured."""
    import torch

    peer, architecture, d_sae, autocast, threads = sys.argv[1:]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(threads))
    build = {"saelens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}[peer]
    step = build(architecture, int(d_sae), autocast == "1")
    stream = cycle(batches(torch))

    def run(steps: int) -> float:
        """Seconds of that many steps."""
        xs = [next(stream) for _ in range(steps)]
        began = time.perf_counter()
        for x in xs:
            step(x)
        return time.perf_counter() - began

    return {"run": run}


if __name__ == "__main__":
    serve(prepare)
