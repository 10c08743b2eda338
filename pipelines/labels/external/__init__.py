"""Labels of other people: read from their files, kept apart from ours, tested like ours.

    a Neuronpedia export, delphi's results, CSV, YAML ──▶ readers ──▶ ImportedLabel ──▶ shelf (imports/SAE/*.jsonl)

What is on the shelf is never overwritten by a run; `pipelines.labels.others` tests it and makes rows of labels.parquet.
"""
