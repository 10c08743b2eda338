"""How faithful, how sparse, how useful and how well separated a dictionary is: each figure with its interval.

    found = evaluate_dictionaries(store, lm, {"main": dictionary}, settings, sink_multiple=3.0)
    found["main"].figures["fvu"]        # Figure(value=0.246, low=0.243, high=0.249, n=29_412)

`schema` says of every figure what it is, in which unit, and whether higher or lower is better; `stage` runs all parts.
"""

from pipelines.evaluation.reconstruction import evaluate_reconstruction
from pipelines.evaluation.record import Evaluation, Figure
from pipelines.evaluation.recovery import evaluate_splice, recovered
from pipelines.evaluation.schema import METRICS, Metric
from pipelines.evaluation.together import evaluate_dictionaries

__all__ = [
    "METRICS",
    "Evaluation",
    "Figure",
    "Metric",
    "evaluate_dictionaries",
    "evaluate_reconstruction",
    "evaluate_splice",
    "recovered",
]
