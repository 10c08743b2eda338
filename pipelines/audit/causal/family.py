"""A family of causal tests: what switching features off takes away and what turning them up brings, with side effects.

    necessity     on prompts with the concept, the feature is switched off (f' = 0)
    sufficiency   on neutral prompts, it is clamped to a dose: a multiple of the 99th percentile of its positives

The effect of a test is the mean change of the outcome over prompts. It counts if it is larger than that of matched
controls and that of random directions, both given the same push: p is the larger of the two rank tests' (an
intersection-union test), and Holm runs over the whole family. It is control only if some dose stays within the budget
of side effects; an effect without such a dose is disruption.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipelines.audit.causal.controls import Traits, match_controls, random_directions
from pipelines.audit.causal.dose import Trend, Window, find_window, isotonic_share, trend_test
from pipelines.audit.causal.inference import STOP_AFTER, RankTest, controls_needed, mean_interval, rank_test
from pipelines.audit.causal.intervene import Bench
from pipelines.audit.causal.outcomes import Outcome, SideEffects
from pipelines.audit.statistics import holm
from sae import Dictionary

Kind = Literal["necessity", "sufficiency"]
KINDS: tuple[Kind, ...] = ("necessity", "sufficiency")


@dataclass(frozen=True, kw_only=True)
class CausalSettings:
    """Choices of a family of tests, all frozen before the first intervention."""

    alpha: float = 0.05
    """Family-wise error over all tests of the family."""
    doses: tuple[float, ...] = (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0)
    """Of the dose-response curve, in units of the 99th percentile of the positives."""
    n_controls: int | None = None
    """Of each kind for each test; None takes the fewest with which Holm can reject."""
    stop_after: int | None = STOP_AFTER
    """Controls that exceed before a test stops."""
    seed: int = 0


class Measured(NamedTuple):
    """One test."""

    kind: Kind
    dose: float
    effect: float
    low: float
    high: float
    """95 % interval of the mean over prompts."""
    matched: RankTest
    random: RankTest
    p: float
    p_holm: float


class DoseCurve(NamedTuple):
    """The response on neutral prompts to every dose, and what it costs."""

    doses: Float[np.ndarray, " n_doses"]
    effects: Float[np.ndarray, "n_prompts n_doses"]
    kl: Float[np.ndarray, " n_doses"]
    """Mean KL to the clean predictions, nat a token."""
    ce_growth: Float[np.ndarray, " n_doses"]
    """Relative growth of the cross-entropy."""
    trend: Trend
    monotone: float
    window: Window


class Finding(NamedTuple):
    """What is known of one feature."""

    latent: int
    tests: tuple[Measured, ...]
    curve: DoseCurve
    verdict: Literal["causal", "disruption", "no effect"]


def run_family(
    dictionary: Dictionary,
    latents: Sequence[int],
    positive: Bench,
    neutral: Bench,
    outcome: Outcome,
    traits: Traits,
    doses: Sequence[float],
    settings: CausalSettings | None = None,
    *,
    on_test: Callable[[int, Kind], object] = lambda _latent, _kind: None,
) -> list[Finding]:
    """Test every latent for necessity and sufficiency.

    Args:
        positive: prompts with the concept.
        neutral: prompts without it.
        traits: what controls are matched on; `strength` is the 99th percentile of a latent's positives.
        doses: for each latent, the dose of its sufficiency test, chosen on other texts.
        on_test: called after each test.
    Raises:
        UsageError: too few latents to match, or an outcome function that fails.
    """
    settings = settings or CausalSettings()
    n_controls = settings.n_controls or controls_needed(len(KINDS) * len(latents), settings.alpha)
    exclude = np.zeros(dictionary.d_sae, bool)
    exclude[list(latents)] = True
    price = SideEffects(neutral.tokens, all_logits(neutral))
    raw: list[list[Measured]] = []
    for latent, dose in zip(latents, doses, strict=True):
        directions = _controls(dictionary, traits, latent, n_controls, exclude, settings.seed)
        tests = []
        for kind in KINDS:
            bench, value = (positive, 0.0) if kind == "necessity" else (neutral, dose * float(traits.strength[latent]))
            tests.append(_test(bench, dictionary, latent, kind, dose, value, directions, outcome, settings.stop_after))
            on_test(latent, kind)
        raw.append(tests)
    adjusted = holm(np.array([test.p for tests in raw for test in tests])).reshape(-1, len(KINDS))
    found = []
    for latent, tests, p_holm in zip(latents, raw, adjusted, strict=True):
        tests = [test._replace(p_holm=float(p)) for test, p in zip(tests, p_holm, strict=True)]
        beyond = max(abs(edge) for test in (tests[1].matched, tests[1].random) for edge in test.band)
        curve = _curve(neutral, dictionary, latent, float(traits.strength[latent]), outcome, price, beyond, settings)
        found.append(Finding(latent, tuple(tests), curve, _verdict(tests, curve, settings.alpha)))
    return found


def all_logits(bench: Bench) -> Float[Tensor, "n_prompts seq vocab"]:
    """Clean logits at every position."""
    return bench.clean(_Logits())


@dataclass(frozen=True)
class _Logits:
    hook_name: None = None
    last_only: bool = False

    def read(self, seen: Float[Tensor, "batch seq vocab"]) -> Float[Tensor, "batch seq vocab"]:
        return seen.clone()


def _controls(
    dictionary: Dictionary, traits: Traits, latent: int, n: int, exclude: Bool[np.ndarray, " d_sae"], seed: int
) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_in"]]:
    """Decoder directions of the matched latents, and random ones, all of the latent's own norm."""
    norm = float(dictionary.W_dec[latent].norm())
    matched = match_controls(traits, latent, n, exclude=exclude, seed=seed).latents
    rows = dictionary.W_dec[torch.from_numpy(matched)]
    rows = norm * rows / rows.norm(dim=1, keepdim=True)
    return rows, torch.from_numpy(random_directions(n, rows.shape[1], norm, seed=seed + 7919 * (latent + 1)))


def _test(
    bench: Bench,
    dictionary: Dictionary,
    latent: int,
    kind: Kind,
    dose: float,
    value: float,
    directions: tuple[Tensor, Tensor],
    outcome: Outcome,
    stop_after: int | None,
) -> Measured:
    push = bench.push(latent, value)
    clean = bench.clean(outcome)

    def effects(rows: Tensor) -> Iterator[Float[Tensor, " n_prompts"]]:
        return (each - clean for each in bench.run((bench.delta(push, row) for row in rows), outcome))

    own = next(effects(dictionary.W_dec[latent][None])).double().numpy()
    mean, low, high = mean_interval(own)
    matched, random = (
        rank_test(mean, (float(each.double().mean()) for each in effects(rows)), stop_after=stop_after)
        for rows in directions
    )
    p = max(matched.p, random.p)
    return Measured(kind, 0.0 if kind == "necessity" else dose, mean, low, high, matched, random, p, p)


def _curve(
    neutral: Bench,
    dictionary: Dictionary,
    latent: int,
    strength: float,
    outcome: Outcome,
    price: SideEffects,
    beyond: float,
    settings: CausalSettings,
) -> DoseCurve:
    doses = np.array(settings.doses)
    row = dictionary.W_dec[latent]
    deltas = [neutral.delta(neutral.push(latent, dose * strength), row) for dose in settings.doses]
    effects = np.stack([each.double().numpy() for each in neutral.run(deltas, outcome)], axis=1)
    effects -= neutral.clean(outcome).double().numpy()[:, None]
    costs = np.stack([each.double().mean(0).numpy() for each in neutral.run(deltas, price)])
    clean_ce = float(neutral.clean(price)[:, 1].double().mean())
    growth = costs[:, 1] / clean_ce - 1
    return DoseCurve(
        doses=doses,
        effects=effects,
        kl=costs[:, 0],
        ce_growth=growth,
        trend=trend_test(effects, seed=settings.seed),
        monotone=isotonic_share(effects),
        window=find_window(doses, effects.mean(axis=0), costs[:, 0], growth, beyond=beyond),
    )


def _verdict(tests: Sequence[Measured], curve: DoseCurve, alpha: float) -> Literal["causal", "disruption", "no effect"]:
    necessity, sufficiency = tests
    if sufficiency.p_holm <= alpha:
        return "causal" if curve.window.dose is not None else "disruption"
    return "causal" if necessity.p_holm <= alpha else "no effect"
