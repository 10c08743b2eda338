"""The feature table of a dictionary: features.parquet, one row per latent."""

from pathlib import Path

import pyarrow.parquet as pq


def read_labels(folder: Path) -> dict[int, str]:
    """Labels of the labelled latents in a folder's features.parquet; empty when there is none."""
    path = folder / "features.parquet"
    if not path.is_file():
        return {}
    table = pq.read_table(path, columns=["latent", "label"])
    return {
        latent: label
        for latent, label in zip(table["latent"].to_pylist(), table["label"].to_pylist(), strict=True)
        if label
    }
