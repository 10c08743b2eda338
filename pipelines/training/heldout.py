"""Held-out figures while an SAE trains, over one fixed sample, so that the curve shows the SAE and not the sample.

`heldout_fvu`, `heldout_l0` and `heldout_dead_share` (the share of latents that are silent on the `heldout_n_tokens`
tokens) are over tokens that are no sinks. The inference rule is used, with the threshold as far as training has
followed it. Nothing here changes the state that training depends on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.config import EvaluateConfig, ModelConfig, SinkConfig
from pipelines.selection import Selection, kept
from sae import FVU, L0, SAE, ActivationFrequency, Dictionary, Normaliser
from storage import ActivationStore

if TYPE_CHECKING:
    from pipelines.models import LanguageModel

HELDOUT_TOKENS = 2048
"""Tokens of the sample: half a step's worth, so that figures every 100 steps cost about 1 % of the training."""
SPLICED_FIGURES = ("ce_loss_score", "ce_spliced", "kl_div_score", "kl_spliced")
_CHUNK = 2**24
"""Most dense latent activations that are in memory at once."""


class Heldout:
    """A sample of the held-out split at the hooks of an SAE.

    Contexts of a store are in random order, so the first ones are a random sample.
    """

    def __init__(
        self, store: ActivationStore, hooks: tuple[str, ...], sinks: SinkConfig, selection: Selection, n_tokens: int
    ) -> None:
        self._parts: list[Float[Tensor, "n_tokens _"]] = [torch.empty(0, store.spec.hook(hook).d_in) for hook in hooks]
        low, stop = store.spec.split_range("heldout")
        step = max(1, n_tokens // store.spec.context_length)
        while low < stop and len(self._parts[0]) < n_tokens:
            high = min(low + step, stop)
            rows = torch.from_numpy(kept(store, hooks[0], low, high, sinks.multiple, selection))
            new = [store.activations(hook, low, high).float()[rows] for hook in hooks]
            self._parts = [torch.cat(pair)[:n_tokens] for pair in zip(self._parts, new, strict=True)]
            low = high

    @torch.no_grad()
    def figures(self, sae: SAE, normalisers: Sequence[Normaliser]) -> dict[str, float]:
        """FVU in the units of the raw activations, L0 and dead share; empty where fewer than two are held out.

        Args:
            sae: in the units of what `normalisers` give, which are on its device.
        """
        n_tokens = len(self._parts[0])
        if n_tokens < 2:
            return {}
        device = sae.b_dec.device
        fvu, l0, frequency = FVU(sae.d_out), L0(), ActivationFrequency(sae.d_sae)
        scales = [n.scale.expand(len(n.shift))[None] for n in normalisers]
        scale, shift = (sae.input_and_target(each)[1] for each in (scales, [n.shift[None] for n in normalisers]))
        step = max(1, _CHUNK // sae.d_sae)
        for low in range(0, n_tokens, step):
            raw = [part[low : low + step].to(device) for part in self._parts]
            x, _ = sae.input_and_target([n.apply(part) for n, part in zip(normalisers, raw, strict=True)])
            latents = sae.encode_sparse(x)
            x_hat = sae.decode_sparse(latents, len(x), x) + sae.bypass(x)
            fvu.update(sae.input_and_target(raw)[1], x_hat / scale + shift)
            l0.update(latents, len(x))
            frequency.update(latents, len(x))
        return {
            "heldout_fvu": fvu.compute(),
            "heldout_l0": l0.compute(),
            "heldout_dead_share": frequency.dead_share(),
            "heldout_n_tokens": n_tokens,
        }


@dataclass
class Splicing:
    """CE and KL scores with the SAE spliced into the language model, which is loaded when they are first asked for."""

    store: ActivationStore
    model: ModelConfig
    sinks: SinkConfig
    selection: Selection
    n_tokens: int

    @cached_property
    def _lm(self) -> "LanguageModel":
        from pipelines.models import LanguageModel, resolve_model

        return LanguageModel(resolve_model(self.model), self.model)

    def figures(self, sae: SAE, hooks: tuple[str, ...]) -> dict[str, Any]:
        """`heldout_ce_loss_score` and the like of an SAE of raw activations, as `evaluate` defines them; none for
        crosscoders."""
        from pipelines.evaluation import evaluate_splice
        from pipelines.progress import SilentReporter

        dictionary = Dictionary(sae, hook_names=hooks).to(self._lm.device)
        with SilentReporter().stage("evaluate", total=1, unit="tokens") as bar:
            found = evaluate_splice(
                self._lm,
                self.store,
                dictionary,
                EvaluateConfig(n_ce_tokens=self.n_tokens),
                sink_multiple=self.sinks.multiple,
                bar=bar,
                selection=self.selection,
            )
        return {f"heldout_{name}": found[name] for name in SPLICED_FIGURES if name in found}
