"""`python -m tests.benchmarks.train_gpu`: a training step on a GPU beside what the hardware allows and beside others.

    topk, batchtopk              `Trainer.fit` with the Triton kernels, one step
    …_stock                      the same with torch operations only (SAE_TRITON=0)
    dense_compiled               a dense TopK step: torch.compile, bfloat16 autocast, fused Adam
    sparsify                     sparsify's own modules and optimizer, the calls in the order of its `Trainer.fit`

Settings: d_in 768, 32,768 latents, k 32; and 2,304, 65,536, 64. Batch 16,384. Every step includes its clipping, its
unit norm and its reading of the loss. Times are CUDA events around a few steps, medians of interleaved rounds after a
warm-up that does not count; memory is the most that torch held during a step.

The bound is a sum of what cannot be left out, each at the datasheet's rate (matrix products at 60 % of it):

    2 d n FLOP a token                     the encoder's product
    2 · 2 n bytes a token                  pre-activations in bfloat16, written once and read once by the top-k pass
    4 · 2 d k bytes a token                four gathers of k rows in bfloat16
    28 bytes a parameter and step          Adam: gradient, weight and moments read, weight and moments written

Needs only torch, Triton and this package. Prints a table and, as its last line, one JSON object.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import BatchTopKConfig, StepMetrics, TopKConfig, Trainer, TrainerConfig, build
from sae.kernels import loops
from sae.optim import normalise_rows, project_gradient

SETTINGS = {"gpt2": (768, 32_768, 32), "gemma2": (2304, 65_536, 64)}
BATCH = 16_384
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12}
BF16_FLOPS = 989e12

Steps = Callable[[int], object]


def batches(d_in: int, n: int = 3) -> list[Tensor]:
    """Sums of a few of 4,000 directions, some of them common and most rare, on a common mean."""
    generator = torch.Generator("cuda").manual_seed(0)
    directions = torch.randn(4000, d_in, device="cuda", generator=generator)
    mean = 2 * torch.randn(d_in, device="cuda", generator=generator)
    share = 0.5 / torch.arange(1, 4001, device="cuda").float().pow(0.7)
    found = []
    for _ in range(n):
        active = torch.rand(BATCH, 4000, device="cuda", generator=generator) < share
        amount = torch.rand(BATCH, 4000, device="cuda", generator=generator) + 0.5
        x = (active * amount) @ directions
        found.append(x / x.std() + mean)
    return found


def bound_ms(d_in: int, d_sae: int, k: int, bandwidth: float) -> dict[str, float]:
    """Least milliseconds of a step, by part."""
    return {
        "encoder product": 1e3 * BATCH * 2 * d_in * d_sae / (0.6 * BF16_FLOPS),
        "top-k pass": 1e3 * BATCH * 4 * d_sae / bandwidth,
        "gathers": 1e3 * BATCH * 8 * d_in * k / bandwidth,
        "Adam": 1e3 * 28 * 2 * d_in * d_sae / bandwidth,
    }


def ours(
    config: type[TopKConfig] | type[BatchTopKConfig], d_in: int, d_sae: int, k: int, stream: list[Tensor]
) -> Steps:
    """`Trainer.fit`."""
    trainer = Trainer(build(config(d_in=d_in, d_sae=d_sae, k=k), seed=0), TrainerConfig(), 10**6, device="cuda")
    source = cycle(stream)

    def run(steps: int) -> None:
        last = trainer.step + steps

        def on_step(metrics: StepMetrics) -> bool:
            return metrics.step < last

        trainer.fit(source, on_step)

    return run


def stock(steps: Steps) -> Steps:
    """The same without the Triton kernels."""

    def run(n: int) -> None:
        kernels, loops._triton = loops._triton, lambda: None  # type: ignore[assignment]
        try:
            steps(n)
        finally:
            loops._triton = kernels

    return run


def dense_compiled(d_in: int, d_sae: int, k: int, stream: list[Tensor]) -> Steps:
    """A dense TopK step with the same parameters, loss, clipping and unit norm."""
    sae = build(TopKConfig(d_in=d_in, d_sae=d_sae, k=k), seed=0).cuda()
    parameters = list(sae.parameters())
    adam = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    source = cycle(stream)

    @torch.compile
    def loss_of(x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            pre_acts = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
            top = pre_acts.topk(k, dim=1, sorted=False)
            acts = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu().to(pre_acts.dtype))
            x_hat = acts @ sae.W_dec + sae.b_dec
        return (x_hat.float() - x).square().sum() / (x - x.mean(0)).square().sum()

    def run(steps: int) -> None:
        for _ in range(steps):
            loss = loss_of(next(source))
            adam.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            assert sae.W_dec.grad is not None
            project_gradient(sae.W_dec.data, sae.W_dec.grad)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            normalise_rows(sae.W_dec.data)
            float(loss.detach())

    return run


def sparsify(d_in: int, d_sae: int, k: int, stream: list[Tensor]) -> Steps:
    """SparseCoder with the default optimizer; its forward pass turns bfloat16 autocast on itself."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify.config import SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    from sparsify.sparse_coder import SparseCoder

    sae: Any = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device="cuda")
    optimizer: Any = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=5e-3 / (d_sae / 2**14) ** 0.5), momentum=0.95)
    optimizer.train()
    did_fire = torch.zeros(d_sae, dtype=torch.bool, device="cuda")
    source = cycle(stream)

    def run(steps: int) -> None:
        for _ in range(steps):
            x = next(source)
            sae.set_decoder_norm_to_unit_norm()
            variance = (x - x.mean(0)).pow(2).sum()
            out = sae(x=x, y=x, dead_mask=None, total_variance=variance)
            did_fire[out.latent_indices.flatten()] = True
            float(out.fvu.detach())
            out.fvu.backward()
            sae.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
            did_fire.zero_()

    return run


def measure(d_in: int, d_sae: int, k: int, rounds: int, steps: int, only: list[str]) -> dict[str, dict[str, Any]]:
    """Step time and peak memory of each candidate, or why it did not run."""
    stream = batches(d_in)
    makers: dict[str, Callable[[], Steps]] = {
        "topk": lambda: ours(TopKConfig, d_in, d_sae, k, stream),
        "batchtopk": lambda: ours(BatchTopKConfig, d_in, d_sae, k, stream),
        "topk_stock": lambda: stock(ours(TopKConfig, d_in, d_sae, k, stream)),
        "batchtopk_stock": lambda: stock(ours(BatchTopKConfig, d_in, d_sae, k, stream)),
        "dense_compiled": lambda: dense_compiled(d_in, d_sae, k, stream),
        "sparsify": lambda: sparsify(d_in, d_sae, k, stream),
    }
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Steps] = {}
    for name, make in makers.items():
        if only and name not in only:
            continue
        before = torch.cuda.memory_allocated()
        try:
            run = make()
            run(3)
            torch.cuda.reset_peak_memory_stats()
            run(1)
        except Exception as error:  # noqa: BLE001 - a candidate that cannot run is reported, the others go on
            found[name] = {"not_run": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        ready[name] = run
        found[name] = {"ms": [], "peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30}
    for _ in range(rounds):
        for name, run in ready.items():
            run(1)  # brings back what the candidate before displaced
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()  # type: ignore[no-untyped-call]
            run(steps)
            ended.record()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            found[name]["ms"].append(began.elapsed_time(ended) / steps)
    return found


def profile(d_in: int, d_sae: int, k: int, rule: str) -> str:
    """Where the GPU's time in our step goes."""
    run = ours(TopKConfig if rule == "topk" else BatchTopKConfig, d_in, d_sae, k, batches(d_in))
    run(4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run(3)
        torch.cuda.synchronize()
    events = [(event.self_device_time_total / 3e3, event.count / 3, event.key) for event in profiler.key_averages()]
    events.sort(reverse=True)
    total = sum(event[0] for event in events)
    lines = [f"{rule}: {total:.2f} ms of kernels a step"]
    lines += [f"{ms:8.3f} ms {count:6.1f} x  {key[:90]}" for ms, count, key in events[:22]]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.cuda.get_device_name()
    chip = next((name for name in BANDWIDTH if name in device), "H100")
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    import triton

    facts = {
        "device": device,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "command": "python -m tests.benchmarks.train_gpu " + " ".join(sys.argv[1:]),
    }
    results: dict[str, Any] = {"facts": facts}
    for setting in asked.setting:
        d_in, d_sae, k = SETTINGS[setting]
        parts = bound_ms(d_in, d_sae, k, BANDWIDTH[chip])
        bound = sum(parts.values())
        print(f"\n{setting}: d_in {d_in}, d_sae {d_sae}, k {k}, batch {BATCH}, {device}")
        print(f"bound {bound:.2f} ms = " + " + ".join(f"{name} {ms:.2f}" for name, ms in parts.items()))
        found = measure(d_in, d_sae, k, asked.rounds, asked.steps, asked.only)
        medians = {name: statistics.median(result["ms"]) for name, result in found.items() if "ms" in result}
        for name, result in found.items():
            if "ms" not in result:
                print(f"{name:16} not run: {result['not_run']}", flush=True)
                continue
            ms = medians[name]
            result |= {"ms": ms, "range": [min(result["ms"]), max(result["ms"])], "share_of_bound": bound / ms}
            low, high = result["range"]
            text = f"{name:16} {ms:8.2f} ms ({low:.2f}-{high:.2f})  {BATCH / ms / 1e3:6.2f} M tokens/s"
            text += f"  {100 * bound / ms:5.1f} % of the bound  {result['peak_gib']:6.2f} GiB"
            for other in ("dense_compiled", "sparsify"):
                if other in medians:
                    text += f"  {medians[other] / ms:5.2f}x {other}"
            print(text, flush=True)
        results[setting] = {"bound_ms": bound, "bound_parts_ms": parts, **found}
        if asked.profile:
            for rule in ("topk", "batchtopk"):
                print(profile(d_in, d_sae, k, rule), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps(results))
    if asked.json is not None:
        asked.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
