"""Evaluate several dictionaries from anywhere on one text: one store and one clean model for all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.bring import config_for
from pipelines.check import check_fit
from pipelines.collect import open_store
from pipelines.config import RunConfig
from pipelines.configio import load_config
from pipelines.errors import UsageError
from pipelines.evaluate import measured_on
from pipelines.evaluation import evaluate_dictionaries
from pipelines.evaluation.record import evaluation_record
from pipelines.models import LanguageModel, resolve_model
from pipelines.progress import Reporter
from pipelines.run import execute, open_run
from pipelines.rundir import write_json, write_text
from sae import Dictionary

STORE = "store"
"""Folder of the run that holds the activations."""


def evaluate_all(
    dictionaries: Sequence[str],
    model: str,
    text: str,
    out: Path,
    ui: Reporter,
    *,
    hook: str | None = None,
    tokens: int,
    overrides: Sequence[str] = (),
) -> None:
    """Collect the text at every dictionary's hook, evaluate all of them together, and write `out`/evaluation.json.

    Raises:
        UsageError: a dictionary that cannot be loaded or does not say where it reads, or one that does not fit the
            model's width; two of one name.
    """
    made = {d: config_for(d, model, text, hook=hook, tokens=tokens) for d in dictionaries}
    config = _common_config(list(made.values()), out, overrides)
    run = open_run(config, out / STORE)
    execute(run, ui, ("collect",))
    store = open_store(config, run.dir)
    lm = LanguageModel(resolve_model(config.model), config.model)
    loaded: dict[str, Dictionary] = {}
    for source, one in made.items():
        dictionary = Dictionary.load(source, hook_name=hook)
        name, width = str(one["name"]), store.spec.hook(dictionary.required_hook_name).d_in
        if dictionary.d_in != width:
            raise UsageError(
                f"{source} has d_in {dictionary.d_in}, but {dictionary.hook_name} of this model has width {width}: "
                "choose the hook and the model it was trained on"
            )
        report = check_fit(dictionary.to(lm.device), lm, sink_multiple=config.sinks.multiple)
        if not report.ok:
            ui.say(f"warning: {name}: {report.sentence}")
        loaded[name if name not in loaded else f"{name}-{len(loaded) + 1}"] = dictionary
    found = evaluate_dictionaries(
        store, lm, loaded, config.evaluate, sink_multiple=config.sinks.multiple, seed=config.seed, ui=ui
    )
    write_json(out / "evaluation.json", evaluation_record(measured_on(config, store), found))


def _common_config(configs: Sequence[dict[str, Any]], out: Path, overrides: Sequence[str]) -> RunConfig:
    """The first dictionary's config with the hooks of all, and a context that suits each."""
    import yaml

    hooks = list(dict.fromkeys(hook for one in configs for hook in one["hooks"]))
    length = min(one["collect"]["context_length"] for one in configs)
    common = configs[0] | {"name": "comparison", "hooks": hooks}
    common["collect"] = common["collect"] | {"context_length": length}
    file = out / "comparison.yaml"
    write_text(file, yaml.safe_dump(common, sort_keys=False))
    return load_config(file, list(overrides))
