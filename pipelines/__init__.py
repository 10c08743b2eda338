"""The pipeline: everything that knows language models, texts, Ray and run directories.

Imports point one way: `pipelines` uses `sae` and `storage`, and neither knows it.
"""
