"""The data and the measure of `train_quality`, the same in our process and in the peers'. Needs only torch and numpy.

A folder holds `train.npy` and `heldout.npy`, bfloat16 activations as uint16 (tokens, d_in) in the order in which every
trainer gets them, `calibration.npy`, more of them without attention sinks for thresholds, and `sinks.npy`, which
held-out tokens are attention sinks.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BATCH, K, D_SAE, N_STEPS = 4096, 32, 4608, 245

Reconstruct = Callable[[Any], tuple[Any, Any]]
"""x (tokens, d_in) float32 → x_hat of the same shape, and which latents are active, bool (tokens, d_sae)."""


def rows(path: Path, at_once: int) -> Iterator[Any]:
    """The rows of a file in order, float32 (at_once, d_in); the last part may be shorter."""
    import numpy as np
    import torch

    stored = np.load(path, mmap_mode="r")
    for low in range(0, len(stored), at_once):
        yield torch.from_numpy(stored[low : low + at_once].copy()).view(torch.bfloat16).float()


def measure(reconstruct: Reconstruct, folder: Path) -> dict[str, float]:
    """Held-out figures: `fvu` over all tokens and `fvu_without_sinks`, each against its own mean, in float64; `l0` and
    `dead_share`, the share of latents that never fire, over the tokens that are no sinks."""
    import numpy as np
    import torch

    is_sink = torch.from_numpy(np.load(folder / "sinks.npy"))
    sums: dict[bool, list[Any]] = {with_sinks: [0, 0.0, 0.0, 0.0] for with_sinks in (True, False)}
    fired, active, low = torch.zeros(D_SAE, dtype=torch.bool), 0, 0
    with torch.no_grad():
        for x in rows(folder / "heldout.npy", BATCH):
            x_hat, on = reconstruct(x)
            kept = ~is_sink[low : low + len(x)]
            low += len(x)
            for with_sinks, total in sums.items():
                inside, outside = (x, x_hat) if with_sinks else (x[kept], x_hat[kept])
                total[0] += len(inside)
                total[1] = total[1] + (inside.double() - outside.double()).pow(2).sum()
                total[2] = total[2] + inside.double().sum(0)
                total[3] = total[3] + inside.double().pow(2).sum()
            fired = fired | on[kept].any(0)
            active += int(on[kept].sum())
    fvu = {key: float(error / (squares - mean.pow(2).sum() / n)) for key, (n, error, mean, squares) in sums.items()}
    return {
        "fvu": fvu[True],
        "fvu_without_sinks": fvu[False],
        "l0": active / sums[False][0],
        "dead_share": float((~fired).double().mean()),
    }
