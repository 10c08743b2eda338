"""One frozen configuration per architecture; `SAEConfig` is their closed union, told apart by `architecture`.

A configuration holds what cannot be read from the weights: it makes no ids, touches no files and is written verbatim
into `dictionary.json`. A new architecture is a new dataclass here, a module beside `topk.py` and a branch in
`architectures.empty`.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal


def _require_count(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{type(owner).__name__}.{name} must be a whole number of at least 1, got {value!r}. Correct `{name}`."
            )


def _require_not_negative(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not value >= 0:
            raise ValueError(f"{type(owner).__name__}.{name} must not be negative, got {value!r}. Correct `{name}`.")


def _require_share(owner: object, name: str) -> None:
    value = getattr(owner, name)
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{type(owner).__name__}.{name} must lie between 0 and 1, got {value!r}. Correct `{name}`.")


def _require_choice(owner: object, name: str, *choices: str) -> None:
    value = getattr(owner, name)
    if value not in choices:
        raise ValueError(
            f"{type(owner).__name__}.{name} must be one of {', '.join(choices)}, got {value!r}. Correct `{name}`."
        )


def _require_k(owner: object) -> None:
    _require_count(owner, "d_in", "d_sae", "k")
    k, d_sae = getattr(owner, "k", 0), getattr(owner, "d_sae", 0)
    if k > d_sae:
        raise ValueError(
            f"{type(owner).__name__}.k must not exceed d_sae, got k={k} with d_sae={d_sae}. Lower `k` or widen `d_sae`."
        )


@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    """Each token keeps its k largest latents (Gao et al. 2024, arXiv:2406.04093)."""

    d_in: int
    """Width of the activations that are reconstructed."""

    d_sae: int
    """Number of latents."""

    k: int
    """Latents kept for each token."""

    architecture: Literal["topk"] = "topk"

    def __post_init__(self) -> None:
        _require_k(self)


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig:
    """A batch keeps its k * n_tokens largest latents (Bussmann et al. 2024, arXiv:2412.06410)."""

    d_in: int
    """Width of the activations that are reconstructed."""

    d_sae: int
    """Number of latents."""

    k: int
    """Latents kept for each token on average."""

    architecture: Literal["batchtopk"] = "batchtopk"

    def __post_init__(self) -> None:
        _require_k(self)


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig:
    """Each latent has its own threshold (Rajamanoharan et al. 2024, arXiv:2407.14435)."""

    d_in: int
    """Width of the activations that are reconstructed."""

    d_sae: int
    """Number of latents."""

    penalty: Literal["l0", "tanh"] = "l0"
    """What training counts: active latents, or tanh of their activations (Circuits Updates, January 2025)."""

    sparsity_coefficient: float = 1e-3
    """Weight of the penalty: the FVU that one more active latent a token may cost. The papers sweep it."""

    sparsity_warmup_fraction: float | None = None
    """Share of the run in which the weight rises from 0; None takes the source's: 5 % for l0, all of it for tanh."""

    bandwidth: float | None = None
    """ε, width of the straight-through window; None takes the source's: 0.001 √d_in for l0, 2 for tanh."""

    initial_threshold: float | None = None
    """θ before the first step; None takes the source's: 0.001 √d_in for l0, 0.1 for tanh."""

    tanh_scale: float = 4.0
    """c of the tanh penalty."""

    pre_act_coefficient: float = 3e-6
    """λ_P: with the tanh penalty, pulls pre-activations below the threshold up, so that latents do not die."""

    architecture: Literal["jumprelu"] = "jumprelu"

    def __post_init__(self) -> None:
        _require_count(self, "d_in", "d_sae")
        _require_not_negative(self, "sparsity_coefficient", "pre_act_coefficient", "initial_threshold")
        _require_share(self, "sparsity_warmup_fraction")
        _require_choice(self, "penalty", "l0", "tanh")
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ValueError(f"JumpReLUConfig.bandwidth must be positive, got {self.bandwidth!r}. Correct it.")

    @property
    def window(self) -> float:
        """The bandwidth in use. The first source's is for inputs of mean squared norm 1, ours have d_in."""
        if self.bandwidth is not None:
            return self.bandwidth
        return float(0.001 * self.d_in**0.5) if self.penalty == "l0" else 2.0

    @property
    def threshold_at_start(self) -> float:
        """The initial threshold in use."""
        if self.initial_threshold is not None:
            return self.initial_threshold
        return float(0.001 * self.d_in**0.5) if self.penalty == "l0" else 0.1

    @property
    def warmup(self) -> float:
        """The warm-up in use."""
        if self.sparsity_warmup_fraction is not None:
            return self.sparsity_warmup_fraction
        return 0.05 if self.penalty == "l0" else 1.0


@dataclass(frozen=True, kw_only=True)
class StandardConfig:
    """ReLU latents under an L1 penalty (Bricken et al. 2023; coefficient of Circuits Updates, April 2024)."""

    d_in: int
    """Width of the activations that are reconstructed."""

    d_sae: int
    """Number of latents."""

    l1_coefficient: float = 5.0
    """Weight of the L1 penalty, for activations of variance d_in."""

    sparsity_warmup_fraction: float = 0.05
    """Share of the run in which the weight rises from 0."""

    architecture: Literal["standard"] = "standard"

    def __post_init__(self) -> None:
        _require_count(self, "d_in", "d_sae")
        _require_not_negative(self, "l1_coefficient")
        _require_share(self, "sparsity_warmup_fraction")


@dataclass(frozen=True, kw_only=True)
class GatedConfig:
    """Which latents fire and how strongly is decided apart (Rajamanoharan et al. 2024, arXiv:2404.16014)."""

    d_in: int
    """Width of the activations that are reconstructed."""

    d_sae: int
    """Number of latents."""

    l1_coefficient: float = 5.0
    """Weight of the L1 penalty on the gate, for activations of variance d_in. The paper sweeps it."""

    sparsity_warmup_fraction: float = 0.05
    """Share of the run in which the weight rises from 0."""

    architecture: Literal["gated"] = "gated"

    def __post_init__(self) -> None:
        _require_count(self, "d_in", "d_sae")
        _require_not_negative(self, "l1_coefficient")
        _require_share(self, "sparsity_warmup_fraction")


@dataclass(frozen=True, kw_only=True)
class MatryoshkaBatchTopKConfig:
    """BatchTopK whose first latents must reconstruct on their own (Bussmann et al. 2025, arXiv:2503.17547)."""

    d_in: int
    """Width of the activations that are reconstructed."""

    d_sae: int
    """Number of latents."""

    k: int
    """Latents kept for each token on average."""

    prefix_sizes: tuple[int, ...] | None = None
    """Latents in each nested dictionary, rising to d_sae; None takes the paper's 1/32, 3/32, 7/32, 15/32 and all."""

    n_sampled_prefixes: int = 0
    """When positive, each step draws this many prefix sizes (the last is d_sae) in place of `prefix_sizes`."""

    architecture: Literal["matryoshka_batchtopk"] = "matryoshka_batchtopk"

    def __post_init__(self) -> None:
        _require_k(self)
        if self.prefix_sizes is not None:
            sizes = self.prefix_sizes
            rising = all(a < b for a, b in pairwise((0, *sizes)))
            if not sizes or not rising or sizes[-1] != self.d_sae:
                raise ValueError(
                    f"MatryoshkaBatchTopKConfig.prefix_sizes must rise from above 0 to d_sae={self.d_sae}, got "
                    f"{list(sizes)}. Correct `prefix_sizes`, or leave it out."
                )
        if self.n_sampled_prefixes:
            _require_count(self, "n_sampled_prefixes")

    @property
    def fixed_prefixes(self) -> tuple[int, ...]:
        """The prefix sizes in use when none are drawn."""
        if self.prefix_sizes is not None:
            return self.prefix_sizes
        shares = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)
        return tuple(sorted({max(1, round(share * self.d_sae)) for share in shares}))


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig:
    """Predicts one hook's activations from another's (Dunefsky et al. 2024; skip: Paulo et al. 2025)."""

    d_in: int
    """Width of the activations that are read."""

    d_out: int
    """Width of the activations that are predicted."""

    d_sae: int
    """Number of latents."""

    k: int = 0
    """Latents kept for each token (on average, for batchtopk); 0 for jumprelu."""

    activation: Literal["topk", "batchtopk", "jumprelu"] = "batchtopk"
    """How latents are chosen; jumprelu, a threshold for each of them (0: a plain ReLU), is loaded but not trained."""

    skip: bool = False
    """Add an affine map of the input to the output."""

    architecture: Literal["transcoder"] = "transcoder"

    def __post_init__(self) -> None:
        _require_choice(self, "activation", "topk", "batchtopk", "jumprelu")
        _require_count(self, "d_in", "d_out", "d_sae")
        if self.activation != "jumprelu":
            _require_k(self)
        elif self.k:
            raise ValueError(f"TranscoderConfig.k must be 0 for jumprelu, whose thresholds choose, got {self.k}.")


@dataclass(frozen=True, kw_only=True)
class CrosscoderConfig:
    """One set of latents for several hooks or models (Lindsey et al. 2024; BatchTopK: Minder et al. 2025)."""

    d_ins: tuple[int, ...]
    """Width of the activations of each source."""

    d_sae: int
    """Number of latents."""

    sparsity: Literal["l1", "batchtopk"] = "batchtopk"
    """L1 weighted by decoder norms, or k latents a token."""

    k: int = 32
    """Latents kept for each token on average, for batchtopk."""

    l1_coefficient: float = 2.0
    """Weight of the L1 penalty, for activations of variance Σ d_ins."""

    sparsity_warmup_fraction: float = 0.05
    """Share of the run in which that weight rises from 0."""

    architecture: Literal["crosscoder"] = "crosscoder"

    def __post_init__(self) -> None:
        if len(self.d_ins) < 2 or not all(isinstance(d, int) and d > 0 for d in self.d_ins):
            raise ValueError(
                f"CrosscoderConfig.d_ins must list the widths of at least two sources, got {list(self.d_ins)}. "
                "Name several hooks, or choose another architecture."
            )
        _require_count(self, "d_sae")
        _require_choice(self, "sparsity", "l1", "batchtopk")
        _require_not_negative(self, "l1_coefficient")
        _require_share(self, "sparsity_warmup_fraction")
        if self.sparsity == "batchtopk":
            _require_k(self)

    @property
    def d_in(self) -> int:
        """Width of the sources side by side."""
        return sum(self.d_ins)


SAEConfig = (
    TopKConfig
    | BatchTopKConfig
    | JumpReLUConfig
    | StandardConfig
    | GatedConfig
    | MatryoshkaBatchTopKConfig
    | TranscoderConfig
    | CrosscoderConfig
)

_BY_ARCHITECTURE: dict[str, type[SAEConfig]] = {
    "topk": TopKConfig,
    "batchtopk": BatchTopKConfig,
    "jumprelu": JumpReLUConfig,
    "standard": StandardConfig,
    "gated": GatedConfig,
    "matryoshka_batchtopk": MatryoshkaBatchTopKConfig,
    "transcoder": TranscoderConfig,
    "crosscoder": CrosscoderConfig,
}


def nearest(word: str, known: list[str]) -> str:
    """The end of an error message: the known word closest to `word`, or all of them if none is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean `{close[0]}`?" if close else f" Known: {', '.join(sorted(known))}."


def config_from_dict(values: Mapping[str, Any]) -> SAEConfig:
    """The configuration that `dataclasses.asdict` wrote.

    Raises: ValueError for an unknown architecture, an unknown key (naming the nearest valid one), a missing key or a
        bad value.
    """
    architecture = values.get("architecture")
    if not isinstance(architecture, str) or architecture not in _BY_ARCHITECTURE:
        hint = nearest(str(architecture), list(_BY_ARCHITECTURE))
        raise ValueError(f"`architecture` must name a known architecture, got {architecture!r}.{hint}")
    cls = _BY_ARCHITECTURE[architecture]
    known = [field.name for field in dataclasses.fields(cls)]
    required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
    for key in values:
        if key not in known:
            raise ValueError(f"A {architecture} configuration has no key `{key}`.{nearest(key, known)}")
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(
            f"A {architecture} configuration needs {', '.join(required)}; missing: {', '.join(missing)}. Add them."
        )
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return cls(**fields)
