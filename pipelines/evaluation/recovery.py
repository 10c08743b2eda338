"""How much of the model's predictions survives when a reconstruction takes the place of the activations.

        ce_loss_score = (CE_zero - CE_spliced) / (CE_zero - CE_clean)
        kl_div_score  = 1 - KL(clean‖spliced) / KL(clean‖zero)

as SAEBench defines them (Karvonen et al. 2025, arXiv:2503.09532), in nats per prediction, with log-softmax in fp32; and
the same with the store's mean activation in place of zeros, which is harder to beat. The headline scores leave sinks
alone in splice and ablation and count predictions made at other tokens; the `_all` scores replace every token and count
every prediction. A prediction across a document boundary never counts.

The clean pass serves all dictionaries, ablations serve all of one hook, and layers before a hook are run once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipelines.config import EvaluateConfig
from pipelines.errors import RunError
from pipelines.evaluation.intervals import MAX_UNITS, Resampling, unit_of
from pipelines.evaluation.reconstruction import centre_of
from pipelines.evaluation.record import Figure
from pipelines.models import LanguageModel
from pipelines.prefix import Prefix
from pipelines.progress import Bar
from pipelines.selection import Selection, selected
from sae import Dictionary
from sae.hooks import replace_activations
from storage import ActivationStore

ROWS_AT_ONCE = 64
"""Predictions whose log-probabilities over the whole vocabulary are computed together."""


@dataclass
class _Sums:
    """Cross-entropy, and KL divergence from the clean model, summed over the predictions of each unit, in nats."""

    table: Float[Tensor, "n_units 3"] = field(default_factory=lambda: torch.zeros(MAX_UNITS, 3, dtype=torch.float64))

    def add(
        self,
        logits: Float[Tensor, "batch seq vocab"],
        clean: Float[Tensor, "batch seq vocab"],
        batch: "_Batch",
        counted: Bool[Tensor, "batch seq"],
    ) -> None:
        """Add the counted predictions of a model, with the clean model's logits beside them.

        A few rows at a time: the log-probabilities of a whole batch would be the largest tensors of the stage.
        """
        rows = counted.flatten().nonzero()[:, 0]
        logits_of, clean_of = logits.flatten(0, 1), clean.flatten(0, 1)
        targets, units = batch.tokens[:, 1:].flatten(), batch.unit[:, :-1].flatten()
        for some in torch.split(rows, ROWS_AT_ONCE):
            log_q = logits_of[some].float().log_softmax(-1)
            ce = -log_q.gather(-1, targets[some][:, None])[:, 0].double()
            kl = torch.zeros_like(ce)
            if logits is not clean:
                log_p = clean_of[some].float().log_softmax(-1)
                kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).double()
            columns = torch.stack([torch.ones_like(ce), ce, kl], dim=1)
            self.table.index_add_(0, units[some].cpu(), columns.cpu())


@dataclass(frozen=True)
class _Batch:
    """Held-out contexts on the model's device."""

    low: int
    high: int
    tokens: Int[Tensor, "batch seq"]
    position: Int[Tensor, "batch seq"]
    unit: Int[Tensor, "batch seq"]
    within: Bool[Tensor, "batch seq_minus_1"]
    """The next token belongs to the same document, and this one is selected."""


class _Site:
    """The dictionaries that read and write at the same hooks, and what is shared among them."""

    def __init__(self, lm: LanguageModel, store: ActivationStore, dictionaries: Mapping[str, Dictionary]) -> None:
        self.dictionaries = dictionaries
        first = next(iter(dictionaries.values()))
        self.hook, (self.read,), (self.written,) = first.required_hook_name, first.input_hooks, first.output_hooks
        self.mean = torch.from_numpy(centre_of(store, first)).to(lm.device)
        self.prefix = Prefix(lm.model, {self.read, self.written})
        self.ablations = {"zero": _Sums(), "mean": _Sums(), "zero_all": _Sums()}
        self.spliced = {name: {"splice": _Sums(), "splice_all": _Sums()} for name in dictionaries}
        self.clean, self.clean_all = _Sums(), _Sums()

    def add(self, lm: LanguageModel, batch: _Batch, clean: Tensor, sinks: Bool[Tensor, "batch seq"]) -> None:
        """Run and count every changed pass of a batch whose clean pass was recorded by `prefix`."""
        nothing = torch.zeros_like(sinks)
        counted = batch.within & ~sinks[:, :-1]
        self.clean.add(clean, clean, batch, counted)
        self.clean_all.add(clean, clean, batch, batch.within)
        variants = [("", sinks, counted), ("_all", nothing, batch.within)]
        for kind, sums in self.ablations.items():
            suffix, spared, counts = variants[kind.endswith("_all")]
            value = self.mean if kind == "mean" else torch.zeros_like(self.mean)
            sums.add(self._run(lm, batch, _spare(spared, _constant(value))), clean, batch, counts)
        for name, dictionary in self.dictionaries.items():
            spliced = _Spliced(dictionary)
            for suffix, spared, counts in variants:
                logits = self._run(lm, batch, _spare(spared, spliced.x_hat), spliced.capture)
                self.spliced[name]["splice" + suffix].add(logits, clean, batch, counts)

    def _run(
        self,
        lm: LanguageModel,
        batch: _Batch,
        change: Callable[[Tensor], Tensor],
        capture: Callable[[Tensor], None] | None = None,
    ) -> Float[Tensor, "batch seq_minus_1 vocab"]:
        """Logits with `change` at the written hook; what is read comes before in the same pass."""
        reads_elsewhere = capture is not None and self.read != self.written
        with (
            self.prefix.replay(),
            replace_activations(lm.model, self.read, capture) if reads_elsewhere and capture else nullcontext(),
            replace_activations(lm.model, self.written, change),
        ):
            return logits_of(lm, batch.tokens, batch.position)

    def check_replay(self, lm: LanguageModel, batch: _Batch, clean: Tensor) -> None:
        """Run every layer each time if this model's layers hand on more than the residual stream."""
        if len(self.prefix):
            with self.prefix.replay():
                again = logits_of(lm, batch.tokens, batch.position)
            if not torch.equal(again, clean):
                self.prefix = Prefix(lm.model, ())


class _Spliced:
    """One dictionary's reconstruction of a batch: computed once, put in place as often as needed."""

    def __init__(self, dictionary: Dictionary) -> None:
        self._dictionary = dictionary
        self._x: Tensor | None = None
        self._x_hat: Tensor | None = None

    def capture(self, x: Tensor) -> None:
        self._x = x

    def x_hat(self, x: Tensor) -> Tensor:
        if self._x_hat is None:
            read = x if self._x is None else self._x
            self._x_hat = self._dictionary.sae(read.float()).x_hat.to(x.dtype)
        return self._x_hat


def _spare(spared: Bool[Tensor, "batch seq"], change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`change` at all tokens but the spared ones."""
    return lambda x: torch.where(spared[..., None], x, change(x))


def _constant(value: Float[Tensor, " d"]) -> Callable[[Tensor], Tensor]:
    return lambda x: value.to(x.dtype).expand_as(x)


def logits_of(
    lm: LanguageModel, tokens: Int[Tensor, "batch seq"], position: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq_minus_1 vocab"]:
    """Logits of the next tokens that are there."""
    logits: Tensor = lm.model(input_ids=tokens, position_ids=position, use_cache=False).logits
    return logits[:, :-1]


def n_spliced(store: ActivationStore, config: EvaluateConfig) -> int:
    """Held-out contexts of the spliced forward passes."""
    start, stop = store.spec.split_range("heldout")
    return min(stop - start, max(1, config.n_ce_tokens // store.spec.context_length))


@torch.inference_mode()
def recover(
    lm: LanguageModel,
    store: ActivationStore,
    dictionaries: Mapping[str, Dictionary],
    config: EvaluateConfig,
    *,
    sink_multiple: float,
    bar: Bar,
    selection: Selection | None = None,
    seed: int = 0,
) -> dict[str, tuple[dict[str, Figure], dict[str, Any]]]:
    """CE and KL scores of every dictionary on the model's device that can be spliced in; a crosscoder cannot.

    Raises:
        RunError: no prediction counts.
    """
    sites = [_Site(lm, store, group) for group in _by_site(dictionaries)]
    if not sites:
        return {}
    for batch in _batches(lm, store, config, selection):
        with ExitStack() as stack:
            for site in sites:
                stack.enter_context(site.prefix.record())
            clean = logits_of(lm, batch.tokens, batch.position)
        for site in sites:
            if batch.low == store.spec.split_range("heldout")[0]:
                site.check_replay(lm, batch, clean)
            mask = store.sink_mask(site.hook, batch.low, batch.high, sink_multiple)
            site.add(lm, batch, clean, torch.from_numpy(mask).to(lm.device))
        bar.advance(batch.tokens.numel())
    n_tokens = n_spliced(store, config) * store.spec.context_length
    return {
        name: _scores(site, name, n_tokens, config.n_resamples, seed) for site in sites for name in site.dictionaries
    }


def _by_site(dictionaries: Mapping[str, Dictionary]) -> list[dict[str, Dictionary]]:
    """The dictionaries that can be spliced, by the hooks that they read and write."""
    groups: dict[tuple[str, ...], dict[str, Dictionary]] = {}
    for name, dictionary in dictionaries.items():
        if len(dictionary.output_hooks) == 1:
            groups.setdefault((*dictionary.input_hooks, *dictionary.output_hooks), {})[name] = dictionary
    return list(groups.values())


def _batches(
    lm: LanguageModel, store: ActivationStore, config: EvaluateConfig, selection: Selection | None
) -> Iterator[_Batch]:
    start, _ = store.spec.split_range("heldout")
    stop = start + n_spliced(store, config)
    isolate = bool(store.spec.provenance["packing"]["isolate_documents"])
    for low in range(start, stop, config.batch_contexts):
        high = min(low + config.batch_contexts, stop)
        contexts = store.contexts(low, high)
        tokens, spans, document = (
            torch.from_numpy(part).long().to(lm.device)
            for part in (contexts.tokens, contexts.position, contexts.document)
        )
        position = spans if isolate else torch.arange(tokens.shape[1], device=lm.device).expand_as(tokens)
        chosen = torch.from_numpy(selected(store, low, high, selection)).to(lm.device)
        within = (spans[:, 1:] > 0) & chosen[:, :-1]
        yield _Batch(low, high, tokens, position, unit_of(document), within)


def _scores(
    site: _Site, name: str, n_tokens: int, n_resamples: int, seed: int
) -> tuple[dict[str, Figure], dict[str, Any]]:
    figures: dict[str, Figure] = {}
    facts: dict[str, Any] = {"n_ce_tokens": n_tokens}
    spliced = site.spliced[name]
    for suffix, clean in (("", site.clean), ("_all", site.clean_all)):
        n = int(clean.table[:, 0].sum())
        if n == 0:
            raise RunError(
                "evaluate found no prediction to count: the held-out contexts hold only sinks or one-token documents; "
                "raise evaluate.n_ce_tokens, collect longer documents, or correct evaluate.select"
            )
        tables = {"clean": clean.table, "spliced": spliced["splice" + suffix].table}
        floors = ("zero",) if suffix else ("zero", "mean")
        tables |= {floor: site.ablations[floor + suffix].table for floor in floors}
        resampling = Resampling(clean.table[:, 0] > 0, n_resamples, seed)
        point = _values(tables, torch.ones(1, MAX_UNITS, dtype=torch.float64), floors)
        drawn = _values(tables, resampling.weights, floors)
        for key, value in point.items():
            figures[key + suffix] = Figure.of(float(value), resampling.interval(drawn[key]), n)
        facts[f"n_predictions{suffix}"] = n
    return figures, facts


def _values(
    tables: Mapping[str, Float[Tensor, "n_units 3"]],
    weights: Float[Tensor, "n_resamples n_units"],
    floors: Sequence[str],
) -> dict[str, Float[Tensor, " n_resamples"]]:
    """Means and scores over all units, or over each resample."""
    sums = {kind: weights @ table for kind, table in tables.items()}
    n = sums["clean"][:, 0]
    ce, kl = ({kind: part[:, column] / n for kind, part in sums.items()} for column in (1, 2))
    values = {f"ce_{kind}": value for kind, value in ce.items()}
    values |= {f"kl_{kind}": value for kind, value in kl.items() if kind != "clean"}
    values["ce_increase"] = ce["spliced"] - ce["clean"]
    for floor in floors:
        suffix = "" if floor == "zero" else f"_{floor}"
        values[f"ce_loss_score{suffix}"] = _recovered(ce["clean"], ce["spliced"], ce[floor])
        values[f"kl_div_score{suffix}"] = _recovered(torch.zeros_like(n), kl["spliced"], kl[floor])
    return values


def _recovered(clean: Tensor, spliced: Tensor, floor: Tensor) -> Tensor:
    return torch.where(floor > clean, (floor - spliced) / (floor - clean), torch.nan)


def recovered(clean: float, spliced: float, floor: float) -> float | None:
    """(floor - spliced) / (floor - clean); None where the ablation does no harm: there is nothing to recover then."""
    return (floor - spliced) / (floor - clean) if floor > clean else None


def evaluate_splice(
    lm: LanguageModel,
    store: ActivationStore,
    dictionary: Dictionary,
    config: EvaluateConfig,
    *,
    sink_multiple: float,
    bar: Bar,
    selection: Selection | None = None,
) -> dict[str, Any]:
    """CE and KL scores of one dictionary by flat name; empty for a crosscoder, which has no one place.

    Raises:
        RunError: no prediction counts.
    """
    found = recover(lm, store, {"": dictionary}, config, sink_multiple=sink_multiple, bar=bar, selection=selection)
    if not found:
        return {}
    figures, facts = found[""]
    return {name: figure.value for name, figure in figures.items()} | facts
