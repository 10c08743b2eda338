"""label, as a stage of a run: latents of the whole store, then a label and its test for every latent."""

import shutil
from dataclasses import asdict
from typing import Any

from pipelines.check import warn_of_misfit
from pipelines.collect import open_store
from pipelines.config import RunConfig
from pipelines.dictionaries import load_trained
from pipelines.errors import RunError
from pipelines.labels.gather import gather
from pipelines.labels.in_model import InModel
from pipelines.labels.settings import LabelSettings
from pipelines.labels.stage import label_dictionary, read_token_table
from pipelines.latents import compute_latents, dictionary_digest
from pipelines.models import LanguageModel, resolve_model
from pipelines.progress import Reporter
from pipelines.rundir import RunDir


def label(config: RunConfig, run: RunDir, ui: Reporter) -> dict[str, dict[str, Any]]:
    """Label every SAE of the run; returns the summaries, which also go to metrics.json."""
    if not config.label.enabled:
        for name in config.saes:
            shutil.rmtree(run.labels(name), ignore_errors=True)
            run.drop_metrics(f"{name}.label_")
        return {}
    store = open_store(config, run)
    lm = LanguageModel(resolve_model(config.model), config.model)
    figures = {}
    trouble = None
    for name in config.saes:
        dictionary = load_trained(run, name)
        warn_of_misfit(config, run, name, dictionary, lm, ui)
        latents = compute_latents(
            store,
            dictionary,
            run,
            name,
            ui,
            sink_multiple=config.sinks.multiple,
            digest=dictionary_digest(run.trained(name)),
        )
        run.labels(name).mkdir(parents=True, exist_ok=True)
        # The logit lens reads a direction of the residual stream; other hooks have another width or meaning.
        written = dictionary.output_hooks
        in_stream = len(written) == 1 and written[0].partition(":")[0].rpartition(".")[2].isdigit()
        unembedding = lm.unembedding() if in_stream else None
        try:
            summary = label_dictionary(
                store,
                latents,
                dictionary,
                lm.token_strings(),
                unembedding,
                run.labels(name),
                ui,
                seed=config.seed,
                sink_multiple=config.sinks.multiple,
                selection=config.selection("label"),
                config=LabelSettings(min_detection=config.label.min_detection),
            )
        except ValueError as error:
            raise RunError(f"labelling {name}: {error}") from error
        found = asdict(summary)
        if config.label.edits.n_latents or (config.label.output_test.n_latents and unembedding is not None):
            hook, multiple = dictionary.required_hook_name, config.sinks.multiple
            in_model = InModel(
                lm,
                dictionary,
                read_token_table(store, hook, multiple, selection=config.selection("label")),
                latents,
                run.labels(name),
                max_norm=multiple * store.statistics(hook).median_norm,
                seed=config.seed,
            )
            try:
                if config.label.edits.n_latents:
                    found |= in_model.edits(config.label.edits, ui)
                if config.label.output_test.n_latents and unembedding is not None:
                    found |= in_model.output_test(config.label.output_test, ui)
            except ValueError as error:
                raise RunError(f"testing labels of {name} in the model: {error}") from error
        figures[name] = {f"label_{key}": value for key, value in found.items()}
        gathered = gather(config, run, name, store, latents, dictionary, lm.token_strings(), ui)
        figures[name] |= gathered.figures
        trouble = trouble or gathered.trouble
        run.drop_metrics(f"{name}.label_")
        run.update_metrics(name, figures[name])
    if trouble is not None:
        raise trouble
    return figures
