"""Causal tests of a run: the strongest confirmed latents of all its audits, and one set for each concept.

RUN/causal/manifest.json   the family of tests with seeds, prompts and doses, written before the first test
RUN/causal/tests.jsonl     a line for each finished test; a run that was cut off goes on after the last
RUN/audit/CONCEPT/         audit.json and report.html with the findings, and the ledger knows their new hash
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipelines.audit.causal.controls import Traits
from pipelines.audit.causal.family import Case, CausalSettings, Kind, Measured, choose_dose, run_family
from pipelines.audit.causal.inference import Budget, RankTest, controls_needed, plan_budget
from pipelines.audit.causal.intervene import Bench
from pipelines.audit.causal.outcomes import Outcome, TokenOdds, single_tokens
from pipelines.audit.causal.prompts import (
    Prompts,
    cut_prompts,
    digest_of,
    encoder_length,
    fit_probe,
    later_hook,
    prompts_of,
)
from pipelines.audit.causal.records import Causal, record_of, with_causal
from pipelines.audit.concepts import Concept, examples_of, topic_examples
from pipelines.audit.ledger import Ledger
from pipelines.audit.manifest import sha256_of_json
from pipelines.audit.report import render_report
from pipelines.audit.result import AuditResult, Candidate, load_result
from pipelines.collect import open_store
from pipelines.config import RunConfig
from pipelines.dictionaries import load_trained
from pipelines.documents import documents_of
from pipelines.errors import UsageError
from pipelines.models import LanguageModel, resolve_model
from pipelines.progress import Reporter
from pipelines.rundir import RunDir, key_of, write_text
from sae import Dictionary

SET_SIZE = 5
"""Latents of a concept's set, at most."""
N_TUNE = 6
"""Neutral prompts on which doses are chosen."""
N_FIT = 48
"""Texts of each class behind a probe and the unit of doses."""
N_VALUES = 64_000_000
"""Latent activations of the corpus that are held at once."""
N_SORTED = 512
"""Latents whose activations are sorted at once."""


class _Chosen(NamedTuple):
    concept: str
    dictionary: str
    latents: tuple[int, ...]


def causal(config: RunConfig, run: RunDir, ui: Reporter, concepts: Sequence[Concept]) -> None:
    """Test the confirmed latents of finished audits; does nothing where that is done.

    Raises:
        UsageError: tests that would take too long, texts that are too short, outcome tokens that are several tokens.
            Finished tests stay.
    """
    results = {c.name: load_result(run.audit(c.name) / "audit.json") for c in concepts}
    key = key_of(
        config.audit.causal.model_dump(mode="json"),
        config.seed,
        {name: [r.manifest_sha256, r.scores_sha256] for name, r in results.items()},
    )
    if run.stage_key("causal") == key and all(r.causal is not None for r in results.values()):
        return
    began = time.monotonic()
    chosen = choose(list(results.values()), config.audit.causal.n_features)
    if not chosen:
        ui.say("causal tests: no audit confirmed a latent, so there is nothing to switch off")
        return
    family = _Family(config, run, ui, {c.name: c for c in concepts}, results, chosen)
    folder = run.path / "causal"
    settings, cases = family.settings, family.cases
    manifest = family.manifest()
    digest = sha256_of_json(manifest)
    written = json.dumps({**manifest, "sha256": digest}, indent=1) + "\n"
    known = {}
    if (folder / "manifest.json").exists() and (folder / "manifest.json").read_text() == written:
        known = read_tests(folder / "tests.jsonl")
    else:
        (folder / "tests.jsonl").unlink(missing_ok=True)
    budget = family.budget()
    ui.say(f"causal tests: {budget.sentence}; manifest {digest}")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "manifest.json", written)

    with ui.stage("causal", total=budget.n_tests, unit="tests", done=len(known)) as bar:

        def keep(place: int, test: Measured) -> None:
            with (folder / "tests.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"case": place, **_plain(test)}) + "\n")
            bar.advance(1)

        try:
            findings = run_family(family.dictionary, cases, settings, known=known, on_test=keep)
        except ValueError as error:
            raise UsageError(f"causal tests: {error} Finished tests are kept in {folder}.") from error
    for name, result in results.items():
        found = Causal(
            manifest_sha256=digest,
            n_tests=budget.n_tests,
            n_controls=budget.n_controls,
            alpha=settings.alpha,
            neutral_reused=family.neutral_reused,
            findings=[
                record_of(
                    finding,
                    dictionary=one.dictionary,
                    prompts=family.prompts[name].source,
                    outcome=family.outcome_title(one),
                )
                for one, finding in zip(chosen, findings, strict=True)
                if one.concept == name
            ],
        )
        write_findings(run.audit(name), result, found)
    run.mark_finished("causal", key, time.monotonic() - began, [folder / "manifest.json", folder / "tests.jsonl"])


def choose(results: Sequence[AuditResult], n_features: int) -> list[_Chosen]:
    """The confirmed latents with the largest z over all audits, then one set for each concept that has two or more."""
    singles = [(r.concept.name, c) for r in results for c in _confirmed(r)]
    singles.sort(key=lambda pair: -pair[1].discover_z)
    out = [_Chosen(name, c.dictionary, (c.latent,)) for name, c in singles[:n_features]]
    for result in results:
        confirmed = _confirmed(result)
        own = [c.latent for c in confirmed if c.dictionary == confirmed[0].dictionary][:SET_SIZE]
        if len(own) > 1:
            out.append(_Chosen(result.concept.name, confirmed[0].dictionary, tuple(own)))
    return out


def _confirmed(result: AuditResult) -> list[Candidate]:
    """Strongest first."""
    found = [c for c in result.candidates if c.claim not in ("not_confirmed", "mentioned")]
    return sorted(found, key=lambda c: -c.discover_z)


def write_findings(folder: Path, result: AuditResult, found: Causal, ledger: Ledger | None = None) -> AuditResult:
    """Put the findings into an audit's files, and their hash into the ledger."""
    figures = {key: getattr(result, key) for key in ("candidates", "verdict", "limits")}
    result = result.model_copy(update={**with_causal(figures, found), "causal": found})
    written = result.model_dump_json(indent=1) + "\n"
    write_text(folder / "report.html", render_report(result))
    write_text(folder / "audit.json", written)
    (ledger or Ledger.default()).finish(
        result.opening, level=result.verdict.level, result_sha256=hashlib.sha256(written.encode()).hexdigest()
    )
    return result


def read_tests(path: Path) -> dict[tuple[int, Kind], Measured]:
    """Finished tests by case and kind; a line that was cut off is left out."""
    found: dict[tuple[int, Kind], Measured] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        place = record.pop("case")
        ranks = {key: RankTest(**{**record[key], "effects": tuple(record[key]["effects"])}) for key in _RANKS}
        found[place, record["kind"]] = Measured(**{**record, **ranks})
    return found


_RANKS = ("matched", "random")


def _plain(test: Measured) -> dict[str, Any]:
    return {**test._asdict(), **{key: getattr(test, key)._asdict() for key in _RANKS}}


class _Family:
    """The cases of a run with all that their tests need."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        ui: Reporter,
        concepts: dict[str, Concept],
        results: dict[str, AuditResult],
        chosen: Sequence[_Chosen],
    ) -> None:
        self._config, self._options, self._chosen, self._results = config, config.audit.causal, chosen, results
        self._concepts = concepts
        self.settings = CausalSettings(alpha=self._options.alpha, seed=config.seed)
        self._store = open_store(config, run)
        self._lm = LanguageModel(resolve_model(config.model), config.model)
        names = sorted({one.dictionary for one in chosen})
        if len(names) > 1:
            raise UsageError(
                f"causal tests take latents of one dictionary, but those of {', '.join(names)} are confirmed: audit "
                "one dictionary a run, or set audit.causal.enabled to false"
            )
        self.dictionary: Dictionary = load_trained(run, names[0])
        self._n = self._options.n_prompts * (4 if self._options.thorough else 1)
        self._documents()
        self.prompts = {name: self._prompts(name) for name in results if any(one.concept == name for one in chosen)}
        self._outcomes = {name: self._outcome(name) for name in {one.concept for one in chosen}}
        self._positive = {name: self._bench(self.prompts[name].positive) for name in self._outcomes}
        self._fit = {name: self._bench(self.prompts[name].fit_positive) for name in self._outcomes}
        self._neutral, self._tune = self._bench(self._neutral_tokens), self._bench(self._tune_tokens)
        self._density, self._strength = self._corpus()
        with ui.stage("causal: doses", total=len(chosen), unit="features") as bar:
            self.cases = []
            for one in chosen:
                self.cases.append(self._case(one))
                bar.advance(1)

    def _documents(self) -> None:
        """Held-out documents that no audit read: of a topic, and neutral ones."""
        start, stop = self._store.split_range("heldout")
        rows = [int(row) for row in np.unique(self._store.contexts(start, stop).document) if row >= 0]
        documents = documents_of(self._store)
        self._rows, self._text, self._topic = rows, documents.text, documents.topic
        used = {e.group.removeprefix("document-") for r in self._results.values() for e in r.examples}
        topics = {c.topic.positive for c in self._concepts.values() if c.topic is not None}
        order = np.random.default_rng([self._config.seed, 1]).permutation(rows)
        self._unused = [int(row) for row in order if str(row) not in used]
        neutral = [self._text[row] for row in self._unused if self._topic[row] not in topics]
        self.neutral_reused = len(neutral) < self._n + N_TUNE
        if self.neutral_reused:  # small corpora: documents that were negatives of an audit serve too
            neutral += [
                self._text[int(row)] for row in order if str(row) in used and self._topic[int(row)] not in topics
            ]
        tokens = self._cut(neutral, self._n + N_TUNE)
        if len(tokens) < 4 + N_TUNE:
            raise UsageError(
                f"only {len(tokens)} held-out documents have {self._options.n_tokens} tokens, causal tests need "
                f"{4 + N_TUNE}: lower audit.causal.n_tokens, or collect more"
            )
        self._tune_tokens, self._neutral_tokens = tokens[:N_TUNE], tokens[N_TUNE:]

    def _cut(self, texts: Sequence[str], n: int) -> torch.Tensor:
        bos = self._config.collect.prepend_bos
        return cut_prompts(self._lm, texts, n=n, n_tokens=self._options.n_tokens, prepend_bos=bos)

    def _prompts(self, name: str) -> Prompts:
        concept = self._concepts[name]
        unused: list[str] = []
        if concept.topic is None:
            examples = examples_of(concept)
        else:
            examples = topic_examples(
                concept,
                doc_ids=[str(row) for row in self._rows],
                topics=[self._topic[row] for row in self._rows],
                texts=[self._text[row] for row in self._rows],
                seed=self._config.seed,
            )
            unused = [self._text[row] for row in self._unused if self._topic[row] == concept.topic.positive]
        return prompts_of(
            self._lm,
            self._results[name],
            {e.digest: e.text for e in examples if e.messages is None},
            unused,
            n=self._n,
            n_fit=N_FIT,
            n_tokens=self._options.n_tokens,
            prepend_bos=self._config.collect.prepend_bos,
        )

    def _outcome(self, name: str) -> Outcome:
        if self._options.outcome == "tokens":
            tokens = self._concepts[name].outcome_tokens
            if not tokens:
                raise UsageError(
                    f"concept {name} has no outcome_tokens: add some, or set audit.causal.outcome to probe"
                )
            return TokenOdds(single_tokens(self._lm.tokenizer, tokens))
        hook = later_hook(
            self.dictionary.required_hook_name, self._options.layers_later, encoder_length(self._lm.model)
        )
        return fit_probe(self._lm, hook, self.prompts[name].fit_positive, self.prompts[name].fit_negative)

    def outcome_title(self, one: _Chosen) -> str:
        """What the effects of a case are measured by."""
        hook = self._outcomes[one.concept].hook_name
        return "log-odds of the outcome tokens" if hook is None else f"probe of the concept at {hook}, in sd"

    def _bench(self, tokens: torch.Tensor) -> Bench:
        return Bench(self._lm.model, self.dictionary, tokens)

    @torch.inference_mode()
    def _corpus(self) -> tuple[np.ndarray, np.ndarray]:
        """How often each latent fires on held-out tokens, and the 99th percentile of its activations where it does."""
        start, stop = self._store.split_range("heldout")
        d_sae, length = self.dictionary.d_sae, self._store.spec.context_length
        n = max(1, min(stop - start, N_VALUES // (d_sae * length)))
        x = self._store.activations(self.dictionary.required_hook_name, start, start + n).float()
        x = x[:, 1:].reshape(-1, x.shape[-1])
        latents = torch.cat([self.dictionary.encode(part) for part in torch.split(x, 2048)])
        count = (latents > 0).sum(0)
        at = (0.01 * count).long()[None]
        parts = zip(torch.split(latents, N_SORTED, dim=1), torch.split(at, N_SORTED, dim=1), strict=True)
        strong = [part.sort(dim=0, descending=True).values.gather(0, rank)[0] for part, rank in parts]
        return (count / len(x)).double().numpy(), torch.cat(strong).double().numpy()

    def _case(self, one: _Chosen) -> Case:
        result = self._results[one.concept]
        strength, auroc = self._strength.copy(), np.full(self.dictionary.d_sae, 0.5)
        place = [d["name"] for d in result.dictionaries].index(one.dictionary)
        for where, latent, value in zip(
            result.discover.dictionary, result.discover.latent, result.discover.auroc, strict=True
        ):
            if where == place:
                auroc[latent] = value
        for latent in one.latents:
            f = self._fit[one.concept].latent(latent)[:, 1:]
            if bool((f > 0).any()):
                strength[latent] = float(f[f > 0].double().quantile(0.99))
        traits = Traits(
            density=self._density,
            decoder_norm=self.dictionary.W_dec.norm(dim=1).double().cpu().numpy(),
            strength=strength,
            auroc=auroc,
        )
        case = Case(
            one.concept,
            one.latents,
            self._positive[one.concept],
            self._neutral,
            self._outcomes[one.concept],
            traits,
        )
        tuned = dataclasses.replace(case, neutral=self._tune)
        return dataclasses.replace(case, dose=choose_dose(self.dictionary, tuned, self.settings))

    def manifest(self) -> dict[str, Any]:
        """The plan; JSON without any text."""
        body = {
            "schema_version": 1,
            "settings": {**dataclasses.asdict(self.settings), "n_controls": self._n_controls},
            "options": self._options.model_dump(mode="json", exclude={"enabled", "max_minutes"}),
            "audits": {name: result.manifest_sha256 for name, result in self._results.items()},
            "tests": [
                {**one._asdict(), "dose": case.dose, "kinds": ["necessity", "sufficiency"]}
                for one, case in zip(self._chosen, self.cases, strict=True)
            ],
            "prompts": {
                "neutral": digest_of(self._neutral_tokens),
                "tune": digest_of(self._tune_tokens),
                **{name: digest_of(self.prompts[name].positive) for name in sorted(self._outcomes)},
            },
        }
        plain: dict[str, Any] = json.loads(json.dumps(body))
        return plain

    @property
    def _n_controls(self) -> int:
        return controls_needed(2 * len(self.cases), self.settings.alpha)

    def budget(self) -> Budget:
        """What the family takes at most, from one timed pass."""
        case = self.cases[0]
        bench = case.neutral
        began = time.perf_counter()
        for _ in bench.run([torch.zeros_like(bench.x)] * bench.at_once, case.outcome):
            pass
        each = (time.perf_counter() - began) / (bench.at_once * len(bench.tokens))
        return plan_budget(
            2 * len(self.cases),
            self._n,
            len(self.settings.doses),
            alpha=self.settings.alpha,
            n_controls=self._n_controls,
            seconds_per_pass=each,
            max_seconds=60 * self._options.max_minutes,
        )
