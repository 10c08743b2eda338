"""`make bench-dictionary`: what a researcher waits for, against the least that it could cost.

    import_vs_torch     `import sae`, against `import torch` alone; each in a new process, whose start is left out
    load_vs_read        Dictionary.load with checks, against reading the weights file into memory (warm)
    encode_vs_bare      Dictionary.encode of a batch, TopK, against the bare product and torch.topk
    attach_overhead     a forward pass with a spliced dictionary, against one whose hook decodes and encodes by hand;
                        the share that is added
    latents_vs_encode   the latent pass over a store, written and checksummed, against encoding the same in memory

Ratios are costs (ours / theirs) but for the last, which is relative speed. Options: `--quick` for a run of seconds that
shows only that everything works, `--only NAME …` for some of the parts.
"""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.latents import compute_latents
from pipelines.progress import SilentReporter
from pipelines.rundir import RunDir
from sae import SAE, BatchTopKConfig, BatchTopKSAE, Dictionary, TopKConfig, attach, build
from storage import ActivationStore
from tests.benchmarks.harness import ROOT, Figure, Ratio, Report, interleaved, measure_parts, timed
from tests.benchmarks.store import HOOK, fill, spec_of

THREADS = os.cpu_count() or 1


@dataclass(frozen=True)
class Size:
    """How much work a measurement is."""

    pairs: int
    wide: tuple[int, int]
    """d_in and d_sae of the dictionary that is loaded."""
    usual: tuple[int, int]
    batch: int
    """Tokens that are encoded at once."""
    layers: int
    sequences: tuple[int, int]
    """Batch and length of a forward pass."""
    contexts: int
    """Contexts of the store, of 128 tokens."""


FULL = Size(5, (2304, 65_536), (576, 4608), 4096, 8, (4, 128), 256)
QUICK = Size(5, (64, 1024), (64, 256), 256, 2, (2, 16), 8)


def measure_import(report: Report, size: Size, scratch: Path) -> None:
    """The second import of each process pair is measured inside it."""

    def importing(module: str) -> float:
        code = f"import time; began = time.perf_counter(); import {module}; print(time.perf_counter() - began)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        return float(done.stdout)

    ratio = interleaved(lambda: importing("torch"), lambda: importing("sae"), pairs=size.pairs)
    note = f"torch {min(ratio.ours_s):.2f} s, sae {min(ratio.theirs_s):.2f} s"
    report.add(Figure.of("import_vs_torch", ratio, at_most=1.25, note=note))


def measure_load(report: Report, size: Size, scratch: Path) -> None:
    """A TopK dictionary as it was saved here; shapes and numbers are checked, hashes are not."""
    d_in, d_sae = size.wide
    folder = scratch / "wide"
    sae = build(TopKConfig(d_in=d_in, d_sae=d_sae, k=min(64, d_sae)), seed=0)
    Dictionary(sae, hook_name="model.layers.12").save(folder)
    del sae
    file = folder / "sae_weights.safetensors"
    n_bytes = file.stat().st_size

    def read() -> None:
        buffer = bytearray(n_bytes)
        with file.open("rb", buffering=0) as stream:
            view, done = memoryview(buffer), 0
            while done < n_bytes:
                done += stream.readinto(view[done:])

    def load() -> None:
        dictionary = Dictionary.load(folder)
        assert dictionary.d_sae == d_sae

    ratio = interleaved(timed(read), timed(load), pairs=size.pairs)
    note = f"{n_bytes / 2**30:.2f} GiB, read in {min(ratio.ours_s):.2f} s, loaded in {min(ratio.theirs_s):.2f} s"
    report.add(Figure.of("load_vs_read", ratio, at_most=1.5, note=note))
    report.facts["load"] = f"d_in {d_in}, d_sae {d_sae}, float32, TopK; page cache warm"
    shutil.rmtree(folder)


def measure_encode(report: Report, size: Size, scratch: Path) -> None:
    """The bare form keeps what topk returns; ours scatters it into the dense array that `encode` promises."""
    d_in, d_sae = size.usual
    dictionary = Dictionary(build(TopKConfig(d_in=d_in, d_sae=d_sae, k=32), seed=0))
    x = torch.randn(size.batch, d_in)
    sae = dictionary.sae

    @torch.no_grad()
    def bare() -> None:
        torch.addmm(sae.b_enc, x - sae.b_dec, sae.W_enc).topk(32, dim=-1, sorted=False)

    torch.set_num_threads(THREADS)
    report.facts["encode"] = f"{size.batch} tokens, d_in {d_in}, d_sae {d_sae}, k 32"
    dense = interleaved(timed(bare), timed(lambda: dictionary.encode(x)), pairs=max(size.pairs, 9))
    report.add(Figure.of("encode_vs_bare", dense, at_most=1.3, note=f"bare {min(dense.ours_s) * 1e3:.0f} ms"))
    sparse = interleaved(timed(bare), timed(lambda: dictionary.encode_sparse(x)), pairs=max(size.pairs, 9))
    report.add(Figure.of("encode_sparse_vs_bare", sparse))


def model_of(size: Size) -> Any:
    """A random Llama of the shipped model's width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=size.usual[0],
        intermediate_size=size.usual[0] * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.usual[0] // 64,
        num_key_value_heads=max(1, size.usual[0] // 192),
    )
    return LlamaForCausalLM(config).eval()


def measure_attach(report: Report, size: Size, scratch: Path) -> None:
    """Both replace the same activations; what is added is finding tokens and padding, and keeping what was seen."""
    torch.manual_seed(0)
    model, d_in = model_of(size), size.usual[0]
    sae = build(TopKConfig(d_in=d_in, d_sae=size.usual[1], k=32), seed=0)
    tokens = torch.randint(0, 1000, size.sequences)
    hook = f"model.layers.{size.layers // 2}"
    module = model.get_submodule(hook)

    def by_hand(sae: SAE, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        new = sae.decode(sae.encode(first))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    @torch.no_grad()
    def bare() -> None:
        handle = module.register_forward_hook(lambda _module, _args, output: by_hand(sae, output))
        model(tokens)
        handle.remove()

    @torch.no_grad()
    def attached() -> None:
        with attach(model, sae, hook, splice=True):
            model(tokens)

    torch.set_num_threads(THREADS)
    ratio = interleaved(timed(bare), timed(attached), pairs=max(size.pairs, 15))
    report.facts["attach"] = (
        f"{size.layers} layers of width {d_in}, {tuple(size.sequences)} tokens, d_sae {size.usual[1]}"
    )
    added = Ratio(tuple(pair - 1 for pair in ratio.pairs), ratio.ours_s, ratio.theirs_s)
    report.add(Figure.of("attach_overhead", added, at_most=0.1, note=f"by hand {min(ratio.ours_s) * 1e3:.0f} ms"))


def measure_latents(report: Report, size: Size, scratch: Path) -> None:
    """The store is on this disk and warm; the bare form has all activations in memory, in float32."""
    d_in, d_sae = size.usual
    spec = spec_of(size.contexts, 128, max(1, size.contexts // 8), d_in, "bfloat16")
    fill(scratch / "store", spec)
    store = ActivationStore.open(scratch / "store")
    sae = build(BatchTopKConfig(d_in=d_in, d_sae=d_sae, k=32), seed=0)
    assert isinstance(sae, BatchTopKSAE)
    x = store.activations(HOOK, 0, spec.n_contexts).flatten(0, 1).float()
    sae.calibrate_threshold([x[: size.batch]])
    dictionary = Dictionary(sae, hook_name=HOOK)
    passes = 0

    def over_the_store() -> float:
        nonlocal passes
        passes += 1
        run = RunDir(scratch / f"run-{passes}")
        began = time.perf_counter()
        compute_latents(store, dictionary, run, "main", SilentReporter(), sink_multiple=1e9, digest="bench")
        seconds = time.perf_counter() - began
        shutil.rmtree(run.path)
        return seconds

    def bare() -> None:
        for start in range(0, len(x), 4096):
            dictionary.encode(x[start : start + 4096])

    torch.set_num_threads(THREADS)
    ratio = interleaved(over_the_store, timed(bare), pairs=size.pairs)
    rate = len(x) / min(ratio.ours_s)
    report.facts["latents"] = f"{len(x):,} tokens, d_in {d_in}, bfloat16, d_sae {d_sae}, L0 32"
    report.add(Figure.of("latents_vs_encode", ratio, at_least=0.7, note=f"{rate:,.0f} tokens/s"))


def main() -> None:
    """Measure, print, and write the note."""
    report = Report("dictionary", "Dictionaries against the least they could cost", THREADS)
    measures = {
        "import": measure_import,
        "load": measure_load,
        "encode": measure_encode,
        "attach": measure_attach,
        "latents": measure_latents,
    }
    measure_parts(__doc__, report, (QUICK, FULL), measures)


if __name__ == "__main__":
    main()
