"""Labels and scores of delphi: explanations/HOOKPOINT_latentN.txt (a JSON string), scores/SCORER/HOOKPOINT_latentN.txt.

A score file lists the examples that the judge saw. delphi leaves answers that it could not parse out of its figures;
the balanced accuracy taken from here counts them as wrong, like ours.
"""

import json
import re
from pathlib import Path
from typing import Any

from pipelines.errors import UsageError
from pipelines.labels.external.neuronpedia import sha256_of
from pipelines.labels.external.records import ImportedLabel, Problems, label_of

_NAME = re.compile(r"(?P<hook>.*)_latent(?P<latent>\d{1,9})")
_NO_LABEL = "Explanation could not be parsed."
"""What delphi writes in place of a label when the explainer failed."""


def read_delphi(path: Path, layer: str | None = None) -> tuple[list[ImportedLabel], int]:
    """Labels of a results folder, and how many of its files hold delphi's own note that the explainer failed.

    Args:
        path: the folder with `explanations/`, or that folder.
        layer: hookpoint, where there are several.

    Raises:
        UsageError: no such files, a file that holds no label, or several hookpoints and no `layer`.
    """
    folder = path / "explanations" if (path / "explanations").is_dir() else path
    named = [(file, match) for file in sorted(folder.glob("*.txt")) if (match := _NAME.fullmatch(file.stem))]
    hooks = sorted({match["hook"] for _, match in named})
    if layer is not None:
        named = [(file, match) for file, match in named if match["hook"] in (layer, layer.replace("/", "--"))]
    elif len(hooks) > 1:
        raise UsageError(f"{path} holds labels of several hookpoints ({', '.join(hooks)}): choose one with --layer")
    if not named:
        raise UsageError(f"{path} has no explanations/HOOKPOINT_latentN.txt" + (f" of {layer}" if layer else ""))
    model = _explainer(path)
    problems, labels, n_failed = Problems("delphi's results"), list[ImportedLabel](), 0
    for file, match in named:
        try:
            text = label_of(_json(file))
        except (ValueError, RecursionError, OSError) as error:
            problems.add(file, 1, str(error))
            continue
        if text == _NO_LABEL:
            n_failed += 1
            continue
        claimed = _scores(folder.parent / "scores", file.name, problems)
        labels.append(
            ImportedLabel(
                latent=int(match["latent"]),
                source="delphi",
                label=text,
                author=None,
                date=None,
                note=None,
                method=model,
                claimed=claimed,
                file=file.name,
                line=1,
                sha256=sha256_of(file),
            )
        )
    problems.stop()
    return sorted(labels, key=lambda label: label.latent), n_failed


def _explainer(path: Path) -> str:
    for file in (path / "run_config.json", path.parent / "run_config.json"):
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict):
            return str(config.get("explainer_model") or "")[:120]
    return ""


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _scores(folder: Path, name: str, problems: Problems) -> dict[str, float]:
    """delphi's balanced accuracy by scorer."""
    claimed = {}
    for file in sorted(folder.glob(f"*/{name}")):
        try:
            examples = _json(file)
            active = [bool(example.get("activating", example.get("ground_truth"))) for example in examples]
            said = [example.get("prediction") for example in examples]
        except (ValueError, AttributeError, TypeError, RecursionError, OSError) as error:
            problems.add(file, 1, f"it holds no list of scored examples ({error})")
            continue
        right = [answer is not None and bool(answer) == truth for answer, truth in zip(said, active, strict=True)]
        sides = [[ok for ok, truth in zip(right, active, strict=True) if truth is side] for side in (True, False)]
        if all(sides):
            claimed[file.parent.name] = sum(sum(side) / len(side) for side in sides) / 2
    return claimed
