"""A tiny language model and tiny texts, made from a seed: real code paths in a second."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

DICTIONARY_FILES = {
    "cfg.json",
    "sae_weights.safetensors",
    "sparsity.safetensors",
    "dictionary.json",
    "evaluation.json",
    "features.parquet",
    "examples.parquet",
    "labels.parquet",
    "README.md",
}
"""What the export stage leaves."""

TOPICS = {
    "rivers": ["river", "stream", "water", "bank", "flows", "delta", "bridge", "boat", "tide", "flood"],
    "metals": ["iron", "copper", "zinc", "ore", "smelter", "alloy", "furnace", "mine", "steel", "nickel"],
    "birds": ["robin", "heron", "nest", "feather", "wing", "song", "migrate", "egg", "beak", "flock"],
    "chess": ["king", "rook", "pawn", "gambit", "check", "board", "endgame", "bishop", "castle", "mate"],
}
COMMON = ["the", "a", "of", "and", "in", "to", "is", "was", "near", "with", "from", "old", "new", "many", "some"]


def write_texts(path: Path, n: int = 400, seed: int = 0) -> Path:
    """JSON lines {id, title, topic, text}, sorted by topic as real files often are."""
    rng = np.random.default_rng(seed)
    lines = []
    for topic, words in TOPICS.items():
        for i in range(n // len(TOPICS)):
            vocabulary = words + COMMON
            text = " ".join(rng.choice(vocabulary) for _ in range(int(rng.integers(20, 60)))) + "."
            lines.append(json.dumps({"id": f"{topic}-{i}", "title": f"{topic} {i}", "topic": topic, "text": text}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_tiny_model(folder: Path, d_model: int = 32, n_layers: int = 3, seed: int = 0) -> Path:
    """A Hugging Face folder with a random Llama and a word-level byte-fallback-free BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [" ".join(words) for words in TOPICS.values()] + [" ".join(COMMON)]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def tiny_config(model: Path, texts: Path, **overrides: Any) -> dict[str, Any]:
    """A run on the tiny model that takes seconds; `overrides` replace whole sections."""
    config: dict[str, Any] = {
        "name": "tiny",
        "model": {"source": str(model)},
        "text": [{"path": str(texts), "title_field": "title", "topic_field": "topic"}],
        "hooks": ["model.layers.1"],
        "collect": {
            "n_tokens": 12_000,
            "context_length": 32,
            "heldout_fraction": 0.2,
            "contexts_per_shard": 48,
            "batch_contexts": 16,
            "n_workers": 1,
        },
        "saes": {"main": {"architecture": "batchtopk", "d_sae": 96, "k": 8}},
        "train": {"n_tokens": 16_000, "batch_size": 256, "checkpoint_every": 10, "cpus_per_worker": 1},
        "evaluate": {"n_ce_tokens": 512},
        "audit": {"concepts": []},
        "ray": {"num_cpus": 2},
    }
    return config | overrides
