"""Does a dictionary fit the model that it is used on? If not, which mistake would explain it?

    report = check(dictionary, model, tokens)
    report.ok, report.sentence

A dictionary at the wrong hook, or fed without the BOS that it was trained with, gives latents all the same; only its
reconstruction tells. It is evaluated at its hook and under each usual mistake. The mistakes are ranked by FVU, times
the root of the factor by which L0 misses the recorded one: with a threshold, activations of the next layer or of
another scale are reconstructed nearly as well, but by many more latents.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionary import Dictionary
from sae.hooks import replace_activations
from sae.metrics import FVU
from sae.naming import find_hook, place_of, split_hook_name
from sae.tokennorm import normalise_tokens

_WORSE, _SLACK = 2.0, 0.15
"""FVU is off where it exceeds the recorded one by this factor and by this much: other text alone changes it by less."""
_PLAUSIBLE_FVU = 0.6
"""Where none is recorded: published dictionaries lie below."""
_L0_FACTOR, _NORM_FACTOR = 3.0, 1.5
"""L0 and the median norm are off where they differ from the recorded ones by more than these factors."""
_BETTER = 0.9
"""A mistake explains a misfit if it lowers that product to this share, at least, and by `_LEAST`."""
_LEAST = 0.02


@dataclass(frozen=True)
class Fit:
    """Figures of the dictionary under one hypothesis, over tokens that are not attention sinks."""

    hypothesis: str
    """What would be true, as a clause: "it belongs to model.layers.7, a neighbouring layer"."""
    fvu: float
    l0: float
    """Mean number of nonzero latents a token."""
    norm: float
    """Median norm of what the SAE reads."""


@dataclass(frozen=True)
class CheckReport:
    """What `check` found."""

    hook_name: str
    own: Fit
    """At the recorded hook, with the recorded use of BOS."""
    recorded: Mapping[str, float] = field(default_factory=dict)
    """Of fvu, l0 and norm, those that the dictionary records."""
    off: tuple[str, ...] = ()
    """Which of fvu, l0 and norm are not as recorded, or not plausible where none is recorded."""
    others: tuple[Fit, ...] = ()
    """Under each usual mistake, the best first."""
    cause: str | None = None
    """The hypothesis that explains the misfit; None where there is none, or nothing that was tried explains it."""
    ok: bool = True
    sentence: str = ""


def check(
    dictionary: Dictionary,
    model: Any,
    tokens: Int[Tensor, "batch seq"],
    *,
    bos_token_id: int | None = None,
    model_name: str | None = None,
    sink_multiple: float = 3.0,
) -> CheckReport:
    """Compare a dictionary's figures on a few texts with the recorded ones, and name the likely cause of a misfit.

    Args:
        tokens: ordinary text, a thousand tokens or more, without BOS and without padding.
        bos_token_id: put before every text where the dictionary was trained so, and else tried.
        model_name: compared with the recorded one.
        sink_multiple: tokens whose norm exceeds this multiple of the median are left out, as are first positions.
    Raises:
        ValueError: if the model lacks the hook, or its activations there have another width.
    """
    prepends = bos_token_id is not None and _prepends_bos(dictionary)
    with_bos = tokens if bos_token_id is None else torch.nn.functional.pad(tokens, (1, 0), value=bos_token_id)
    used, other = (with_bos, tokens) if prepends else (tokens, with_bos)

    def fit(hypothesis: str, x: Tensor, y: Tensor) -> Fit:
        return _fit(dictionary, hypothesis, x, y, sink_multiple)

    hooks = _hook_sets(dictionary, model)
    seen = _activations(model, used, [name for _, names in hooks for name in names])
    own_names = hooks[0][1]
    x, y = _sides(dictionary, seen, own_names)
    own = fit("it fits", x, y)
    others = []
    for hypothesis, names in hooks[1:]:
        x_there, y_there = _sides(dictionary, seen, names)
        if x_there.shape == x.shape and y_there.shape == y.shape and not torch.equal(x_there, x):
            others.append(fit(hypothesis, x_there, y_there))
    if bos_token_id is not None:
        claim = "it was trained without BOS" if prepends else "it was trained with BOS before every text"
        others.append(fit(claim, *_sides(dictionary, _activations(model, other, own_names), own_names)))
    if dictionary.input_hooks == dictionary.output_hooks:
        for claim, transformed in _transforms(x):
            others.append(fit(claim, transformed, transformed))
    recorded = _recorded(dictionary)
    off = _off(own, recorded, dictionary.d_sae)
    return _verdict(dictionary, own, others, recorded, off, model_name)


# ---- hypotheses ------------------------------------------------------------------------------------------------------


def _hook_sets(dictionary: Dictionary, model: Any) -> list[tuple[str, tuple[str, ...]]]:
    """The hooks of the dictionary first, then those that it may have been trained on instead, where the model has them.

    Raises: ValueError if the model lacks the dictionary's own.
    """
    own = dictionary.hook_names or (dictionary.required_hook_name,)
    for name in own:
        find_hook(model, name)
    sets = [("it fits", own)]
    if len(own) == 1:
        path, side = split_hook_name(own[0])
        opposite = f"{path}:{'output' if side == 'input' else 'input'}"
        claim = f"it belongs to the {'output' if side == 'input' else 'input'} of {path}, not its {side}"
        sets.append((claim, (opposite,)))
    for step in (-1, 1, -2, 2):
        names = tuple(_moved(name, step) for name in own)
        if None not in names:
            moved = tuple(str(name) for name in names)
            distance = "a neighbouring layer" if abs(step) == 1 else "two layers away"
            sets.append((f"it belongs to {', '.join(moved)}, {distance}", moved))
    return [sets[0], *(each for each in sets[1:] if all(_exists(model, name) for name in each[1]))]


def _moved(hook_name: str, step: int) -> str | None:
    """The hook so many layers further; None if the name has no layer, or none is there."""
    found = re.search(r"(?<=\.)\d+(?=[.:]|$)", hook_name)
    if found is None or int(found[0]) + step < 0:
        return None
    return f"{hook_name[: found.start()]}{int(found[0]) + step}{hook_name[found.end() :]}"


def _exists(model: Any, hook_name: str) -> bool:
    try:
        find_hook(model, hook_name)
    except ValueError:
        return False
    return True


def _transforms(x: Float[Tensor, "batch seq d_in"]) -> list[tuple[str, Tensor]]:
    """The activations as they would be under other conventions."""
    norm = x[:, 1:].norm(dim=-1).mean()
    return [
        ("it was trained on activations scaled to a mean norm of √d_in", x * (x.shape[-1] ** 0.5 / norm)),
        ("it was trained on activations scaled to a mean norm of 1", x / norm),
        (
            "it was trained on a model with centred weights, as TransformerLens makes them: each activation vector "
            "sums to 0",
            x - x.mean(dim=-1, keepdim=True),
        ),
        ("it was trained on activations that were normalised to mean 0 and deviation 1 at each token",
         normalise_tokens(x, "layer_norm")),
        ("it was trained on activations that were scaled to norm √d_in at each token",
         normalise_tokens(x, "constant_norm_rescale")),
    ]  # fmt: skip


# ---- figures ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _activations(model: Any, tokens: Int[Tensor, "batch seq"], hook_names: Sequence[str]) -> dict[str, Tensor]:
    """float32 activations [batch, seq, width] at every hook; layers after the last one are not run.

    Raises: ValueError if the forward pass does not come to one of them.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        def on(x: Tensor) -> None:
            seen[name] = x.float().reshape(*tokens.shape, -1)
            if len(seen) == len(set(hook_names)):
                raise _AllSeen

        return on

    with ExitStack() as stack:
        for name in set(hook_names):
            stack.enter_context(replace_activations(model, name, keep(name)))
        stack.enter_context(suppress(_AllSeen))
        model(tokens)
    if missing := [name for name in hook_names if name not in seen]:
        raise ValueError(f"The forward pass never comes to {missing}. Choose modules that text passes through.")
    return seen


class _AllSeen(Exception):
    """Ends a forward pass."""


def _sides(dictionary: Dictionary, seen: Mapping[str, Tensor], names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What the SAE reads and what it reconstructs, if its hooks were `names`."""
    own = dictionary.hook_names
    as_named = dict(zip(own, names, strict=True))
    x, y = (
        torch.cat([seen[as_named[hook]] for hook in hooks], dim=-1)
        for hooks in (dictionary.input_hooks, dictionary.output_hooks)
    )
    return x, y


@torch.no_grad()
def _fit(dictionary: Dictionary, hypothesis: str, x: Tensor, y: Tensor, sink_multiple: float) -> Fit:
    sae = dictionary.sae
    if x.shape[-1] != sae.d_in or y.shape[-1] != sae.d_out:
        raise ValueError(
            f"The activations at {', '.join(dictionary.hook_names)} must have width d_in={sae.d_in} and "
            f"d_out={sae.d_out}, got {x.shape[-1]} and {y.shape[-1]}: this dictionary is for another model or hook."
        )
    norms = x.norm(dim=-1)
    median = norms[:, 1:].median()
    counted = norms <= sink_multiple * median
    counted[:, 0] = False
    x, y = x[counted], y[counted]
    fvu, n_active = FVU(sae.d_out), 0
    for start in range(0, len(x), 1024):
        part = x[start : start + 1024].to(sae.W_dec.device)
        output = sae(part)
        fvu.update(y[start : start + 1024], output.x_hat.float().to(y.device))
        n_active += int(output.latent_acts.count_nonzero())
    return Fit(hypothesis, fvu.compute(), n_active / max(1, len(x)), float(median))


# ---- what is recorded ------------------------------------------------------------------------------------------------


def _origin(dictionary: Dictionary) -> Mapping[str, Any]:
    """What whoever trained it recorded: an imported dictionary carries that inside of its own provenance."""
    before = dictionary.provenance.get("imported_from")
    if isinstance(before, Mapping):
        return before
    return {**dictionary.metadata, **dictionary.provenance, "metrics": dictionary.metrics}


def _recorded_hooks(dictionary: Dictionary) -> tuple[str, ...]:
    """The hooks that it was trained on by its own record, where those are other places than its hooks now."""
    recorded = tuple(str(name) for name in _origin(dictionary).get("hook_names") or ())
    same = tuple(map(_place, recorded)) == tuple(map(_place, dictionary.hook_names))
    return () if same else recorded


def _place(hook_name: str) -> Any:
    return place_of(hook_name) or hook_name.removesuffix(":output")


def _prepends_bos(dictionary: Dictionary) -> bool:
    """Whether it was trained with BOS; so it was, as a rule, where that is not recorded."""
    origin = _origin(dictionary)
    packing = origin.get("packing")
    if isinstance(packing, Mapping) and "prepend_bos" in packing:
        return bool(packing["prepend_bos"])
    return bool(origin.get("prepend_bos", True))


def _recorded(dictionary: Dictionary) -> dict[str, float]:
    origin = _origin(dictionary)
    metrics = origin.get("metrics") or {}
    found = {
        "fvu": metrics.get("fvu"),
        "l0": metrics.get("l0") or origin.get("l0") or getattr(dictionary.config, "k", None),
        "norm": origin.get("median_norm"),
    }
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _score(fit: Fit, recorded: Mapping[str, float]) -> float:
    if "l0" not in recorded:
        return fit.fvu
    ratio = max(fit.l0, 1e-3) / max(recorded["l0"], 1e-3)
    return fit.fvu * math.sqrt(max(ratio, 1 / ratio))


def _fvu_limit(recorded: Mapping[str, float]) -> float:
    return max(recorded["fvu"] * _WORSE, recorded["fvu"] + _SLACK) if "fvu" in recorded else _PLAUSIBLE_FVU


def _off(fit: Fit, recorded: Mapping[str, float], d_sae: int) -> tuple[str, ...]:
    off = []
    if not fit.fvu <= _fvu_limit(recorded):
        off.append("fvu")
    least, most = (recorded["l0"] / _L0_FACTOR, recorded["l0"] * _L0_FACTOR) if "l0" in recorded else (0.5, d_sae / 4)
    if not least <= fit.l0 <= most:
        off.append("l0")
    if "norm" in recorded and not 1 / _NORM_FACTOR <= fit.norm / recorded["norm"] <= _NORM_FACTOR:
        off.append("norm")
    return tuple(off)


# ---- verdict ---------------------------------------------------------------------------------------------------------


def _verdict(
    dictionary: Dictionary,
    own: Fit,
    others: list[Fit],
    recorded: Mapping[str, float],
    off: tuple[str, ...],
    model_name: str | None,
) -> CheckReport:
    hook = ", ".join(dictionary.hook_names)
    ranked = tuple(sorted(others, key=lambda fit: _score(fit, recorded)))
    # Of nearly equal ones the first: hooks come before conventions.
    score, least = _score(own, recorded), min((_score(fit, recorded) for fit in others), default=0.0)
    good_enough = min(_BETTER * score, score - _LEAST, 1.05 * least)
    plausible = [fit for fit in others if fit.fvu <= max(_PLAUSIBLE_FVU, _fvu_limit(recorded))]
    best = next((fit for fit in plausible if _score(fit, recorded) <= good_enough), None)
    elsewhere = _recorded_hooks(dictionary)
    ok = not ({"fvu", "l0"} & set(off)) and best is None and not elsewhere
    figures = ", ".join(
        f"{title} {value:.3g}" + (f" (recorded {recorded[name]:.3g})" if name in recorded else "")
        for name, title, value in (("fvu", "FVU", own.fvu), ("l0", "L0", own.l0), ("norm", "median norm", own.norm))
    )
    if ok:
        return CheckReport(hook, own, recorded, off, ranked, None, True, f"The dictionary fits {hook}: {figures}.")
    begin = f"The dictionary does not fit {hook}: {figures}."
    if elsewhere:
        cause = f"it was trained on {', '.join(elsewhere)}, as it records"
        return CheckReport(hook, own, recorded, off, ranked, cause, False, f"{begin} The reason is that {cause}.")
    if best is not None:
        cause = best.hypothesis
        sentence = f"{begin} It looks as if {cause}: FVU would be {best.fvu:.3g} and L0 {best.l0:.3g}."
        return CheckReport(hook, own, recorded, off, ranked, cause, False, sentence)
    trained_on = _origin(dictionary).get("model_name")
    if trained_on and model_name and _short(str(trained_on)) != _short(model_name):
        cause = f"it was trained on {trained_on}, and this model is {model_name}"
        if _stem(str(trained_on)) == _stem(model_name):
            cause += ": a base model for an instruct model, or the other way round"
        return CheckReport(
            hook, own, recorded, off, ranked, cause, False, f"{begin} The likely reason is that {cause}."
        )
    hint = (
        "No neighbouring hook, use of BOS, centring or scale explains it: it may belong to another model, such as the "
        "base model of this one, or to other weights of it."
    )
    return CheckReport(hook, own, recorded, off, ranked, None, False, f"{begin} {hint}")


def _short(model_name: str) -> str:
    """A model's name without its owner, in lower case: Hub ids and TransformerLens' names agree in that."""
    return model_name.rstrip("/").rsplit("/", 1)[-1].lower()


def _stem(model_name: str) -> str:
    """The name without what tells base and instruct models apart."""
    return re.sub(r"[-_.](instruct|it|chat|base|pt|sft|dpo)(?=[-_.]|$)", "", _short(model_name))
