"""evaluate: how faithful a dictionary is on documents that it never saw.

FVU, L0, dead latents and activation frequencies use every held-out token of the store. CE and KL scores run the model
with the reconstruction spliced in. Headline figures are over tokens that are not attention sinks, and sinks pass
through the splice unchanged; the figures named `_all` are over all tokens, with every token spliced.
"""

from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipelines.check import warn_of_misfit
from pipelines.collect import open_store
from pipelines.config import EvaluateConfig, RunConfig
from pipelines.dictionaries import load_trained, stored_input, stored_target
from pipelines.errors import RunError
from pipelines.models import LanguageModel, resolve_model
from pipelines.prefix import Prefix
from pipelines.progress import Bar, Reporter
from pipelines.rundir import RunDir
from pipelines.selection import Selection, kept, selected
from sae import Dictionary
from sae.hooks import replace_activations
from sae.metrics import FVU, L0, ActivationFrequency
from storage import ActivationStore


def evaluate(config: RunConfig, run: RunDir, ui: Reporter) -> dict[str, dict[str, Any]]:
    """Run the stage: figures of every SAE of the run, also written to metrics.json."""
    store = open_store(config, run)
    lm = LanguageModel(resolve_model(config.model), config.model)
    start, stop = store.spec.split_range("heldout")
    total = (stop - start + _n_spliced(store, config.evaluate)) * store.spec.context_length
    figures = {}
    for name in config.saes:
        dictionary = load_trained(run, name)
        warn_of_misfit(config, run, name, dictionary, lm, ui)
        with ui.stage("evaluate", total=total, unit="tokens") as bar:
            multiple, selection = config.sinks.multiple, config.selection("evaluate")
            figures[name] = evaluate_reconstruction(
                store, dictionary, sink_multiple=multiple, bar=bar, selection=selection
            ) | evaluate_splice(
                lm,
                store,
                dictionary.to(lm.device),
                config.evaluate,
                sink_multiple=multiple,
                bar=bar,
                selection=selection,
            )
        run.update_metrics(name, figures[name])
    return figures


def evaluate_reconstruction(
    store: ActivationStore,
    dictionary: Dictionary,
    *,
    sink_multiple: float,
    bar: Bar,
    selection: Selection | None = None,
) -> dict[str, Any]:
    """FVU, L0, dead latents and activation frequencies on all held-out tokens of the store, or on the selected ones.

    Raises:
        RunError: none is selected.
    """
    hook = dictionary.required_hook_name
    start, stop = store.spec.split_range("heldout")
    d_out = dictionary.sae.d_out
    fvu, fvu_all, l0, l0_all = FVU(d_out), FVU(d_out), L0(), L0()
    frequency = ActivationFrequency(dictionary.d_sae)
    step = max(1, 4096 // store.spec.context_length)
    n_all = 0
    for low in range(start, stop, step):
        high = min(low + step, stop)
        chosen = torch.from_numpy(selected(store, low, high, selection)).flatten()
        x = stored_input(store, dictionary, low, high).flatten(0, 1).float()[chosen]
        target = stored_target(store, dictionary, low, high).flatten(0, 1).float()[chosen]
        keep = torch.from_numpy(kept(store, hook, low, high, sink_multiple, selection)).flatten()[chosen]
        n_all += len(x)
        with torch.inference_mode():
            latents = dictionary.encode(x)
            x_hat = dictionary.decode(latents, x) + dictionary.sae.bypass(x)
        fvu_all.update(target, x_hat)
        l0_all.update(latents)
        fvu.update(target[keep], x_hat[keep])
        l0.update(latents[keep])
        frequency.update(latents[keep])
        bar.advance((high - low) * store.spec.context_length)
    if not frequency.n_tokens:
        raise RunError("evaluate found no held-out token to count: correct evaluate.select, or collect more documents")
    histogram, edges = frequency.log10_histogram()
    return {
        "fvu": fvu.compute(),
        "fvu_all": fvu_all.compute(),
        "l0": l0.compute(),
        "l0_all": l0_all.compute(),
        "dead_share": frequency.dead_share(),
        "n_latents": dictionary.d_sae,
        "n_heldout_tokens": int(frequency.n_tokens),
        "n_heldout_tokens_all": n_all,
        "activation_frequency_log10_edges": [round(float(edge), 6) for edge in edges],
        "activation_frequency_counts": [int(count) for count in histogram],
    }


def _n_spliced(store: ActivationStore, config: EvaluateConfig) -> int:
    """Held-out contexts of the spliced forward passes."""
    start, stop = store.spec.split_range("heldout")
    return min(stop - start, max(1, config.n_ce_tokens // store.spec.context_length))


ROWS_AT_ONCE = 64
"""Predictions whose log-probabilities over the whole vocabulary are computed together."""


@dataclass
class _Sums:
    """Cross-entropy, and KL divergence from the clean model, summed over predictions, in nats."""

    ce: float = 0.0
    kl: float = 0.0
    n: int = 0

    def add(self, logits: Tensor, clean: Tensor, target: Tensor, counted: Tensor) -> None:
        """Add the counted predictions of a model, with the clean model's logits beside them.

        A few rows at a time: the log-probabilities of a whole batch would be the largest tensors of the stage.
        """
        rows = counted.flatten().nonzero()[:, 0]
        logits_of, clean_of, targets = logits.flatten(0, 1), clean.flatten(0, 1), target.flatten()
        for some in torch.split(rows, ROWS_AT_ONCE):
            log_q = logits_of[some].float().log_softmax(-1)
            self.ce -= float(log_q.gather(-1, targets[some][:, None]).double().sum())
            if logits is not clean:
                log_p = clean_of[some].float().log_softmax(-1)
                kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
                self.kl += float(kl.double().sum())
        self.n += len(rows)


@torch.inference_mode()
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
    """CE and KL scores on held-out contexts; only predictions made at selected tokens count.

        ce_loss_score = (CE_zero - CE_spliced) / (CE_zero - CE_clean)
        kl_div_score  = 1 - KL(clean‖spliced) / KL(clean‖zero)

    as SAEBench defines them (Karvonen et al. 2025, arXiv:2503.09532), in nats per prediction, with log-softmax in
    fp32. The headline scores leave sinks alone in both the splice and the zero ablation and count predictions made at
    other tokens; the `_all` scores replace every token and count every prediction. A prediction across a document
    boundary never counts.
    """
    if len(dictionary.output_hooks) != 1:
        return {}  # a crosscoder has no one place to be spliced in
    start, _ = store.spec.split_range("heldout")
    n_contexts = _n_spliced(store, config)
    isolate = bool(store.spec.provenance["packing"]["isolate_documents"])
    sums: dict[str, _Sums] = defaultdict(_Sums)
    prefix = Prefix(lm.model, {*dictionary.input_hooks, *dictionary.output_hooks})
    for low in range(start, start + n_contexts, config.batch_contexts):
        high = min(low + config.batch_contexts, start + n_contexts)
        contexts = store.contexts(low, high)
        tokens = torch.from_numpy(contexts.tokens).long().to(lm.device)
        spans = torch.from_numpy(contexts.position).long().to(lm.device)
        position = spans if isolate else torch.arange(tokens.shape[1], device=lm.device).expand_as(tokens)
        sinks = torch.from_numpy(store.sink_mask(dictionary.required_hook_name, low, high, sink_multiple)).to(lm.device)
        chosen = torch.from_numpy(selected(store, low, high, selection)).to(lm.device)
        target, counted_all = tokens[:, 1:], (spans[:, 1:] > 0) & chosen[:, :-1]
        counted = counted_all & ~sinks[:, :-1]
        with prefix.record():
            clean = _logits(lm, tokens, position, dictionary, "keep", sinks)
        if low == start and len(prefix):
            with prefix.replay():
                again = _logits(lm, tokens, position, dictionary, "keep", sinks)
            if not torch.equal(again, clean):
                prefix = Prefix(lm.model, ())  # this model's layers hand on more than the residual stream
        sums["clean"].add(clean, clean, target, counted)
        sums["clean_all"].add(clean, clean, target, counted_all)
        for kind in ("splice", "zero"):
            for suffix, spared, counts in (("", sinks, counted), ("_all", torch.zeros_like(sinks), counted_all)):
                with prefix.replay():
                    changed = _logits(lm, tokens, position, dictionary, kind, spared)
                sums[kind + suffix].add(changed, clean, target, counts)
                del changed
        bar.advance(tokens.numel())
    return _scores(sums, n_contexts * store.spec.context_length)


def _logits(
    lm: LanguageModel,
    tokens: Int[Tensor, "batch seq"],
    position: Int[Tensor, "batch seq"],
    dictionary: Dictionary,
    kind: str,
    spared: Bool[Tensor, "batch seq"],
) -> Float[Tensor, "batch seq_minus_1 vocab"]:
    """Logits of the next tokens with the output hook's activations kept, spliced or zeroed, but for spared tokens.

    A transcoder's output replaces its target; what it reads from the same forward pass comes before.
    """
    read: dict[str, Tensor] = {}

    def capture(x: Tensor) -> Tensor:
        read["x"] = x
        return x

    def replace(x: Tensor) -> Tensor:
        if kind == "keep":
            return x
        new = torch.zeros_like(x) if kind == "zero" else dictionary.sae(read.get("x", x).float()).x_hat.to(x.dtype)
        return torch.where(spared[..., None], x, new)

    (written,) = dictionary.output_hooks
    reads_elsewhere = dictionary.input_hooks != dictionary.output_hooks
    with (
        replace_activations(lm.model, dictionary.required_hook_name, capture) if reads_elsewhere else nullcontext(),
        replace_activations(lm.model, written, replace),
    ):
        logits: Tensor = lm.model(input_ids=tokens, position_ids=position, use_cache=False).logits
    return logits[:, :-1]


def _scores(sums: dict[str, _Sums], n_tokens: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"n_ce_tokens": n_tokens}
    for suffix in ("", "_all"):
        n = sums["clean" + suffix].n
        if n == 0:
            raise RunError(
                "evaluate found no prediction to count: the held-out contexts hold only sinks or one-token documents; "
                "raise evaluate.n_ce_tokens, collect longer documents, or correct evaluate.select"
            )
        ce = {kind: sums[kind + suffix].ce / n for kind in ("clean", "splice", "zero")}
        kl = {kind: sums[kind + suffix].kl / n for kind in ("splice", "zero")}
        figures |= {
            f"ce_clean{suffix}": ce["clean"],
            f"ce_spliced{suffix}": ce["splice"],
            f"ce_zero{suffix}": ce["zero"],
            f"ce_loss_score{suffix}": recovered(ce["clean"], ce["splice"], ce["zero"]),
            f"kl_spliced{suffix}": kl["splice"],
            f"kl_zero{suffix}": kl["zero"],
            f"kl_div_score{suffix}": recovered(0.0, kl["splice"], kl["zero"]),
            f"n_predictions{suffix}": n,
        }
    return figures


def recovered(clean: float, spliced: float, zero: float) -> float | None:
    """(zero - spliced) / (zero - clean); None where zero ablation does no harm, so that there is nothing to recover."""
    return (zero - spliced) / (zero - clean) if zero > clean else None
