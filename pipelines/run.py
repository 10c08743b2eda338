"""run: every stage in order, each resumable; a finished run does nothing.

    collect → train → evaluate → label → export → audit

A stage is finished when its marker carries the key of its present inputs: the config sections that it reads and the
keys of the stages before it. A change that would make the stored activations or the trained weights something else is
refused; later stages simply run again.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.config import RunConfig
from pipelines.configio import differing_keys, dump_config, load_config
from pipelines.errors import RunError, UsageError
from pipelines.progress import Reporter
from pipelines.rundir import RunDir, key_of, sweep_partials, write_text
from pipelines.sources import sha256_of
from pipelines.stores import has, place

STAGES = ("collect", "train", "evaluate", "label", "export", "audit")
NEEDS: Mapping[str, tuple[str, ...]] = {
    "collect": (),
    "train": ("collect",),
    "evaluate": ("train",),
    "label": ("train",),
    "export": ("evaluate", "label"),
    "audit": ("label",),
}
"""Stages whose results a stage reads."""
USES_RAY = {"collect", "train"}
"""Stages that start Ray, if they find work for it."""


@dataclass
class Run:
    """A config and the directory where it runs."""

    config: RunConfig
    dir: RunDir

    @cached_property
    def keys(self) -> dict[str, str]:
        """Key of every stage's inputs."""
        sections = stage_sections(self.config)
        keys: dict[str, str] = {}
        for stage in STAGES:
            keys[stage] = key_of(sections[stage], [keys[need] for need in NEEDS[stage]])
        return keys

    def finished(self, stage: str) -> bool:
        """Whether the stage's results are there, for these inputs."""
        if self.dir.stage_key(stage) != self.keys[stage]:
            return False
        where = place(self.config.collect.store or "")
        return stage != "collect" or isinstance(where, Path) or has(where, "seal.json")


def stage_sections(config: RunConfig) -> dict[str, Any]:
    """The parts of the config that decide what each stage produces; how it is spread over workers is left out."""
    data = config.model_dump(mode="json")
    spread = {
        *("n_workers", "cpus_per_worker", "gpus_per_worker", "num_workers", "use_gpu", "checkpoint_every", "device"),
        *(
            "layout",
            "checkpoints_kept",
            "text_workers",
            "capacity_shards",
            "evaluate_every",
            "evaluate_ce_tokens",
            "trackers",
        ),
    }

    def without_spread(section: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if section is None else {key: value for key, value in section.items() if key not in spread}

    return {
        "collect": {
            "model": without_spread(data["model"]),
            "text": data["text"],
            "hooks": data["hooks"],
            "collect": without_spread(data["collect"]),
            "seed": data["seed"],
        },
        "train": {
            "saes": data["saes"],
            "sinks": data["sinks"],
            "train": without_spread(data["train"]),
            "dictionary": data["dictionary"],
        },
        "evaluate": {"evaluate": data["evaluate"]},
        "label": {"label": _without_endpoints(data["label"])},
        "export": {"name": data["name"]},
        "audit": {"audit": data["audit"], "concepts": _concept_digests(config)},
    }


def _without_endpoints(label: dict[str, Any]) -> dict[str, Any]:
    """The label section without what decides where and how fast a language model is asked."""
    ways = {"base_url", "api_key_env", "timeout_s", "max_retries", "max_wait_s", "concurrency"}
    spread = {"n_workers", "gpus_per_worker", "servers", "serve", "give_up_after"}
    llm = {key: value for key, value in (label["llm"] or {}).items() if key not in spread}
    for role in ("explainer", "judge"):
        if llm.get(role):
            llm[role] = {key: value for key, value in llm[role].items() if key not in ways}
    return label | {"llm": llm or None}


def _concept_digests(config: RunConfig) -> list[str]:
    from pipelines.configfiles import concept_path

    try:
        return [sha256_of(concept_path(name)) for name in config.audit.concepts]
    except UsageError:
        return []  # the stage itself reports what is wrong with them


def open_run(config: RunConfig, out: Path) -> Run:
    """The run of a config in a directory, which may be new; one that belongs to another config is refused.

    Raises:
        UsageError: `out` holds activations or weights made with another config; the message lists the differing keys.
    """
    run = Run(config, RunDir(out))
    _refuse_other_config(run)
    return run


def _refuse_other_config(run: Run) -> None:
    if not run.dir.config_path.exists():
        return
    before = load_config(run.dir.config_path)
    old, new = stage_sections(before), stage_sections(run.config)
    begun = {
        "collect": run.dir.store_path.exists() or before.collect.store is not None,
        "train": (run.dir.path / "checkpoints").exists(),
    }
    keys = [key for stage in ("collect", "train") if begun[stage] for key in differing_keys(old[stage], new[stage])]
    if keys:
        raise UsageError(
            f"{run.dir.path} was made with another config (different: {', '.join(keys)}); its activations and "
            f"weights would not fit. Choose another --out, or delete {run.dir.path} to start over"
        )


def save_config(run: Run) -> None:
    """Write config.yaml: every default written out, and the software that is about to run."""
    from pipelines.versions import versions

    made_by = "".join(f"# {name}: {version}\n" for name, version in versions().items())
    write_text(run.dir.config_path, f"# Resolved configuration. Written by:\n{made_by}{dump_config(run.config)}")


def execute(run: Run, ui: Reporter, stages: tuple[str, ...] = STAGES) -> bool:
    """Run the stages that are not finished; returns False when there was nothing to do.

    Raises:
        RunError: a stage is asked for whose inputs are not there.
        UsageError: see `validate`; nothing has been written then.
    """
    todo = [stage for stage in stages if not run.finished(stage)]
    if not todo:
        return False
    _require_inputs(run, todo, stages)
    validate(run, todo)
    with run.dir.lock():
        save_config(run)
        # Not the stores: those have a protocol of their own.
        below = (".stages", "dictionaries", "labels", "labels/*", "audit/*", "checkpoints/*")
        for folder in (run.dir.path, *(folder for pattern in below for folder in run.dir.path.glob(pattern))):
            sweep_partials(folder)
        from pipelines.cluster.local import ray_scope

        for group in _by_engine(todo):
            with ray_scope():
                for stage in group:
                    _run_stage(run, stage, ui)
    return True


def _require_inputs(run: Run, todo: list[str], stages: tuple[str, ...]) -> None:
    known = run.dir.config_path.exists()
    for stage in todo:
        lacking = [need for need in NEEDS[stage] if need not in stages and not run.finished(need)]
        if lacking:
            first = f"sae {lacking[0]} {run.dir.path}" if known else f"sae {lacking[0]} CONFIG --out {run.dir.path}"
            raise RunError(f"`sae {stage}` needs the results of {', '.join(lacking)}: run `{first}` first")


def validate(run: Run, stages: list[str]) -> None:
    """Find the mistakes of later stages before the first one starts.

    Raises:
        UsageError: a concept file, model, hook, text or dictionary that cannot be used, or an API key that is not set.
    """
    if "label" in stages and run.config.label.enabled and run.config.label.llm is not None:
        from pipelines.labels.llm.endpoint import keys_of

        keys_of(run.config.label.llm.endpoints, os.environ)
    if "audit" in stages:
        from pipelines.audit.run import load_concepts

        load_concepts(run.config)
    if "evaluate" in stages and run.config.evaluate.concepts:
        from pipelines.evaluate import concept_texts

        concept_texts(run.config)
    if "collect" in stages:
        from pipelines.collect import hook_widths
        from pipelines.models import pick_device, resolve_model

        pick_device(run.config.model.device)
        widths = hook_widths(run.config, resolve_model(run.config.model))
        from pipelines.corpora import describe

        for text in run.config.text:
            if text.path is not None:
                describe(text)
        from pipelines.dictionaries import load_source
        from pipelines.train import check_settings

        check_settings(run.config, widths)
        if run.config.dictionary is not None:
            hook = run.config.hook_of(next(iter(run.config.saes)))
            load_source(run.config.dictionary, hook, widths[hook])


def _by_engine(stages: list[str]) -> list[list[str]]:
    """Neighbouring stages that may share a Ray session, or need none."""
    groups: list[list[str]] = []
    for stage in stages:
        if groups and (groups[-1][0] in USES_RAY) == (stage in USES_RAY):
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def _run_stage(run: Run, stage: str, ui: Reporter) -> None:
    began = time.monotonic()
    run.dir.event("stage started", stage=stage)
    try:
        figures = _function(stage)(run.config, run.dir, ui)
    except BaseException as error:
        run.dir.event("stage failed", stage=stage, error=f"{type(error).__name__}: {error}"[:500])
        raise
    seconds = time.monotonic() - began
    run.dir.mark_finished(stage, run.keys[stage], seconds, _results(run, stage, figures))
    run.dir.event("stage finished", stage=stage, seconds=round(seconds, 2), figures=figures)


def _results(run: Run, stage: str, figures: Any) -> list[Path]:
    """Files without which a stage is not finished, whatever its marker says."""
    names = run.config.saes
    match stage:
        case "collect":
            from pipelines.collect import store_path

            where = store_path(run.config, run.dir)
            return [where / "seal.json"] if isinstance(where, Path) else []  # else `Run.finished` looks
        case "train":
            from pipelines.dictionaries import dictionary_files

            return [file for name in names for file in dictionary_files(run.dir.trained(name))]
        case "evaluate":
            return [run.dir.metrics_path, run.dir.evaluation_path]
        case "label":
            return [run.dir.labels(name) / "features.parquet" for name in names if run.config.label.enabled]
        case "export":
            from pipelines.dictionaries import dictionary_files

            return [file for name in names for file in dictionary_files(run.dir.dictionary(name))]
        case "audit":
            return [Path(verdict["report"]) for verdict in figures.values()]
    raise AssertionError(stage)


def _function(stage: str) -> Callable[[RunConfig, RunDir, Reporter], Any]:
    """The stage's function, imported when it is needed."""
    match stage:
        case "collect":
            from pipelines.collect import collect

            return collect
        case "train":
            from pipelines.train import train

            return train
        case "evaluate":
            from pipelines.evaluate import evaluate

            return evaluate
        case "label":
            from pipelines.labels.run import label

            return label
        case "export":
            from pipelines.export import export

            return export
        case "audit":
            from pipelines.audit.run import audit

            return audit
    raise AssertionError(stage)
