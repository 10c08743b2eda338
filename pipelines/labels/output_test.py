"""Does a latent write what its decoder promises? It is amplified in the model, and its promised tokens must rise.

The promised tokens of a latent are those that its decoder row promotes most through the final norm (`logit_lens`).
Latent c is clamped to the 99th percentile of its positive activations at every token of some held-out texts, attention
sinks excepted, and the reconstruction error is kept. For the promise of latent i,

    rise(c, i) = mean over texts, tokens and promised tokens of  log p(token | c clamped) - log p(token)      [nats]

is compared with that of C control latents, the ones most like i in log density and decoder norm, clamped in the same
way to their own 99th percentile:

    p(i) = (1 + #{c : rise(c, i) >= rise(i, i)}) / (1 + C)

(Phipson and Smyth 2010, Statistical Applications in Genetics and Molecular Biology 9, article 39). A latent passes if
Benjamini and Hochberg's procedure rejects at 5 % over the tested latents. The interval of the rise is Student's over
texts. One forward pass serves the promises of all tested latents, so that the controls are a common pool; the layers
before the hook run once (`pipelines.prefix`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from pipelines.labels.parts import Parts
from pipelines.models import LanguageModel
from pipelines.prefix import Prefix
from pipelines.progress import Reporter
from sae import Clamp, Dictionary
from sae.edits import Exclude

LEVEL = 0.05
_POOL_PER_CONTROL = 3
_ROWS_AT_ONCE = 64
"""Tokens whose log-probabilities over the whole vocabulary are held together."""
_BLOCK = 16
"""Clamped latents of one part."""

COLUMNS = pa.schema(
    [
        ("output_rise", pa.float32()),  # nats, mean over the promised tokens
        ("output_rise_low", pa.float32()),  # 95 % interval over texts
        ("output_rise_high", pa.float32()),
        ("output_rise_controls", pa.float32()),  # median rise under the controls: the null beside the score
        ("output_p", pa.float32()),
        ("output_n_controls", pa.int32()),
        ("output_passes", pa.bool_()),  # Benjamini-Hochberg at 5 % over the tested latents
    ]
)


class OutputScores(NamedTuple):
    """An entry per tested latent."""

    rise: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    controls: NDArray[np.float64]
    """Median rise under the controls."""
    p: NDArray[np.float64]
    n_controls: NDArray[np.int64]
    passes: NDArray[np.bool_]
    passes_dealt: NDArray[np.bool_]
    """The same for the promise of another tested latent: what chance gives."""

    def columns(self) -> pa.Table:
        """The rows of `COLUMNS`."""
        values = (self.rise, self.low, self.high, self.controls, self.p, self.n_controls, self.passes)
        return pa.table(
            [
                pa.array(value.astype(field.type.to_pandas_dtype()))
                for value, field in zip(values, COLUMNS, strict=True)
            ],
            schema=COLUMNS,
        )


def matched_controls(
    tested: NDArray[np.int64],
    pool: NDArray[np.int64],
    density: NDArray[np.float64],
    norm: NDArray[np.float64],
    n_controls: int,
) -> list[NDArray[np.int64]]:
    """For each tested latent, the places in `pool` of the latents most like it in log density and decoder norm.

    Both are measured in standard deviations over the pool. A latent is no control of itself.
    """
    traits = np.stack([np.log(np.maximum(density, 1e-12)), norm], axis=1)
    spread = traits[pool].std(0)
    traits = traits / np.where(spread > 1e-9, spread, np.inf)
    chosen = []
    for latent in tested.tolist():
        distance = np.square(traits[pool] - traits[latent]).sum(1)
        near = np.argsort(distance, kind="stable")
        chosen.append(near[pool[near] != latent][:n_controls])
    return chosen


def draw_pool(
    tested: NDArray[np.int64], live: NDArray[np.int64], n_controls: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Latents to clamp: the tested ones, and a random sample of the live ones in which controls are looked for."""
    drawn = rng.permutation(np.setdiff1d(live, tested))[: _POOL_PER_CONTROL * n_controls]
    return np.concatenate([tested, np.sort(drawn)])


class Amplifier:
    """Log-probabilities of promised tokens while one latent is clamped."""

    def __init__(
        self,
        lm: LanguageModel,
        dictionary: Dictionary,
        texts: Int[np.ndarray, "n_texts n_tokens"],
        promised: Int[np.ndarray, "n_tested n_promised"],
        exclude: Exclude,
    ) -> None:
        """Args:
        exclude: tokens that are never clamped and whose predictions do not count: attention sinks.
        """
        self._lm, self._dictionary, self._exclude = lm, dictionary.to(lm.device), exclude
        self._tokens = torch.from_numpy(texts.astype(np.int64)).to(lm.device)
        self._promised = torch.from_numpy(promised.astype(np.int64)).to(lm.device)
        self._prefix = Prefix(lm.model, {*dictionary.input_hooks, *dictionary.output_hooks})
        with self._prefix.record():
            logits = self._logits()
        self._counted: Bool[Tensor, "n_texts n_tokens"]
        with self._dictionary.attach(lm.model, exclude=exclude) as tap, self._prefix.replay():
            again = self._logits()
            self._counted = tap.counted
        if not torch.equal(logits, again):
            self._prefix = Prefix(lm.model, ())  # this model's layers hand on more than the residual stream
        self._clean = self._log_probability(logits)

    def rise(self, latent: int, level: float) -> Float[np.ndarray, "n_texts n_tested"]:
        """Rise of every promise in every text, mean over its counted tokens, with `latent` clamped to `level`."""
        edits = [Clamp(latent, level)]
        with self._dictionary.attach(self._lm.model, edits=edits, exclude=self._exclude), self._prefix.replay():
            logits = self._logits()
        return (self._log_probability(logits) - self._clean).cpu().numpy()

    @torch.inference_mode()
    def _logits(self) -> Float[Tensor, "n_texts n_tokens vocab"]:
        position = torch.arange(self._tokens.shape[1], device=self._tokens.device).expand_as(self._tokens)
        logits: Tensor = self._lm.model(input_ids=self._tokens, position_ids=position, use_cache=False).logits
        return logits

    @torch.inference_mode()
    def _log_probability(self, logits: Float[Tensor, "n_texts n_tokens vocab"]) -> Float[Tensor, "n_texts n_tested"]:
        """Mean log-probability of each promise's tokens over the counted tokens of each text."""
        n_texts, n_tested = len(self._tokens), len(self._promised)
        total = torch.zeros(n_texts, n_tested, dtype=torch.float64, device=logits.device)
        text, token = self._counted.nonzero(as_tuple=True)
        for start in range(0, len(text), _ROWS_AT_ONCE):
            rows = text[start : start + _ROWS_AT_ONCE]
            log_p = logits[rows, token[start : start + _ROWS_AT_ONCE]].float().log_softmax(-1)
            total.index_add_(0, rows, log_p[:, self._promised].mean(-1).double())
        return total / self._counted.sum(1).clamp_min(1)[:, None]


def measure_rises(
    amplifier: Amplifier, pool: NDArray[np.int64], level: NDArray[np.float32], folder: Path, key: str, ui: Reporter
) -> Float[np.ndarray, "n_pool n_texts n_tested"]:
    """The rises under every latent of the pool; finished blocks of an earlier attempt are not done again.

    Args:
        level: to which each latent of the pool is clamped.
        folder, key: see `parts.Parts`.
    """
    parts = Parts(folder, key, pa.schema([("rise", pa.list_(pa.list_(pa.float64())))]))
    blocks = [pool[start : start + _BLOCK] for start in range(0, len(pool), _BLOCK)]
    with ui.stage("output test", total=len(pool), unit="latents") as bar:
        for number, block in enumerate(blocks):
            if number not in parts:
                first = number * _BLOCK
                rises = [amplifier.rise(int(c), float(level[first + i])).tolist() for i, c in enumerate(block)]
                parts.write(number, {"rise": rises})
            bar.advance(len(block))
    return np.array(parts.read(len(blocks))["rise"].to_pylist(), np.float64)


def score_rises(
    rises: Float[np.ndarray, "n_pool n_texts n_tested"], controls: Sequence[NDArray[np.int64]]
) -> OutputScores:
    """Compare each tested latent with its controls.

    Args:
        rises: the pool's first latents are the tested ones, in order.
        controls: for each tested latent, places in the pool.
    """
    n_tested, n_texts = rises.shape[2], rises.shape[1]
    mean = rises.mean(1)
    own = rises[np.arange(n_tested), :, np.arange(n_tested)]
    rise = own.mean(1)
    half = stats.t.ppf(0.975, n_texts - 1) * own.std(1, ddof=1) / np.sqrt(n_texts)
    null = [mean[places, i] for i, places in enumerate(controls)]
    p = np.array([_p_value(rise[i], null[i]) for i in range(n_tested)])
    # The promise of the next tested latent, under this one: no latent should pass this.
    dealt = np.roll(np.arange(n_tested), -1)
    dealt_p = np.array(
        [
            _p_value(mean[i, j], mean[controls[j][controls[j] != i], j]) if j != i else 1.0
            for i, j in enumerate(dealt.tolist())
        ]
    )
    return OutputScores(
        rise,
        rise - half,
        rise + half,
        np.array([np.median(values) for values in null]),
        p,
        np.array([len(places) for places in controls]),
        stats.false_discovery_control(p) <= LEVEL,
        stats.false_discovery_control(dealt_p) <= LEVEL,
    )


def _p_value(own: float, null: NDArray[np.float64]) -> float:
    return float((1 + (null >= own).sum()) / (1 + len(null)))
