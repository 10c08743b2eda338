"""The model card of a dictionary, README.md: what it is, how to load it, how good it is, what it comes from."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.licences import Licence, licence_of
from sae import Dictionary
from sae.interop.saelens import saelens_reads

FIGURES = [
    ("L0", "l0", "mean active latents a token"),
    ("FVU", "fvu", "unexplained variance; lower is better"),
    ("CE loss score", "ce_loss_score", "loss recovered by the splice; higher is better"),
    ("KL score", "kl_div_score", "higher is better"),
    ("Silent latents", "dead_share", "share silent on the {n_heldout_tokens:,} held-out tokens"),
    ("Labelled", "label_share_labelled", "share of live latents whose label passed its held-out test"),
    (
        "Surviving labels",
        "label_share_surviving",
        "of live latents: the label also holds against the same tokens elsewhere and the same documents",
    ),
    ("FVU, all tokens", "fvu_all", "attention sinks included"),
    ("CE loss score, all tokens", "ce_loss_score_all", "attention sinks spliced too"),
]
_OURS_ALONE = "SAELens has no such architecture and does not read the folder."


def model_card(title: str, dictionary: Dictionary, metrics: Mapping[str, Any]) -> str:
    """The card of one dictionary with provenance.

    Args:
        title: such as "run / SAE".
    """
    provenance = dictionary.provenance
    model = licence_of(str(provenance["model_name"]))
    texts = [licence_of(str(text["origin"])) for text in provenance["text"]]
    hooks = "`, `".join(dictionary.hook_names or (provenance["hook_name"],))
    reads = "SAELens reads the folder as well (`SAE.load_from_disk`)."
    return f"""---
{front_matter([model], texts)}---

# {title}

A {kind(dictionary)} on `{hooks}` of `{provenance["model_name"]}`.

```python
from sae import Dictionary

d = Dictionary.load("path/to/this/folder")
latents = d.encode(x)  # (..., d_in) -> (..., d_sae)
```

{reads if saelens_reads(dictionary.config) else _OURS_ALONE}

| held-out figure | value | |
|---|---|---|
{figures(metrics)}

Figures are over tokens that are not attention sinks, unless they say otherwise.

## Licences

Model

- {model.line()}

Texts

{"".join(f"- {text.line()}{chr(10)}" for text in texts)}
They apply to what is derived from them. {_about_contexts(texts)}

## Files

`features.parquet` has one row per latent, `examples.parquet` contexts, `evaluation.json` every figure with its interval
and definition, `dictionary.json` the full provenance; how the texts were packed:

```json
{json.dumps(provenance.get("packing"), indent=2)}
```

## Citation

{citation(title, provenance)}"""


def kind(dictionary: Dictionary) -> str:
    """The architecture in words."""
    name: str = dictionary.config.architecture
    return name if name in ("transcoder", "crosscoder") else f"{name} sparse autoencoder"


def front_matter(models: Sequence[Licence], texts: Sequence[Licence]) -> str:
    """YAML that the Hugging Face Hub reads: repositories of models and texts, where they are ones."""
    lines = ["library_name: sae-pipelines", "tags: [sparse-autoencoder, interpretability]"]
    for key, licences in (("base_model", models), ("datasets", texts)):
        names = sorted({licence.source for licence in licences if _is_repository(licence.source)})
        if names:
            lines.append(f"{key}: [{', '.join(json.dumps(name) for name in names)}]")
    return "\n".join(lines) + "\n"


def _is_repository(source: str) -> bool:
    return source.count("/") == 1 and "://" not in source and not source.startswith(("/", ".", "~"))


def figures(metrics: Mapping[str, Any]) -> str:
    """Rows of a Markdown table, of the figures that there are."""
    n_heldout = metrics.get("n_heldout_tokens", 0)
    return "\n".join(
        f"| {title} | {metrics[key]:.4g} | {note.format(n_heldout_tokens=n_heldout)} |"
        for title, key, note in FIGURES
        if metrics.get(key) is not None
    )


def _about_contexts(texts: Sequence[Licence]) -> str:
    if any(text.share_alike for text in texts):
        return (
            "`examples.parquet` quotes the texts and is passed on under the licence of each, which asks for "
            "attribution and the same licence for what is made of it."
        )
    return "`examples.parquet` quotes the texts."


def citation(title: str, provenance: Mapping[str, Any]) -> str:
    """BibTeX of the tool and of the dictionary itself, whose author is whoever publishes it."""
    versions = provenance.get("versions") or {}
    key = "".join(character for character in title.replace(" / ", "-") if character.isalnum() or character == "-")
    return f"""```bibtex
@misc{{{key or "dictionary"},
  title = {{{title}: a dictionary of {provenance["hook_name"]} of {provenance["model_name"]}}},
  note  = {{trained with sae-pipelines}}
}}
@software{{sae-pipelines,
  title   = {{sae-pipelines}},
  version = {{{versions.get("sae-pipelines", "0.1.0")}}}
}}
```
"""


def index_card(names: Sequence[str], cards: Mapping[str, Dictionary]) -> str:
    """README.md of a repository of several dictionaries.

    Args:
        names: every subfolder that holds one.
        cards: the dictionaries at hand, by subfolder.
    """
    rows = []
    for name in names:
        d = cards.get(name)
        if d is None:
            rows.append(f"| [{name}]({name}) | | | | |")
            continue
        l0, fvu = (f"{d.metrics[key]:.4g}" if key in d.metrics else "" for key in ("l0", "fvu"))
        rows.append(f"| [{name}]({name}) | {kind(d)} of {d.d_sae:,} latents | `{d.hook_name}` | {l0} | {fvu} |")
    models = [licence_of(str(d.provenance["model_name"])) for d in cards.values() if "model_name" in d.provenance]
    texts = [licence_of(str(text["origin"])) for d in cards.values() for text in d.provenance.get("text", ())]
    table = "\n".join(rows)
    first = names[0] if names else ""
    return f"""---
{front_matter(models, texts)}---

# Dictionaries

| folder | what | hook | L0 | FVU |
|---|---|---|---|---|
{table}

```python
import pipelines.hub
from sae import Dictionary

d = Dictionary.load("this/repository", subfolder="{first}")
```

Each folder's README.md has figures, licences and citation.
"""
