"""Write the pages of a dictionary.

    index.html      every latent in a table that is searched, sorted and filtered
    feature.html    one latent: feature.html#123
    *.css, *.js     style and programs, the same for every dictionary
    data/           meta.js; index.js, the columns of the table; block-N.js, everything about `BLOCK` latents

They open from a folder: data are scripts, since a page opened that way may not fetch. Equal tables give equal bytes.
"""

from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from pipelines.pages.columns import status_of
from pipelines.pages.contexts import Contexts
from pipelines.pages.neighbours import nearest_neighbours
from pipelines.pages.script import call, json_text
from pipelines.pages.tables import EXAMPLES, OtherLabels, index_of, meta_of, read_features
from pipelines.rundir import replacing_directory
from sae import Dictionary
from sae.search import Neighbour
from sae.spelling import Speller

BLOCK = 64
"""Latents whose data are loaded together."""
N_NEIGHBOURS = 10
_STATIC = ("index.html", "feature.html", "style.css", "common.js", "charts.js", "index.js", "feature.js")


def write_pages(
    dictionary: Dictionary, tables: Path, target: Path, *, title: str, speller: Speller | None = None
) -> Path:
    """Write the pages into `target`, which is replaced as a whole; returns index.html.

    Args:
        tables: folder of features.parquet and, where they are, examples.parquet and labels.parquet.
        title: such as "run / SAE".
        speller: of the model's tokenizer; without it contexts are shown, but not which of their tokens fire.
    Raises:
        UsageError: there is no features.parquet, or it is of another dictionary.
    """
    d_sae = dictionary.d_sae
    features, others = read_features(tables, d_sae), OtherLabels(tables)
    contexts = Contexts(tables / EXAMPLES, speller) if (tables / EXAMPLES).exists() else None
    index = index_of(features, others)
    neighbours = nearest_neighbours(dictionary.W_dec.cpu(), N_NEIGHBOURS)
    names = json_text({"columns": features.column_names, "contexts": contexts.fields if contexts else []})
    with replacing_directory(target) as partial:
        data = partial / "data"
        data.mkdir()
        (data / "meta.js").write_bytes(call("Pages.meta", json_text(meta_of(dictionary, features, title, BLOCK))))
        (data / "index.js").write_bytes(call("Pages.index", json_text(index)))
        for number, start in enumerate(range(0, d_sae, BLOCK)):
            stop = min(start + BLOCK, d_sae)
            records = zip(
                features.slice(start, stop - start).to_pylist(),
                islice(neighbours, stop - start),
                others.block(start, stop),
                contexts.block(start, stop) if contexts else [[]] * (stop - start),
                strict=True,
            )
            block = ",\n".join(_record(*record, index["label"]) for record in records)
            (data / f"block-{number}.js").write_bytes(call("Pages.block", str(number), names, f"[{block}]"))
        static = resources.files("pipelines.pages").joinpath("static")
        for name in _STATIC:
            (partial / name).write_bytes(static.joinpath(name).read_bytes())
    return target / "index.html"


def _record(
    row: dict[str, Any],
    neighbours: list[Neighbour],
    others: list[dict[str, Any]],
    contexts: list[str],
    labels: list[str | None],
) -> str:
    """Everything about one latent, as JSON."""
    fact = {
        "status": status_of(row),
        "columns": list(row.values()),
        "neighbours": [(near.latent, near.cosine, labels[near.latent]) for near in neighbours],
        "others": [{name: value for name, value in other.items() if value is not None} for other in others],
    }
    return f'{json_text(fact)[:-1]},"contexts":[{",".join(contexts)}]}}'
