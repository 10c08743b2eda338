"""Dictionaries side by side: a table, the trade-off of sparsity and fidelity, probes; one page and one JSON."""

from pipelines.comparison.entries import Entry, read_entries
from pipelines.comparison.write import compare

__all__ = ["Entry", "compare", "read_entries"]
