"""Any checkpoint of a run as a dictionary folder: what training would have exported, had it ended there."""

from pathlib import Path

from pipelines.collect import open_store
from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.rundir import RunDir
from pipelines.train import make_job
from pipelines.training.calibration import write_trained
from sae.checkpoint import checkpoints, exported_sae, load_checkpoint


def export_checkpoint(config: RunConfig, run: RunDir, name: str, step: int, target: Path | None = None) -> Path:
    """Write the dictionary of one checkpoint, its normalisation folded in and its threshold calibrated.

    Args:
        target: by default `dictionaries/SAE@STEP` of the run.
    Raises:
        UsageError: there is no such SAE or checkpoint, it is damaged, or `target` exists.
    """
    if name not in config.saes:
        raise UsageError(f"the run has no SAE {name!r}: choose from {', '.join(config.saes)}")
    there = {int(folder.name.removeprefix("step-")): folder for folder in checkpoints(run.checkpoints(name))}
    if step not in there:
        found = ", ".join(map(str, there)) or "none"
        raise UsageError(f"{run.checkpoints(name)} has no checkpoint of step {step}: choose from {found}")
    target = target or run.dictionary(f"{name}@{step}")
    if target.exists():
        raise UsageError(f"{target} exists: choose another --to, or remove it")
    try:
        state = load_checkpoint(there[step])
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    store = open_store(config, run)
    job = make_job(config, run, name, store)
    (member,) = job.members
    write_trained(
        exported_sae(state),
        target,
        store=store,
        hooks=member.hooks,
        sinks=job.sinks,
        selection=job.selection,
        provenance={**member.provenance, "step": state["step"], "n_tokens": state["n_tokens"]},
    )
    return target
