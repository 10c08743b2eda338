"""All parts of an evaluation, for any number of dictionaries of one model: what they share is computed once."""

from collections.abc import Mapping
from typing import Any

from pipelines.config import EvaluateConfig
from pipelines.evaluation.absorption import Absorbed, absorption_figures
from pipelines.evaluation.concepts import ConceptTexts, pool_concept
from pipelines.evaluation.given import Given
from pipelines.evaluation.intervals import mean_interval
from pipelines.evaluation.reconstruction import Watcher, measure
from pipelines.evaluation.record import Evaluation, Figure
from pipelines.evaluation.recovery import n_spliced, recover
from pipelines.evaluation.roles import (
    StrongestWindows,
    output_scores,
    promoted_tokens,
    role_figures,
    sampled_latents,
    writes_to_stream,
)
from pipelines.evaluation.topics import TopicProbes, why_no_probes
from pipelines.models import LanguageModel
from pipelines.progress import Reporter, SilentReporter
from pipelines.selection import Selection
from sae import Dictionary, Transcoder
from sae.geometry import geometry
from storage import ActivationStore

DUPLICATE = 0.9
"""A decoder cosine above this makes two latents near duplicates."""


def evaluate_dictionaries(
    store: ActivationStore,
    lm: LanguageModel,
    dictionaries: Mapping[str, Dictionary],
    settings: EvaluateConfig | None = None,
    *,
    sink_multiple: float = 3.0,
    selection: Selection | None = None,
    concepts: Mapping[str, ConceptTexts] | None = None,
    seed: int = 0,
    ui: Reporter | None = None,
) -> dict[str, Evaluation]:
    """Evaluate dictionaries on the held-out documents of a store; see the package.

    Each activation is read once for all dictionaries of its hook, and the clean model runs once for all of them.

    Args:
        dictionaries: by name; they are moved to the model's device.
        concepts: texts with and without a concept, for absorption.
        seed: of resamples, folds and sampled latents.
    Raises:
        RunError: no token or prediction is selected.
        ValueError: the store lacks a hook of a dictionary.
    """
    for dictionary in dictionaries.values():
        dictionary.to(lm.device)
    given = Given(store, lm, dictionaries, settings or EvaluateConfig(), sink_multiple, selection, seed)
    found = {name: Evaluation(_identity(dictionary)) for name, dictionary in dictionaries.items()}
    start, stop = store.spec.split_range("heldout")
    probes = TopicProbes.prepare(given)
    n_probe = 0 if probes is None else probes.n_contexts
    total = (stop - start + n_spliced(store, given.settings) + n_probe) * store.spec.context_length
    with (ui or SilentReporter()).stage("evaluate", total=total, unit="tokens") as bar:
        watchers: dict[str, list[Watcher]] = {name: [] for name in dictionaries}
        windows = _windows(given, watchers)
        if probes is not None:
            probes.watch(watchers)
        measured = measure(
            store,
            dictionaries,
            sink_multiple=sink_multiple,
            bar=bar,
            selection=selection,
            n_resamples=given.settings.n_resamples,
            seed=seed,
            watchers=watchers,
        )
        for name, (figures, facts) in measured.items():
            found[name].figures |= figures
            found[name].facts |= facts
        recovered = recover(
            lm,
            store,
            dictionaries,
            given.settings,
            sink_multiple=sink_multiple,
            bar=bar,
            selection=selection,
            seed=seed,
        )
        for name, evaluation in found.items():
            if name in recovered:
                evaluation.figures |= recovered[name][0]
                evaluation.facts |= recovered[name][1]
            else:
                evaluation.left_out["splice"] = "a crosscoder has no one place to be spliced in"
            _add_geometry(given, name, evaluation)
            _add_roles(given, name, windows.get(name), evaluation)
        if probes is not None:
            bar.note("probes")
            probes.run(found, bar.advance)
    if probes is None:
        for evaluation in found.values():
            evaluation.left_out["probes"] = why_no_probes(given)
    _add_concepts(given, concepts or {}, found)
    return found


def _identity(dictionary: Dictionary) -> dict[str, Any]:
    return {
        "architecture": dictionary.config.architecture,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "hook_names": list(dictionary.hook_names),
    }


def _add_geometry(given: Given, name: str, evaluation: Evaluation) -> None:
    dictionary, settings = given.dictionaries[name], given.settings
    found = geometry(dictionary.sae, same_space=not isinstance(dictionary.sae, Transcoder))
    columns = {
        "max_decoder_cosine": found.max_decoder_cosine,
        "duplicate_share": (found.max_decoder_cosine > DUPLICATE).double(),
        "encoder_decoder_cosine": found.encoder_decoder_cosine,
        "decoder_norm": found.decoder_norm,
    }
    for key, values in columns.items():
        if values is not None:
            limits = mean_interval(values.cpu(), settings.n_resamples, given.seed)
            evaluation.figures[key] = Figure.of(float(values.double().mean()), limits, len(values))


# -- input and output scores -------------------------------------------------------------------------------------------


def _windows(given: Given, watchers: dict[str, list[Watcher]]) -> dict[str, StrongestWindows]:
    """What collects each dictionary's strongest windows, registered to watch."""
    windows = {}
    for name, dictionary in given.dictionaries.items():
        if given.settings.score_latents and writes_to_stream(given.lm, dictionary):
            latents = sampled_latents(dictionary.d_sae, given.settings.score_latents, given.seed)
            windows[name] = StrongestWindows(latents, dictionary.d_sae)
            watchers[name].append(windows[name])
    return windows


def _add_roles(given: Given, name: str, windows: StrongestWindows | None, evaluation: Evaluation) -> None:
    if windows is None:
        evaluation.left_out["input and output scores"] = (
            "evaluate.score_latents is 0"
            if not given.settings.score_latents
            else "the dictionary does not write to the residual stream, so its directions promote no tokens"
        )
        return
    dictionary, settings = given.dictionaries[name], given.settings
    latents = sampled_latents(dictionary.d_sae, settings.score_latents, given.seed)
    promoted = promoted_tokens(given.lm, dictionary, latents)
    outputs = output_scores(
        given.lm,
        dictionary,
        latents,
        promoted,
        prepend_bos=bool(given.store.spec.provenance["packing"]["prepend_bos"]),
    )
    figures, rows = role_figures(latents, windows.input_scores(promoted), outputs, settings.n_resamples, given.seed)
    evaluation.figures |= figures
    evaluation.details["latent_scores"] = rows


def _add_concepts(given: Given, concepts: Mapping[str, ConceptTexts], found: Mapping[str, Evaluation]) -> None:
    """Absorption of the user's own concepts, beside that of the topics."""
    for name, evaluation in found.items():
        dictionary = given.dictionaries[name]
        if not concepts or isinstance(dictionary.sae, Transcoder):
            continue
        W_dec = dictionary.W_dec.float().cpu().numpy()
        results: dict[str, Absorbed | str] = {}
        for title, texts in concepts.items():
            pool = pool_concept(
                given.lm,
                dictionary,
                texts,
                sink_norm=float(
                    given.store.statistics(dictionary.required_hook_name).sink_threshold(given.sink_multiple)
                ),
                prepend_bos=bool(given.store.spec.provenance["packing"]["prepend_bos"]),
            )
            results[title] = texts.absorption(pool, W_dec, given.seed)
        figures, details = absorption_figures(results, given.settings.n_resamples, given.seed)
        for key, figure in figures.items():
            evaluation.figures[key.replace("absorption", "concept_absorption")] = figure
        evaluation.details["concept_absorption"] = details
