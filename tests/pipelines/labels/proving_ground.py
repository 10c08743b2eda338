"""The proving ground: labels of a real SAE, trained on planted features whose rules are known, held against the truth.

    rules ──▶ activations (a direction per rule, summed) ──▶ store ──▶ sae.Trainer ──▶ latents ──▶ label_dictionary
      └──────────────────────────────────── graded against ────────────────────────────────────────────┘

A planted feature *belongs* to a latent whose decoder row meets its direction with a cosine of at least `COSINE`. An
accepted label is *right* if on held-out documents the tokens on which it holds and those on which a feature that
belongs to the latent is planted have a Jaccard index (intersection over union) of at least `JACCARD`. For the parent of
a planted absorption the rule without its child's tokens counts too: that is what an absorbing latent fires on. A label
of a latent to which no feature belongs is wrong.

    precision = right labels / accepted labels, over all latents
    recall    = expressible rules with a right label on some latent / expressible rules
    abstained = outside rules without any accepted label on their best latent / outside rules
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from proving_corpus import CONTEXT_LENGTH, Corpus, holds, make_corpus
from proving_rules import ABSORPTIONS, CONFOUNDS, EXPRESSIBLE, N_TOPICS, OUTSIDE, QUICK, Rule
from torch import Tensor
from torch.nn.functional import normalize

from pipelines.documents import DOCUMENTS_FILE, Documents
from pipelines.labels.rules import Views
from pipelines.labels.stage import label_dictionary
from pipelines.latents import compute_latents
from pipelines.progress import SilentReporter
from pipelines.rundir import RunDir
from sae import BatchTopKConfig, Dictionary, Trainer, TrainerConfig, build, fit_normaliser
from storage import ActivationStore, ActivationWriter, HookSpec, StoreSpec

HOOK = "model.layers.1"
COSINE, JACCARD = 0.6, 0.8
D_IN = 64
NOISE = 0.05


@dataclass(frozen=True)
class Size:
    """How large a proving ground is."""

    rules: tuple[Rule, ...]
    n_tokens: int
    d_sae: int
    k: int
    """Active latents a token, and the mean number of planted features of a token."""
    n_steps: int
    batch_size: int = 512


FULL = Size(EXPRESSIBLE + OUTSIDE, 400_000, 128, 3, 4000)
SMALL = Size(tuple(rule for rule in EXPRESSIBLE + OUTSIDE if rule.name in QUICK), 60_000, 32, 1, 200, 256)
N_FILLERS = 12
"""Planted features without a rule, drawn by chance, that bring the mean number of features of a token to k."""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Activations with known features."""

    corpus: Corpus
    rules: tuple[Rule, ...]
    on: NDArray[np.bool_]
    """[n_rules, n_tokens]"""
    directions: Tensor
    """[n_rules, d_in], unit rows"""
    x: Tensor
    """[n_tokens, d_in]"""


@dataclass(frozen=True, kw_only=True)
class Graded:
    """The labels of one dictionary against the truth."""

    n_accepted: int
    n_right: int
    recalled: dict[str, bool]
    """By expressible rule."""
    abstained: dict[str, bool]
    """By rule outside of the grammar."""
    found: dict[str, float]
    """By rule: the largest cosine of a decoder row with its direction."""
    labels: dict[str, str]
    """By rule: the label of its best latent, or what became of it."""
    wrong: list[str]
    """Accepted labels that are wrong, with the nearest rule."""

    @property
    def precision(self) -> float:
        return self.n_right / self.n_accepted if self.n_accepted else float("nan")

    @property
    def recall(self) -> float:
        return sum(self.recalled.values()) / len(self.recalled)

    def table(self) -> str:
        """What became of every rule, for people."""
        lines = []
        for name, cosine in self.found.items():
            if name in self.recalled:
                verdict = "right" if self.recalled[name] else "MISSED"
            else:
                verdict = "abstained" if self.abstained[name] else "LABELLED"
            lines.append(f"{name:46.46} {cosine:5.2f}  {verdict:9}  {self.labels[name][:90]}")
        return "\n".join([*lines, *(f"wrong: {text}" for text in self.wrong)])


def plant(size: Size, seed: int = 0) -> Planted:
    """x = sum over features of c * direction where it is on, c from U(0.5, 1.5), plus noise.

    The features are the rules and the fillers. The child of an absorption has the c of its parent, so that one latent
    for both is the sparsest code.
    """
    corpus = make_corpus(size.n_tokens, seed=seed)
    on = np.stack([holds(rule, corpus, seed) for rule in size.rules])
    missing = (size.k - on.sum(0).mean()) / N_FILLERS
    fillers = np.random.default_rng([seed, 1]).random((N_FILLERS, on.shape[1])) < missing
    generator = torch.Generator().manual_seed(seed)
    directions = normalize(torch.randn(len(on) + N_FILLERS, D_IN, generator=generator), dim=1)
    strength = 0.5 + torch.rand(on.shape[1], len(directions), generator=generator)
    names = [rule.name for rule in size.rules]
    for parent, child in ABSORPTIONS.items():
        strength[:, names.index(child)] = strength[:, names.index(parent)]
    active = strength * torch.from_numpy(np.concatenate([on, fillers]).T)
    x = active @ directions + NOISE * torch.randn(len(active), D_IN, generator=generator)
    return Planted(corpus=corpus, rules=size.rules, on=on, directions=directions[: len(on)], x=x)


def write_store(planted: Planted, path: Path) -> ActivationStore:
    """The planted activations as an activation store, with the documents and their topics."""
    table, topic = planted.corpus.table, planted.corpus.topic
    n_contexts, shape = table.n_tokens // CONTEXT_LENGTH, (-1, CONTEXT_LENGTH)
    spec = StoreSpec(
        n_contexts=n_contexts,
        context_length=CONTEXT_LENGTH,
        contexts_per_shard=-(-n_contexts // 8),
        n_train_contexts=table.n_train // CONTEXT_LENGTH,
        hooks=(HookSpec(name=HOOK, d_in=D_IN, dtype="float32"),),
        provenance={"packing": {"isolate_documents": True}},
    )
    numbers = [str(i) for i in range(len(topic))]
    heldout = set(np.unique(table.document[table.n_train :]).tolist())
    documents = Documents.of(
        id=numbers,
        source=["planted"] * len(topic),
        title=numbers,
        topic=[f"topic {t}" for t in topic],
        split=["heldout" if i in heldout else "train" for i in range(len(topic))],
        n_tokens=np.bincount(table.document, minlength=len(topic)).tolist(),
        text=_texts(planted.corpus),
    )
    writer = ActivationWriter.create(
        path,
        spec,
        tokens=table.token.reshape(shape),
        document=table.document.reshape(shape),
        position=table.position.reshape(shape),
        sidecars={DOCUMENTS_FILE: documents.to_parquet()},
    )
    for shard in writer.missing():
        start, stop = spec.shard_range(shard)
        rows = planted.x[start * CONTEXT_LENGTH : stop * CONTEXT_LENGTH]
        writer.write_shard(shard, {HOOK: rows.numpy().reshape(-1, CONTEXT_LENGTH, D_IN)})
    writer.seal()
    return ActivationStore.open(path)


def _texts(corpus: Corpus) -> list[str]:
    pieces = [corpus.strings[token] for token in corpus.table.token.tolist()]
    ends = np.flatnonzero(np.diff(corpus.table.document, append=-1)) + 1
    return ["".join(pieces[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def train(planted: Planted, size: Size, seed: int = 0) -> Dictionary:
    """A BatchTopK SAE on the train tokens."""
    x = planted.x[torch.from_numpy(planted.corpus.table.rows("train"))]

    def batches() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(size.n_steps):
            yield x[torch.randint(len(x), (size.batch_size,), generator=generator)]

    trainer = Trainer(
        build(BatchTopKConfig(d_in=D_IN, d_sae=size.d_sae, k=size.k), seed=seed),
        TrainerConfig(lr=3e-3),
        size.n_steps,
        normalisers=[fit_normaliser(x[:8192], "scale")],
    )
    trainer.fit(batches())
    return Dictionary(trainer.export(), hook_name=HOOK)


def label(planted: Planted, dictionary: Dictionary, folder: Path, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of features.parquet, through the stages that a run has."""
    store = write_store(planted, folder / "store")
    run = RunDir(folder)
    latents = compute_latents(store, dictionary, run, "main", SilentReporter(), sink_multiple=100.0, digest="planted")
    label_dictionary(
        store,
        latents,
        dictionary,
        planted.corpus.strings,
        None,
        run.labels("main"),
        SilentReporter(),
        seed=seed,
        sink_multiple=100.0,
    )
    rows: list[dict[str, Any]] = pq.read_table(run.labels("main") / "features.parquet").to_pylist()
    return rows


def extensions(corpus: Corpus, rows: Sequence[dict[str, Any]]) -> Callable[[int], NDArray[np.bool_]]:
    """Where the accepted label of a latent holds, one entry per token row."""
    table = corpus.table
    topics = dataclasses.replace(
        table, topic=corpus.topic[table.document].astype(np.int16), topics=[f"topic {t}" for t in range(N_TOPICS)]
    )
    views = Views(topics, corpus.strings)

    def extension(latent: int) -> NDArray[np.bool_]:
        rule = views.of_data(json.loads(rows[latent]["rule"]))
        return views.score(rule, np.arange(table.n_tokens)) > 0

    return extension


def grade(planted: Planted, dictionary: Dictionary, rows: Sequence[dict[str, Any]]) -> Graded:
    """Hold every accepted label against the planted features; see the module docstring."""
    cosine = (normalize(dictionary.W_dec, dim=1) @ planted.directions.T).numpy()
    heldout = planted.corpus.table.rows("heldout")
    truths = _truths(planted, heldout)
    names = [rule.name for rule in planted.rules]
    extension = extensions(planted.corpus, rows)
    recalled = {rule.name: False for rule in planted.rules if rule in EXPRESSIBLE}
    n_right, wrong = 0, []
    accepted = [i for i, row in enumerate(rows) if row["labelled"]]
    for latent in accepted:
        claimed = extension(latent)[heldout]
        right = [
            names[f]
            for f in np.flatnonzero(cosine[latent] >= COSINE)
            if max(_jaccard(claimed, truth) for truth in truths[names[f]]) >= JACCARD
        ]
        n_right += bool(right)
        recalled |= {name: True for name in right if name in recalled}
        if not right:
            nearest = int(cosine[latent].argmax())
            wrong.append(
                f"{rows[latent]['label']} [latent {latent}: {names[nearest]}, cosine {cosine[latent, nearest]:.2f}, "
                f"Jaccard {max(_jaccard(claimed, truth) for truth in truths[names[nearest]]):.2f}]"
            )
    best = cosine.argmax(0)
    return Graded(
        n_accepted=len(accepted),
        n_right=n_right,
        recalled=recalled,
        abstained={r.name: not rows[best[f]]["labelled"] for f, r in enumerate(planted.rules) if r in OUTSIDE},
        found={name: float(cosine[:, f].max()) for f, name in enumerate(names)},
        labels={name: _say(rows[best[f]]) for f, name in enumerate(names)},
        wrong=wrong,
    )


def _truths(planted: Planted, heldout: NDArray[np.int64]) -> dict[str, list[NDArray[np.bool_]]]:
    """By rule: what a right label may hold on."""
    on = {rule.name: planted.on[f, heldout] for f, rule in enumerate(planted.rules)}
    return {
        name: [here, here & ~on[ABSORPTIONS[name]]] if ABSORPTIONS.get(name) in on else [here]
        for name, here in on.items()
    }


def _jaccard(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def _say(row: dict[str, Any]) -> str:
    if row["labelled"]:
        return str(row["label"])
    score = row["detection_balanced_accuracy"]
    return f"({row['label_kind']}; candidate {row['candidate']}, balanced accuracy {score and round(score, 2)})"


def prove(size: Size, folder: Path, seed: int = 0) -> tuple[Planted, Dictionary, list[dict[str, Any]], Graded]:
    """Plant, train, label and grade."""
    planted = plant(size, seed)
    dictionary = train(planted, size, seed)
    rows = label(planted, dictionary, folder, seed)
    return planted, dictionary, rows, grade(planted, dictionary, rows)


__all__ = ["ABSORPTIONS", "CONFOUNDS", "FULL", "SMALL", "Graded", "Planted", "Size", "grade", "prove", "train"]
