"""What latents read and what they write: input and output scores (Arad, Mueller, Belinkov 2025, arXiv:2505.20063).

        input_score_i  = share of the 100 strongest windows of i whose peak token is among T_i
        output_score_i = (1 - min rank of T_i / vocabulary) * max probability of T_i,  after "From my experience,"

T_i are the 20 tokens that the decoder direction promotes most (the logit lens). For the output score the direction is
added at the prompt's last token, ten times as strong as the strongest latent there, and what the dictionary does not
reconstruct stays. Both need a hook that writes to the residual stream. Latents are a seeded sample.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipelines.evaluation.intervals import mean_interval
from pipelines.evaluation.reconstruction import Block
from pipelines.evaluation.record import Figure
from pipelines.labels.logit_lens import logit_lens
from pipelines.models import LanguageModel
from sae import Dictionary
from sae.hooks import replace_activations
from sae.naming import find_hook

PROMPT = "From my experience,"
N_LENS = 20
FACTOR = 10.0
N_WINDOWS = 100
MIN_WINDOWS = 10
"""Windows with an activation without which a latent has no input score."""
WINDOW = 32
"""Tokens of a window."""
LATENTS_AT_ONCE = 32


def writes_to_stream(lm: LanguageModel, dictionary: Dictionary) -> bool:
    """Whether the dictionary's directions are directions of the residual stream: it reconstructs a layer's output."""
    if len(dictionary.output_hooks) != 1:
        return False
    path, side, _ = find_hook(lm.model, dictionary.output_hooks[0])
    return path.rpartition(".")[2].isdecimal() and side in ("output", "input")


def sampled_latents(d_sae: int, n: int, seed: int) -> Int[Tensor, " n_sampled"]:
    """Some latents at random, ascending."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(d_sae, generator=generator)[:n].sort().values


class StrongestWindows:
    """The strongest windows of some latents and the token at the peak of each, as the tokens pass by.

    Memory is n_latents x (windows kept + windows of a block).
    """

    def __init__(self, latents: Int[Tensor, " n"], d_sae: int) -> None:
        self._slot = torch.full((d_sae,), -1)
        self._slot[latents] = torch.arange(len(latents))
        self._value, self._token = torch.zeros(len(latents), 0), torch.zeros(len(latents), 0, dtype=torch.long)

    def __call__(self, block: Block) -> None:
        """Add a block."""
        row, latent, value = (part.cpu() for part in block.latents)
        slot = self._slot[latent]
        ours = slot >= 0
        row, slot, value = row[ours], slot[ours], value[ours].float()
        windows, window = torch.unique(block.place // WINDOW, return_inverse=True)
        n_windows = len(windows)
        if not len(row):
            return
        cell = slot * n_windows + window[row]
        peak = torch.zeros(len(self._value) * n_windows).scatter_reduce_(0, cell, value, "amax")
        at_peak = value == peak[cell]
        token = torch.full_like(peak, -1, dtype=torch.long)
        # Of equal peaks the first: written last.
        token[cell[at_peak].flip(0)] = block.token[row[at_peak]].flip(0)
        shape = (len(self._value), n_windows)
        values = torch.cat([self._value, peak.view(shape)], dim=1)
        tokens = torch.cat([self._token, token.view(shape)], dim=1)
        kept = values.topk(min(N_WINDOWS, values.shape[1]), dim=1)
        self._value, self._token = kept.values, tokens.gather(1, kept.indices)

    def input_scores(self, promoted: Int[Tensor, "n n_lens"]) -> Float[Tensor, " n"]:
        """Input score of each latent; NaN for one with too few windows."""
        active = self._value > 0
        hit = (self._token[:, :, None] == promoted[:, None, :]).any(-1) & active
        n = active.sum(1)
        return torch.where(n >= MIN_WINDOWS, hit.sum(1) / n.clamp_min(1), torch.nan)


@torch.inference_mode()
def output_scores(
    lm: LanguageModel,
    dictionary: Dictionary,
    latents: Int[Tensor, " n"],
    promoted: Int[Tensor, "n n_lens"],
    *,
    prepend_bos: bool = False,
) -> Float[Tensor, " n"]:
    """Output score of each latent."""
    ids = lm.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    lead = [lm.tokenizer.bos_token_id] if prepend_bos and lm.tokenizer.bos_token_id is not None else []
    tokens = torch.tensor([lead + ids], device=lm.device)
    position = torch.arange(tokens.shape[1], device=lm.device)[None]
    (written,) = dictionary.output_hooks
    strongest = _strongest(lm, dictionary, tokens, position)
    sae = dictionary.sae
    scores = []
    for some, wanted in zip(torch.split(latents, LATENTS_AT_ONCE), torch.split(promoted, LATENTS_AT_ONCE), strict=True):
        push = FACTOR * strongest * sae.W_dec[some.to(sae.W_dec.device)].detach()

        def amplify(x: Tensor, push: Tensor = push) -> Tensor:
            changed = x.clone()
            changed[:, -1] += (push * sae.output_scale(x[:, -1].float())).to(x.dtype)
            return changed

        repeated, places = tokens.expand(len(some), -1), position.expand(len(some), -1)
        with replace_activations(lm.model, written, amplify):
            logits = lm.model(input_ids=repeated, position_ids=places, use_cache=False).logits[:, -1].float().cpu()
        probability = logits.softmax(-1)
        of_tokens = probability.gather(1, wanted)
        rank = (probability[:, None, :] > of_tokens.amax(1)[:, None, None]).sum(-1)[:, 0]
        scores.append((1 - rank / logits.shape[1]) * of_tokens.amax(1))
    return torch.cat(scores)


def _strongest(
    lm: LanguageModel, dictionary: Dictionary, tokens: Int[Tensor, "1 seq"], position: Int[Tensor, "1 seq"]
) -> float:
    """The largest latent activation at the last token."""
    captured = lm.capture(tokens, position, list(dictionary.input_hooks))
    x = torch.cat([captured[name][0, -1:].float() for name in dictionary.input_hooks], dim=-1)
    return float(dictionary.encode(x.to(dictionary.sae.W_dec.device)).max())


def role_figures(
    latents: Int[Tensor, " n"], inputs: Float[Tensor, " n"], outputs: Float[Tensor, " n"], n_resamples: int, seed: int
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """Means over latents with intervals over latents, and the scores of each."""
    figures = {}
    for name, values in (("input_score", inputs), ("output_score", outputs)):
        known = values[values.isfinite()]
        if len(known):
            found = mean_interval(known, n_resamples, seed)
            figures[name] = Figure.of(float(known.double().mean()), found, len(known))
    rows = [
        {"latent": int(j), "input_score": _number(a), "output_score": _number(b)}
        for j, a, b in zip(latents.tolist(), inputs.tolist(), outputs.tolist(), strict=True)
    ]
    return figures, rows


def _number(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None


def promoted_tokens(lm: LanguageModel, dictionary: Dictionary, latents: Int[Tensor, " n"]) -> Int[Tensor, "n n_lens"]:
    """The tokens that each latent's direction promotes most."""
    norm_weight, W_U = lm.unembedding()
    rows = dictionary.W_dec[latents.to(dictionary.W_dec.device)].float().cpu()
    return logit_lens(rows, norm_weight, W_U, n_top=min(N_LENS, W_U.shape[1])).promoted
