"""Streaming metrics of an SAE: `update` with batches, `compute` at any time; float64 sums, flat memory."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base import SparseLatents


class FVU:
    """Fraction of variance unexplained over everything seen.

        fvu = Σ_b ‖x_b − x_hat_b‖² / Σ_b ‖x_b − mean(x)‖²          mean per dimension over all tokens

    0 for a perfect reconstruction, 1 for always predicting the mean. Not an average of per-batch values. The variance
    is merged batch by batch, so that a large mean costs no digits.

    Reference for the merge: Chan, Golub, LeVeque 1983, "Algorithms for Computing the Sample Variance", eq. 2.1.

    Args:
        d_in: width of the activations.
    """

    def __init__(self, d_in: int) -> None:
        self.n_tokens = 0
        self._error = 0.0
        self._mean = torch.zeros(d_in, dtype=torch.float64)
        self._squares = 0.0

    @torch.no_grad()
    def update(self, x: Float[Tensor, "..."], x_hat: Float[Tensor, "..."]) -> None:
        """Add tokens and their reconstructions, both of shape (*batch, d_in)."""
        if x.shape != x_hat.shape or x.shape[-1] != len(self._mean):
            raise ValueError(
                f"`x` and `x_hat` must have one shape that ends in d_in={len(self._mean)}, got {tuple(x.shape)} and "
                f"{tuple(x_hat.shape)}. Pass activations and their reconstructions."
            )
        x = x.reshape(-1, x.shape[-1]).double()
        n_new = len(x)
        if n_new == 0:
            return
        self._error += float((x - x_hat.reshape(x.shape).double()).square().sum())
        mean = x.mean(dim=0)
        shift = mean.to(self._mean.device) - self._mean
        n_both = self.n_tokens + n_new
        self._squares += float((x - mean).square().sum()) + float(shift.square().sum()) * self.n_tokens * n_new / n_both
        self._mean += shift * (n_new / n_both)
        self.n_tokens = n_both

    def compute(self) -> float:
        """The FVU. Raises: ValueError if nothing, or nothing that varies, was seen."""
        if self._squares == 0:
            raise ValueError(
                f"FVU needs tokens that differ, got {self.n_tokens} without variance. Update with more data."
            )
        return self._error / self._squares


class L0:
    """Mean number of nonzero latents per token."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self._n_active = 0

    def update(self, latents: SparseLatents | Float[Tensor, "*batch d_sae"], n_tokens: int | None = None) -> None:
        """Add latent activations; sparse ones come with the number of tokens that they belong to."""
        if isinstance(latents, SparseLatents):
            if n_tokens is None:
                raise ValueError("Sparse latents do not tell how many tokens they belong to. Pass `n_tokens`.")
            self._n_active += len(latents.value)
            self.n_tokens += n_tokens
        else:
            self._n_active += int(latents.count_nonzero())
            self.n_tokens += latents[..., 0].numel()

    def compute(self) -> float:
        """The mean. Raises: ValueError if no tokens were seen."""
        if self.n_tokens == 0:
            raise ValueError("L0 needs at least one token, got none. Call `update` first.")
        return self._n_active / self.n_tokens


class Histogram(NamedTuple):
    """`counts[i]` values lie in `[edges[i], edges[i + 1])`, the last bin with its upper edge."""

    counts: list[int]
    edges: list[float]


class ActivationFrequency:
    """How often each latent fires.

    Args:
        d_sae: number of latents.
    """

    def __init__(self, d_sae: int) -> None:
        self.n_tokens = 0
        self.counts: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.int64)

    def update(self, latents: SparseLatents | Float[Tensor, "*batch d_sae"], n_tokens: int | None = None) -> None:
        """Add latent activations; sparse ones come with the number of tokens that they belong to."""
        if isinstance(latents, SparseLatents):
            if n_tokens is None:
                raise ValueError("Sparse latents do not tell how many tokens they belong to. Pass `n_tokens`.")
            self.counts += torch.bincount(latents.latent.cpu(), minlength=len(self.counts))
            self.n_tokens += n_tokens
        else:
            flat = latents.reshape(-1, latents.shape[-1])
            self.counts += flat.count_nonzero(dim=0).cpu()
            self.n_tokens += len(flat)

    def compute(self) -> Float[Tensor, " d_sae"]:
        """Share of tokens on which each latent is nonzero, float64. Raises: ValueError if no tokens were seen."""
        if self.n_tokens == 0:
            raise ValueError("ActivationFrequency needs at least one token, got none. Call `update` first.")
        return self.counts.double() / self.n_tokens

    def dead_share(self) -> float:
        """Share of latents that never fired."""
        return float((self.compute() == 0).double().mean())

    def log10_histogram(self, n_bins: int = 40, lowest: float = -8.0) -> Histogram:
        """Histogram of log10 frequency from `lowest` to 0. Latents that never fired are left out."""
        frequency = self.compute()
        log10 = frequency[frequency > 0].log10().clamp_min(lowest)
        edges = torch.linspace(lowest, 0, n_bins + 1, dtype=torch.float64)
        index = torch.bucketize(log10, edges[1:-1], right=True)
        return Histogram(torch.bincount(index, minlength=n_bins).tolist(), edges.tolist())


class Reconstruction:
    """How close reconstructions are, as sums over groups of tokens, such as documents, that can be resampled later.

        fvu           = Σ‖x − x_hat‖² / Σ‖x − mean‖²
        mse           = mean of ‖x − x_hat‖², summed over dimensions
        cosine        = mean of cos(x, x_hat); 0 for a reconstruction that is zero
        norm_ratio    = mean of ‖x_hat‖ / ‖x‖
        relative_bias = Σ‖x_hat‖² / Σ⟨x, x_hat⟩      below 1: shrinkage (Rajamanoharan et al. 2024, 2404.16014, eq. 10)
        l0            = mean number of nonzero latents

    Sums are float64 and taken about a centre near the mean, so that a large mean costs no digits. Memory: n_groups rows
    of d + 8 numbers, whatever the number of tokens.

    Args:
        centre: any point near the mean of x, (d,).
        n_groups: groups are numbered from 0.
    """

    COLUMNS = ("n", "error", "square", "cosine", "norm_ratio", "hat_square", "inner", "active")

    def __init__(self, centre: Float[Tensor, " d"], n_groups: int = 1) -> None:
        self._centre = centre.double()
        self.sums: Float[Tensor, "n_groups n_columns"] = torch.zeros(
            n_groups, len(self.COLUMNS), dtype=torch.float64, device=centre.device
        )
        self.vectors: Float[Tensor, "n_groups d"] = torch.zeros(
            n_groups, len(centre), dtype=torch.float64, device=centre.device
        )

    @torch.no_grad()
    def update(
        self,
        x: Float[Tensor, "n d"],
        x_hat: Float[Tensor, "n d"],
        n_active: Int[Tensor, " n"],
        group: Int[Tensor, " n"],
    ) -> None:
        """Add tokens, their reconstructions, their numbers of nonzero latents, and the groups that they belong to."""
        x, x_hat = x.double(), x_hat.double()
        centred, tiny = x - self._centre, torch.finfo(torch.float64).tiny
        norm, hat_norm, inner = x.norm(dim=1), x_hat.norm(dim=1), (x * x_hat).sum(dim=1)
        columns = (
            torch.ones_like(norm),
            (x - x_hat).square().sum(dim=1),
            centred.square().sum(dim=1),
            inner / (norm * hat_norm).clamp_min(tiny),
            hat_norm / norm.clamp_min(tiny),
            hat_norm.square(),
            inner,
            n_active.double(),
        )
        self.sums.index_add_(0, group, torch.stack(columns, dim=1))
        self.vectors.index_add_(0, group, centred)

    def compute(self, weights: Float[Tensor, "n_resamples n_groups"] | None = None) -> dict[str, Tensor]:
        """The figures over all groups, or over each resample of them; NaN where nothing varies or nothing is there.

        Args:
            weights: how often each group is in each resample, float64.
        Returns: figures by name, (n_resamples,); one resample without weights.
        """
        if weights is None:
            weights = self.sums.new_ones(1, len(self.sums))
        total = dict(zip(self.COLUMNS, (weights @ self.sums).unbind(dim=1), strict=True))
        n = total["n"]
        variance = total["square"] - (weights @ self.vectors).square().sum(dim=1) / n
        # Cancellation leaves rounding errors where all tokens are equal.
        variance = torch.where(variance > 1e-12 * total["square"], variance, torch.nan)
        return {
            "fvu": total["error"] / variance,
            "mse": total["error"] / n,
            "cosine": total["cosine"] / n,
            "norm_ratio": total["norm_ratio"] / n,
            "relative_bias": total["hat_square"] / total["inner"],
            "l0": total["active"] / n,
        }
