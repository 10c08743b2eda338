"""Tables of a small dictionary whose every text is out to break the page, and the dictionary itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sae import Dictionary, TopKConfig, build
from sae.spelling import Speller

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "' onmouseover='document.title=1' {{7*7}} ${7*7} \u2028\u2029 \u202egnorw\u202c \x00\x07 &lt;b&gt; \\u003c \\"
)
TOKENS = ["<s>", " river", " bank", "s", "\n", " </script>", "<!--", "سلام", " עולם", " 🌊", *HOSTILE.split(" ")]
D_SAE = 200


class Words:
    """A tokenizer of `TOKENS`; two further ids are halves of one character, as byte tokens are."""

    halves = (len(TOKENS), len(TOKENS) + 1)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [str(i) if i < len(TOKENS) + 2 else None for i in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        whole = b"".join(self._bytes(int(token)) for token in tokens)
        return whole.decode("utf-8", "replace")

    def _bytes(self, token: int) -> bytes:
        first, second = self.halves
        return {first: "é".encode()[:1], second: "é".encode()[1:]}.get(token) or TOKENS[token].encode()


def dictionary(d_sae: int = D_SAE) -> Dictionary:
    sae = build(TopKConfig(d_in=16, d_sae=d_sae, k=4), seed=0)
    provenance = {"model_name": HOSTILE, "text": [{"origin": HOSTILE}], HOSTILE: HOSTILE}
    metrics = {"label_share_labelled": 0.5, "l0": 4.0, "fvu": float("nan")}
    return Dictionary(sae, hook_name="model.layers.1", provenance=provenance, metrics=metrics)


def speller() -> Speller:
    return Speller(Words())


def label_of(latent: int) -> str | None:
    """Latents of four have hostile labels, of three none, others plain ones."""
    return HOSTILE if latent % 4 == 0 else None if latent % 3 == 0 else f"river number {latent}"


def write_tables(folder: Path, d_sae: int = D_SAE, *, labels: bool = True) -> Path:
    """features.parquet, examples.parquet and, if wanted, labels.parquet with known contents; latent 7 never fires."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    latents = np.arange(d_sae)
    named = [label_of(i) for i in range(d_sae)]
    score = np.round(0.5 + 0.4 * rng.random(d_sae), 4)
    silent = latents == 7
    features: dict[str, Any] = {
        "latent": latents.astype(np.int32),
        "label": named,
        "label_kind": ["silent" if s else "token" if t else "unlabelled" for s, t in zip(silent, named, strict=True)],
        "labelled": [t is not None for t in named],
        "survives": [i % 10 == 1 and t is not None for i, t in enumerate(named)],
        "candidate": [t or f"candidate {i}" for i, t in enumerate(named)],
        "rule_values": [[f" value {j}" for j in range(i % 9)] for i in range(d_sae)],
        "promotes": [[HOSTILE, " up"]] * d_sae,
        "suppresses": [[" down", "\u202e"]] * d_sae,
        "detection_balanced_accuracy": score,
        "detection_low": score - 0.05,
        "detection_high": score + 0.05,
        "detection_null": [0.5] * d_sae,
        "brand_new_low": score - 0.1,
        "brand_new_high": score + 0.1,
        "brand_new": score,
        "histogram": [None if s else [100, 10, 1, 0, 1] for s in silent],
        "density": np.where(silent, 0, 10.0 ** -(1 + latents % 5)),
        "max_activation": np.where(silent, 0, 1.0 + latents),
        "top_tokens": [[TOKENS[i % len(TOKENS)], HOSTILE] for i in range(d_sae)],
        HOSTILE: [HOSTILE] * d_sae,
    }
    pq.write_table(pa.table(features), folder / "features.parquet")
    _write_examples(folder, d_sae)
    if labels:
        pq.write_table(
            pa.table(
                {
                    "latent": [3, 1, 1],
                    "label": ["their word for three", HOSTILE, "another"],
                    "source": ["neuronpedia", HOSTILE, "csv"],
                    "author": [None, HOSTILE, "A. Person"],
                    "date": ["2026-01-01", None, "2026-02-02"],
                    "detection_balanced_accuracy": [0.75, None, 0.5],
                }
            ),
            folder / "labels.parquet",
        )
    return folder


def _write_examples(folder: Path, d_sae: int) -> None:
    """Two passes, as a labeller may make them: contexts of all latents, then counter-examples of all."""
    rows = []
    for kind in ("top", "false_positive", "invented <kind>"):
        for latent in range(d_sae):
            if latent == 7:
                continue
            tokens = [(latent + j) % len(TOKENS) for j in range(6)] + list(Words.halves)
            values = [0.0] * len(tokens)
            if kind == "top":
                values[2], values[6], values[7] = 1.0 + latent, 0.25, 0.5
            rows.append(
                {
                    "latent": latent,
                    "kind": kind,
                    "rank": 0,
                    "document": 5,
                    "peak": 2,
                    "token_ids": tokens,
                    "values": values,
                    "max_value": max(values),
                    "text": HOSTILE,
                    "note": HOSTILE if kind == "top" else None,
                }
            )
    schema = pa.schema(
        [
            ("latent", pa.int32()),
            ("kind", pa.string()),
            ("rank", pa.int16()),
            ("document", pa.int32()),
            ("peak", pa.int16()),
            ("token_ids", pa.list_(pa.int32())),
            ("values", pa.list_(pa.float32())),
            ("max_value", pa.float32()),
            ("text", pa.string()),
            ("note", pa.string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "examples.parquet", row_group_size=50)


def directions(d_sae: int, d_in: int) -> torch.Tensor:
    return torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(0))
