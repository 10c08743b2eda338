"""Whether a dictionary that was not trained by the run fits the run's model: checked once, and said by every stage.

A misfit is no error, since the figures that tell it are of a small sample; a wrong width is one, found earlier.
"""

from dataclasses import asdict
from typing import Any

from pipelines.config import RunConfig
from pipelines.models import LanguageModel
from pipelines.progress import Reporter
from pipelines.rundir import RunDir, key_of, read_json, write_json
from pipelines.sample import sample_tokens
from sae import CheckReport, Dictionary, check


def check_fit(dictionary: Dictionary, lm: LanguageModel, *, sink_multiple: float = 3.0) -> CheckReport:
    """Check a dictionary on the bundled text; see `sae.check`. Both must be on one device.

    Raises:
        ValueError: the model lacks its hook, or has another width there.
    """
    return check(
        dictionary,
        lm.model,
        sample_tokens(lm.tokenizer).to(lm.device),
        bos_token_id=lm.tokenizer.bos_token_id,
        model_name=lm.model_id,
        sink_multiple=sink_multiple,
    )


def warn_of_misfit(
    config: RunConfig, run: RunDir, name: str, dictionary: Dictionary, lm: LanguageModel, ui: Reporter
) -> dict[str, Any] | None:
    """Say so if a dictionary from elsewhere does not fit the model.

    Returns: the report as a JSON object, also kept beside the trained dictionary; None for one that the run trained.
    """
    if config.dictionary is None:
        return None
    from pipelines.latents import dictionary_digest

    file = run.checkpoints(name) / "check.json"
    key = key_of(dictionary_digest(run.trained(name)), lm.resolved.provenance(), config.sinks.multiple)
    record = read_json(file) if file.exists() else {}
    if record.get("key") != key:
        report = check_fit(dictionary.to(lm.device), lm, sink_multiple=config.sinks.multiple)
        record = {"key": key, **asdict(report)}
        write_json(file, record)
        run.event(
            "dictionary fits" if report.ok else "dictionary does not fit",
            sae=name,
            sentence=report.sentence,
            cause=report.cause,
            fvu=report.own.fvu,
            l0=report.own.l0,
            norm=report.own.norm,
        )
    if not record["ok"]:
        ui.say(f"warning: {name}: {record['sentence']}")
    return record
