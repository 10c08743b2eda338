"""evaluate: how faithful, sparse, useful and well separated a run's dictionaries are, on documents they never saw.

Headline figures are over tokens that are not attention sinks, and sinks pass through the splice unchanged; the figures
named `_all` are over all tokens, with every token spliced. metrics.json gets the values by flat name, evaluation.json
beside it the same with intervals, definitions and details.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.audit.concepts import ConceptError, load_concept
from pipelines.check import warn_of_misfit
from pipelines.collect import open_store
from pipelines.config import RunConfig
from pipelines.configfiles import concept_path
from pipelines.dictionaries import load_trained
from pipelines.errors import UsageError
from pipelines.evaluation import evaluate_dictionaries
from pipelines.evaluation.concepts import ConceptTexts
from pipelines.evaluation.record import Evaluation, evaluation_record
from pipelines.models import LanguageModel, resolve_model
from pipelines.progress import Reporter
from pipelines.rundir import RunDir, write_json
from sae import Dictionary
from storage import ActivationStore

MOST_BYTES = 4 * 2**30
"""Weights of dictionaries that are in memory together; more are evaluated in several groups."""


def evaluate(config: RunConfig, run: RunDir, ui: Reporter) -> dict[str, dict[str, Any]]:
    """Run the stage: figures of every SAE of the run, also written to metrics.json and evaluation.json.

    Raises:
        UsageError: a concept that cannot be used.
    """
    concepts = concept_texts(config)
    store = open_store(config, run)
    lm = LanguageModel(resolve_model(config.model), config.model)
    found: dict[str, Evaluation] = {}
    for group in _groups(config, run):
        for name, dictionary in group.items():
            warn_of_misfit(config, run, name, dictionary, lm, ui)
        found |= evaluate_dictionaries(
            store,
            lm,
            group,
            config.evaluate,
            sink_multiple=config.sinks.multiple,
            selection=config.selection("evaluate"),
            concepts=concepts,
            seed=config.seed,
            ui=ui,
        )
    write_json(run.evaluation_path, evaluation_record(measured_on(config, store), found))
    for name, evaluation in found.items():
        run.update_metrics(name, evaluation.flat())
    return {name: evaluation.flat() for name, evaluation in found.items()}


def concept_texts(config: RunConfig) -> dict[str, ConceptTexts]:
    """The texts of `evaluate.concepts` by name.

    Raises:
        UsageError: listing what is wrong with each.
    """
    found, problems = {}, []
    for name in config.evaluate.concepts:
        try:
            concept = load_concept(concept_path(name))
            if concept.topic is not None:
                raise UsageError(
                    f"evaluate.concepts: {name} is a topic of the corpus, whose absorption is measured with the probes "
                    "anyway: drop it, or give a concept with texts"
                )
            found[concept.name] = ConceptTexts.of(concept)
        except (ConceptError, UsageError) as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    return found


def _groups(config: RunConfig, run: RunDir) -> Iterator[Mapping[str, Dictionary]]:
    """The run's dictionaries, as many at a time as memory should hold."""
    group: dict[str, Dictionary] = {}
    n_bytes = 0
    for name in config.saes:
        dictionary = load_trained(run, name)
        size = sum(tensor.nbytes for tensor in dictionary.sae.state_dict().values())
        if group and n_bytes + size > MOST_BYTES:
            yield group
            group, n_bytes = {}, 0
        group[name], n_bytes = dictionary, n_bytes + size
    yield group


def measured_on(config: RunConfig, store: ActivationStore) -> dict[str, Any]:
    """What the figures were measured on; two evaluations with the same can be compared."""
    provenance = store.spec.provenance
    return {
        "model": provenance["model"]["source"],
        "model_sha256": provenance["model"]["weights_sha256"],
        "store_fingerprint": store.spec.fingerprint,
        "sink_multiple": config.sinks.multiple,
        "seed": config.seed,
        "settings": config.evaluate.model_dump(mode="json"),
    }
