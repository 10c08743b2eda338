"""A family of causal tests: what switching features off takes away and what turning them up brings, with side effects.

    necessity     on prompts with the concept, the feature is switched off (f' = 0)
    sufficiency   on neutral prompts, it is clamped to a dose: a multiple of the 99th percentile of its positives

The effect of a test is the mean change of the outcome over prompts. It counts if it is larger than that of matched
controls and that of random directions, both given the same push: p is the larger of the two rank tests' (an
intersection-union test), and Holm runs over the whole family. It is control only if some dose stays within the budget
of side effects; an effect without such a dose is disruption.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipelines.audit.causal.controls import Traits, match_controls, random_directions
from pipelines.audit.causal.dose import Trend, Window, find_window, isotonic_share, trend_test
from pipelines.audit.causal.inference import STOP_AFTER, RankTest, controls_needed, mean_interval, rank_test
from pipelines.audit.causal.intervene import Bench, Delta
from pipelines.audit.causal.outcomes import Outcome, SideEffects
from pipelines.audit.statistics import holm
from pipelines.errors import UsageError
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


@dataclass(frozen=True, eq=False)
class Case:
    """What is tested: one latent, or a set of them that is switched as one."""

    name: str
    """Of the concept."""
    latents: tuple[int, ...]
    positive: Bench
    """Prompts with the concept."""
    neutral: Bench
    """Prompts without it."""
    outcome: Outcome
    traits: Traits
    """What controls are matched on, for this concept; `strength` is the unit of doses."""
    dose: float = 1.0
    """Of the sufficiency test, chosen on other texts."""

    def deltas(self, bench: Bench, dose: float, rows: Float[Tensor, "n_latents d_in"]) -> Delta:
        """The intervention with every latent clamped to its dose, the i-th push along the i-th of `rows`."""
        pushes = (bench.push(latent, dose * float(self.traits.strength[latent])) for latent in self.latents)
        return sum((bench.delta(push, row) for push, row in zip(pushes, rows, strict=True)), torch.zeros_like(bench.x))


class Finding(NamedTuple):
    """What is known of one case."""

    name: str
    latents: tuple[int, ...]
    tests: tuple[Measured, ...]
    curve: DoseCurve
    verdict: Literal["causal", "disruption", "no effect"]


def run_family(
    dictionary: Dictionary,
    cases: Sequence[Case],
    settings: CausalSettings | None = None,
    *,
    known: Mapping[tuple[int, Kind], Measured] | None = None,
    on_test: Callable[[int, Measured], object] = lambda _case, _test: None,
) -> list[Finding]:
    """Test every case for necessity and sufficiency; the family is all of them, over all concepts.

    Args:
        known: tests that an earlier run of the same family has finished, by the case's place and kind.
        on_test: called after each test with the case's place and the result, whose `p_holm` is not there yet.
    Raises:
        UsageError: too few latents to match, or an outcome function that fails.
    """
    settings = settings or CausalSettings()
    n_controls = settings.n_controls or controls_needed(len(KINDS) * len(cases), settings.alpha)
    exclude = np.zeros(dictionary.d_sae, bool)
    exclude[[latent for case in cases for latent in case.latents]] = True
    directions = [_controls(dictionary, case, n_controls, exclude, settings.seed) for case in cases]
    raw: list[list[Measured]] = []
    for place, (case, rows) in enumerate(zip(cases, directions, strict=True)):
        tests = []
        for kind in KINDS:
            test = (known or {}).get((place, kind))
            if test is None:
                test = _test(dictionary, case, kind, rows, settings.stop_after)
                on_test(place, test)
            tests.append(test)
        raw.append(tests)
    adjusted = holm(np.array([test.p for tests in raw for test in tests])).reshape(-1, len(KINDS))
    found = []
    for case, tests, p_holm in zip(cases, raw, adjusted, strict=True):
        tests = [test._replace(p_holm=float(p)) for test, p in zip(tests, p_holm, strict=True)]
        beyond = max(abs(edge) for test in (tests[1].matched, tests[1].random) for edge in test.band)
        curve = dose_curve(dictionary, case, settings, beyond=beyond)
        found.append(Finding(case.name, case.latents, tuple(tests), curve, _verdict(tests, curve, settings.alpha)))
    return found


def choose_dose(dictionary: Dictionary, case: Case, settings: CausalSettings) -> float:
    """The dose of the largest effect that side effects allow, on prompts that no test uses; 1 where none is allowed."""
    window = dose_curve(dictionary, case, settings, beyond=0.0).window
    return 1.0 if window.dose is None else window.dose


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
    dictionary: Dictionary, case: Case, n: int, exclude: Bool[np.ndarray, " d_sae"], seed: int
) -> tuple[Float[Tensor, "n n_latents d_in"], Float[Tensor, "n n_latents d_in"]]:
    """Decoder directions of matched latents, and random ones, each of the norm of the latent that it stands for."""
    matched, random = [], []
    for latent in case.latents:
        norm = float(dictionary.W_dec[latent].norm())
        chosen = match_controls(case.traits, latent, n, exclude=exclude, seed=seed).latents
        rows = dictionary.W_dec[torch.from_numpy(chosen)]
        matched.append(norm * rows / rows.norm(dim=1, keepdim=True))
        random.append(torch.from_numpy(random_directions(n, rows.shape[1], norm, seed=seed + 7919 * (latent + 1))))
    return torch.stack(matched, dim=1), torch.stack(random, dim=1)


def _test(
    dictionary: Dictionary,
    case: Case,
    kind: Kind,
    directions: tuple[Float[Tensor, "n n_latents d_in"], Float[Tensor, "n n_latents d_in"]],
    stop_after: int | None,
) -> Measured:
    bench, dose = (case.positive, 0.0) if kind == "necessity" else (case.neutral, case.dose)
    clean = bench.clean(case.outcome)

    def effects(sets: Iterable[Tensor]) -> Iterator[Float[np.ndarray, " n_prompts"]]:
        changed = bench.run((case.deltas(bench, dose, rows) for rows in sets), case.outcome)
        return ((each - clean).double().cpu().numpy() for each in changed)

    mean, low, high = mean_interval(next(effects([_own(dictionary, case)])))
    matched, random = (
        rank_test(mean, (float(each.mean()) for each in effects(sets)), stop_after=stop_after) for sets in directions
    )
    p = max(matched.p, random.p)
    return Measured(kind, dose, mean, low, high, matched, random, p, p)


def _own(dictionary: Dictionary, case: Case) -> Float[Tensor, "n_latents d_in"]:
    return dictionary.W_dec[list(case.latents)]


def dose_curve(dictionary: Dictionary, case: Case, settings: CausalSettings, *, beyond: float) -> DoseCurve:
    """The response of the neutral prompts to each dose, and what it costs; see `find_window` for `beyond`."""
    bench, rows = case.neutral, _own(dictionary, case)
    doses = np.array(settings.doses)
    clean = bench.clean(case.outcome).double().cpu().numpy()
    price = SideEffects(bench.tokens, all_logits(bench))

    def run(outcome: Outcome) -> Float[np.ndarray, "n_doses n_prompts *_"]:
        changed = bench.run((case.deltas(bench, dose, rows) for dose in settings.doses), outcome)
        return np.stack([each.double().cpu().numpy() for each in changed])

    effects, costs = run(case.outcome).T - clean[:, None], run(price).mean(axis=1)
    broken = ~np.isfinite(effects).all(axis=0) | ~np.isfinite(costs).all(axis=1)
    if broken.any():
        raise UsageError(
            f"{case.name}, latents {list(case.latents)}: the model overflows at dose {doses[broken][0]:g}. Leave that "
            "dose out."
        )
    growth = costs[:, 1] / float(bench.clean(price)[:, 1].double().mean()) - 1
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
