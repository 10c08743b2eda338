"""Which latents an output depends on: effects per latent and position, over several dictionaries at once.

    effects = attribute(model, metric, clean, patched, dictionaries={"8": d8, "12": d12}, method="ig")
    effects.top(20)

The effect of a node a (one latent at one token, or the error of a reconstruction) is what the metric m changes by when
a alone takes its baseline value a':

    effect(a) = m(clean | do(a = a')) − m(clean)                            exact: one forward pass for each node
    "atp"     ≈ (a' − a) · ∂m/∂a at a                                       one backward pass for all of them
    "ig"      ≈ (a' − a) · mean over t of ∂m/∂a at a + t (a' − a)           steps · groups for each dictionary

On the path of "ig" a node moves together with the others of its group, a random part of all nodes. With one group this
is the method of Marks et al., whose effects add up to that of moving everything; but what two nodes do together is then
counted into the effect of each. With more groups less of it is, and the effects come nearer to the exact ones: on a
random three-layer model r rises from 0.65 to 0.97 between 1 and 16 groups, while more steps than 3 change nothing.

References: attribution patching, Nanda 2023, and Syed, Rager, Conmy 2023, arXiv:2310.10348; both methods for latents
and error nodes, Marks et al. 2024, Sparse Feature Circuits, arXiv:2403.19647, section 3.1; integrated gradients,
Sundararajan, Taly, Yan 2017, arXiv:1703.01365. Differs: groups, and gradients at the midpoints of the steps.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary import Dictionary
from sae.edits import Excluded
from sae.hooks import replace_activations
from sae.tapping import Tap

Metric = Callable[[Any], Tensor]
"""From the model's output to one number, or one for each row of the batch."""
Inputs = Tensor | Mapping[str, Any]
"""Token ids, or the keyword arguments of the model."""


class Node(NamedTuple):
    """One latent, or the error, at one token."""

    dictionary: str
    column: int
    """Its place in the sequence, padding included."""
    latent: int | None
    """None for the error of the reconstruction."""
    effect: float
    """Summed over the rows of the batch."""


@dataclass(frozen=True, eq=False)
class Effects:
    """What `attribute` found; padding and excluded tokens have effect 0."""

    latents: dict[str, Float[Tensor, "batch seq d_sae"]]
    errors: dict[str, Float[Tensor, "batch seq"]]
    clean: Float[Tensor, " rows"]
    """The metric without any change."""

    def top(self, n: int, *, errors: bool = True) -> list[Node]:
        """The `n` nodes of largest absolute effect, largest first.

        Args:
            errors: whether the errors take part.
        """
        nodes: list[Node] = []
        for name, effects in self.latents.items():
            total = effects.sum(0)
            best = total.abs().flatten().topk(min(n, total.numel())).indices
            for index in best.tolist():
                column, latent = divmod(index, total.shape[1])
                nodes.append(Node(name, column, latent, float(total[column, latent])))
            if errors:
                nodes += [Node(name, i, None, float(value)) for i, value in enumerate(self.errors[name].sum(0))]
        return sorted(nodes, key=lambda node: -abs(node.effect))[:n]


@dataclass(frozen=True, eq=False)
class _Values:
    """A dictionary's latents and error in a clean pass, and the values that they are moved to."""

    f: Float[Tensor, "batch seq d_sae"]
    error: Float[Tensor, "batch seq d_out"]
    f_to: Float[Tensor, "batch seq d_sae"]
    error_to: Float[Tensor, "batch seq d_out"]
    scale: Float[Tensor, "batch seq 1"] | float
    """What f @ W_dec is multiplied by in the hook's activations: see `SAE.output_scale`."""


def attribute(
    model: Any,
    metric: Metric,
    clean: Inputs,
    patched: Inputs | None = None,
    *,
    dictionaries: Mapping[str, Dictionary],
    method: Literal["atp", "ig"] = "atp",
    baseline: Literal["zero", "mean", "resample"] | None = None,
    steps: int = 3,
    groups: int = 24,
    seed: int = 0,
    exclude: Excluded = None,
) -> Effects:
    """Approximate effects of all latents and errors at all tokens.

    Args:
        clean: inputs whose output is explained.
        patched: for "resample" the other inputs, column by column, with as many rows or one; for "mean" the reference
            texts (by default the clean ones).
        dictionaries: by any name; SAEs and transcoders, also several of one hook.
        baseline: what a node is moved to. "zero": latents and error to 0. "mean": to their means over the counted
            tokens of the reference. "resample": to their values in the patched run. By default "resample" where
            `patched` is given, else "zero".
        steps, groups, seed: of "ig": points on the path; parts into which the nodes are dealt, at random by `seed`.
        exclude: tokens that stay as they are; padding always does.
    Raises:
        ValueError: for options that do not fit, crosscoders, or patched inputs of another shape.
    """
    values = node_values(model, clean, patched, dictionaries=dictionaries, baseline=baseline, exclude=exclude)
    if min(steps, groups) < 1:
        raise ValueError(f"`steps` and `groups` must be 1 or more, got {steps} and {groups}. Leave them out.")
    if method not in ("atp", "ig"):
        raise ValueError(f"`method` must be 'atp' or 'ig', got {method!r}. Choose one of them.")
    with torch.no_grad():
        before = _numbers(metric(_call(model, clean)))
    gradients = (
        _gradients(model, metric, clean, dictionaries)
        if method == "atp"
        else {
            name: _path_gradients(model, metric, clean, dictionary, values[name], steps, groups, seed)
            for name, dictionary in dictionaries.items()
        }
    )
    latents, errors = {}, {}
    for name, value in values.items():
        of_latents, of_error = gradients[name]
        latents[name] = (value.f_to - value.f) * of_latents
        errors[name] = ((value.error_to - value.error) * of_error).sum(-1)
    return Effects(latents, errors, before)


@torch.no_grad()
def exact_effects(
    model: Any,
    metric: Metric,
    clean: Inputs,
    patched: Inputs | None = None,
    *,
    dictionaries: Mapping[str, Dictionary],
    nodes: Sequence[Node],
    baseline: Literal["zero", "mean", "resample"] | None = None,
    exclude: Excluded = None,
) -> Float[Tensor, " n"]:
    """Effects of single nodes by moving each alone, one forward pass for each: what `attribute` approximates.

    Args: see `attribute`.
    Returns: one effect for each of `nodes`, summed over the rows of the batch.
    """
    values = node_values(model, clean, patched, dictionaries=dictionaries, baseline=baseline, exclude=exclude)
    before = _numbers(metric(_call(model, clean))).sum()
    effects = []
    for node in nodes:
        dictionary, value = dictionaries[node.dictionary], values[node.dictionary]
        delta = torch.zeros_like(value.error)
        at = (slice(None), node.column)
        if node.latent is None:
            delta[at] = (value.error_to - value.error)[at]
        else:
            change = (value.f_to - value.f)[:, node.column, node.latent, None]
            delta[at] = (change * dictionary.W_dec[node.latent] * _at(value.scale, node.column)).to(delta.dtype)
        with replace_activations(model, dictionary.output_hooks[0], _adding(delta)):
            effects.append(_numbers(metric(_call(model, clean))).sum() - before)
    return torch.stack(effects) if effects else torch.zeros(0)


@torch.no_grad()
def node_values(
    model: Any,
    clean: Inputs,
    patched: Inputs | None,
    *,
    dictionaries: Mapping[str, Dictionary],
    baseline: Literal["zero", "mean", "resample"] | None,
    exclude: Excluded,
) -> dict[str, _Values]:
    """Latents and errors of the clean run, and what the baseline moves them to. Raises: see `attribute`."""
    if baseline is None:
        baseline = "zero" if patched is None else "resample"
    if baseline not in ("zero", "mean", "resample") or (baseline == "resample") > (patched is not None):
        raise ValueError(
            f"`baseline` must be 'zero', 'mean' or, with `patched` inputs, 'resample', got {baseline!r}. Correct it."
        )
    for name, dictionary in dictionaries.items():
        if len(dictionary.output_hooks) != 1:
            raise ValueError(
                f"The dictionary {name!r} reconstructs {len(dictionary.output_hooks)} hooks, and effects are of one. "
                "Leave crosscoders out, and give a dictionary its `hook_name`."
            )
    here = _run(model, clean, dictionaries, exclude)
    reference = here if baseline == "zero" or patched is None else _run(model, patched, dictionaries, exclude)
    values = {}
    for name, tap in here.items():
        f, error, counted = tap.latents.detach(), tap.error.detach(), tap.counted.unsqueeze(-1)
        other = reference[name]
        match baseline:
            case "zero":
                f_to, error_to = torch.zeros_like(f), torch.zeros_like(error)
            case "mean":
                f_to, error_to = other.mean(), other.error[other.counted].mean(0)
            case _:
                f_to, error_to = other.latents, other.error
                if f_to.shape[1:] != f.shape[1:] or f_to.shape[0] not in (1, f.shape[0]):
                    raise ValueError(
                        f"Patched inputs must have as many columns as the clean ones, and as many rows or one: got "
                        f"{list(f_to.shape[:2])} for {list(f.shape[:2])}. Pad them alike."
                    )
        scale = dictionaries[name].sae.output_scale(tap.x)
        values[name] = _Values(f, error, torch.where(counted, f_to, f), torch.where(counted, error_to, error), scale)
    return values


def _run(model: Any, inputs: Inputs, dictionaries: Mapping[str, Dictionary], exclude: Excluded) -> dict[str, Tap]:
    """A pass with every dictionary attached, each with its latents and error."""
    with ExitStack() as stack:
        taps = {
            name: stack.enter_context(dictionary.attach(model, grad=True, exclude=exclude))
            for name, dictionary in dictionaries.items()
        }
        _call(model, inputs)
    return taps


def _gradients(
    model: Any, metric: Metric, clean: Inputs, dictionaries: Mapping[str, Dictionary]
) -> dict[str, tuple[Tensor, Tensor]]:
    """∂m/∂f and ∂m/∂error of every dictionary at the clean run, from one backward pass."""
    with ExitStack() as stack, torch.enable_grad():
        taps = {name: stack.enter_context(d.attach(model, grad=True)) for name, d in dictionaries.items()}
        total = _numbers(metric(_call(model, clean))).sum()
    nodes = [node for tap in taps.values() for node in (tap.latents, tap.error)]
    found = torch.autograd.grad(total, nodes, allow_unused=True)
    filled = [torch.zeros_like(node) if grad is None else grad for node, grad in zip(nodes, found, strict=True)]
    return {name: (filled[2 * i], filled[2 * i + 1]) for i, name in enumerate(taps)}


def _path_gradients(
    model: Any,
    metric: Metric,
    clean: Inputs,
    dictionary: Dictionary,
    value: _Values,
    steps: int,
    groups: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of one dictionary's nodes, averaged over the straight paths of their groups.

    Nothing below the hook changes on a path, so that the model's own activations there are the clean ones.
    """
    W_dec = dictionary.W_dec
    generator = torch.Generator().manual_seed(seed)
    group_of_f = torch.randint(groups, value.f.shape[1:], generator=generator).to(value.f.device)
    group_of_error = torch.randint(groups, value.f.shape[1:2], generator=generator).to(value.f.device).unsqueeze(-1)
    exact = torch.promote_types(value.error.dtype, torch.float32)
    of_latents, of_errors = torch.zeros_like(value.f), torch.zeros_like(value.error, dtype=exact)
    for group in range(groups):
        ours_f, ours_error = group_of_f == group, group_of_error == group
        # f and the error enter the hook's activations linearly: the gradient of those gives both.
        way = (((value.f_to - value.f) * ours_f) @ W_dec * value.scale).to(value.error.dtype)
        way = way + (value.error_to - value.error) * ours_error
        gradient = torch.zeros_like(way, dtype=exact)
        for step in range(steps):
            moved = ((step + 0.5) / steps * way).requires_grad_()
            with replace_activations(model, dictionary.output_hooks[0], _adding(moved)), torch.enable_grad():
                total = _numbers(metric(_call(model, clean))).sum()
            gradient += torch.autograd.grad(total, moved)[0] / steps
        of_latents += ((gradient.to(W_dec.dtype) * value.scale) @ W_dec.T) * ours_f
        of_errors += gradient * ours_error
    return of_latents, of_errors


def _at(scale: Float[Tensor, "batch seq 1"] | float, column: int) -> Float[Tensor, "batch 1"] | float:
    return scale[:, column] if isinstance(scale, Tensor) else scale


def _adding(delta: Float[Tensor, "batch seq d_out"]) -> Callable[[Tensor], Tensor]:
    return lambda y: y + delta.reshape(y.shape)


def _call(model: Any, inputs: Inputs) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def _numbers(value: Tensor) -> Float[Tensor, " rows"]:
    """Raises: ValueError if a metric gives anything but one number, or one for each row."""
    if value.ndim > 1:
        raise ValueError(
            f"A metric must give one number, or one for each row, got shape {tuple(value.shape)}. Sum it over the rest."
        )
    return value.reshape(-1)
