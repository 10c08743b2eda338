"""SAELens's activation store, cache runner and cache reader; run by `store` in the peers' environment.

Its model is the same Hugging Face folder, its tokens are ready and in memory, and its batches have the same size. The
bare loop beside it is the truncated model alone, with the positions that SAELens gives it: those of whole contexts.
"""

import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import serve


class _Stop(Exception):
    pass


def prepare() -> dict[str, Callable[..., Any]]:
    """Load the model; what it takes is not measured."""
    import torch
    from datasets import Dataset
    from sae_lens.cache_activations_runner import CacheActivationsRunner
    from sae_lens.config import CacheActivationsRunnerConfig
    from sae_lens.load_model import load_model
    from sae_lens.training.activations_store import ActivationsStore

    warnings.filterwarnings("ignore")
    folder, hook, scratch = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    batch, length, threads = int(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6])
    torch.set_num_threads(threads)
    load = {"torch_dtype": torch.bfloat16}
    model = load_model("AutoModelForCausalLM", folder, "cpu", load, hook_names=[hook])
    inner: Any = model.model
    d_in = int(inner.config.hidden_size)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(inner.config.vocab_size, (batch * 64, length), generator=generator)
    data = Dataset.from_dict({"input_ids": tokens.tolist()})
    shared = {"hook_name": hook, "context_size": length, "d_in": d_in}
    settings = {
        "streaming": False,
        "hook_head_index": None,
        "total_training_tokens": 1,
        "store_batch_size_prompts": batch,
        "train_batch_size_tokens": 4096,
        "prepend_bos": False,
        "normalize_activations": "none",
        "device": torch.device("cpu"),
        "dtype": "float32",
    }
    store = ActivationsStore(model=model, dataset=data, n_batches_in_buffer=64, **shared, **settings)
    layer = inner.get_submodule(hook)

    def stop(*_: object) -> None:
        raise _Stop

    def bare(n_batches: int) -> float:
        handle = layer.register_forward_hook(stop)
        try:
            began = time.perf_counter()
            for n in range(n_batches):
                first = n * batch % len(tokens)
                with torch.inference_mode():
                    try:
                        inner(tokens[first : first + batch])
                    except _Stop:
                        continue
            return time.perf_counter() - began
        finally:
            handle.remove()

    def activations(n_batches: int) -> float:
        """Its store, which saves nothing."""
        began = time.perf_counter()
        for _ in range(n_batches):
            store.get_raw_llm_batch()
        return time.perf_counter() - began

    def cache(n_batches: int) -> float:
        """Its cache runner: the activations end in an Arrow data set (float32; Arrow has no bfloat16)."""
        target = scratch / "cache"
        shutil.rmtree(target, ignore_errors=True)
        config = CacheActivationsRunnerConfig(
            dataset_path="",
            model_name=folder,
            model_class_name="AutoModelForCausalLM",
            model_batch_size=batch,
            training_tokens=n_batches * batch * length,
            new_cached_activations_path=str(target),
            model_from_pretrained_kwargs=load,
            buffer_size_gb=min(2.0, n_batches * batch * length * d_in * 4 / 1e9),
            prepend_bos=False,
            shuffle=False,
            streaming=False,
            device="cpu",
            dtype="float32",
            **shared,
        )
        runner = CacheActivationsRunner(config, override_dataset=data)
        began = time.perf_counter()
        runner.run()
        return time.perf_counter() - began

    def write_cache(n_contexts: int) -> int:
        """An Arrow cache of random activations for `read`, made by its own code; returns its bytes."""
        target, temporary = scratch / "to-read", scratch / "to-read" / ".tmp_shards"
        temporary.mkdir(parents=True)
        config = CacheActivationsRunnerConfig(
            dataset_path="",
            model_name=folder,
            model_class_name="AutoModelForCausalLM",
            model_batch_size=batch,
            training_tokens=n_contexts * length,
            new_cached_activations_path=str(target),
            buffer_size_gb=0.25,
            prepend_bos=False,
            device="cpu",
            dtype="float32",
            **shared,
        )
        runner = CacheActivationsRunner(config, override_dataset=data)
        n_each = config.n_seq_in_buffer
        for n in range(max(1, n_contexts // n_each)):
            rows = torch.randn(n_each * length, d_in, generator=generator)
            ids = torch.zeros(n_each * length, dtype=torch.int32)
            runner._create_shard((rows, ids)).save_to_disk(f"{temporary}/shard_{n:05d}", num_shards=1)
        runner._consolidate_shards(temporary, target, copy_files=False)
        return max(1, n_contexts // n_each) * n_each * length * d_in * 4

    def read(n_batches: int, window: int) -> float:
        """Its reader: mixed training batches of 4,096 tokens out of the cache."""
        reader = ActivationsStore(
            model=model,
            dataset=None,
            cached_activations_path=str(scratch / "to-read"),
            n_batches_in_buffer=window,
            **shared,
            **settings,
        )
        batches = iter(reader)
        next(batches)
        began = time.perf_counter()
        for _ in range(n_batches):
            next(batches)
        return time.perf_counter() - began

    return {"bare": bare, "activations": activations, "cache": cache, "write_cache": write_cache, "read": read}


if __name__ == "__main__":
    serve(prepare)
