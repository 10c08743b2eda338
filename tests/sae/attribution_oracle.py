"""Exact ablation beside attribution, and dictionaries trained in a moment on what a model makes of random tokens."""

from typing import Any

import torch
from torch import Tensor

from sae import BatchTopKConfig, Dictionary, Trainer, TrainerConfig, build, replace_activations
from sae.attribution import Effects, Metric, Node, attribute, exact_effects, node_values


def trained(model: Any, hook: str, d_in: int, vocab: int, n_steps: int = 120, k: int = 8) -> Dictionary:
    """A BatchTopK dictionary four times as wide as the hook, trained on 4,096 random tokens."""
    generator = torch.Generator().manual_seed(0)
    seen: list[Tensor] = []
    with replace_activations(model, hook, seen.append):  # type: ignore[func-returns-value,arg-type]
        for _ in range(4):
            model(torch.randint(2, vocab, (32, 32), generator=generator))
    x = torch.cat(seen).flatten(0, 1)
    x = x[x.norm(dim=1) < 5 * x.norm(dim=1).median()].float()
    sae = build(BatchTopKConfig(d_in=d_in, d_sae=4 * d_in, k=k), seed=0)
    rows = (x[torch.randint(len(x), (512,), generator=generator)] for _ in range(n_steps))
    Trainer(sae, TrainerConfig(lr=5e-3), n_steps).fit(rows)
    return Dictionary(sae.requires_grad_(False), hook_name=hook)


def moving_nodes(values: dict[str, Any], limit: int = 60) -> list[Node]:
    """The latents whose value the baseline changes in any row, at most `limit` of each dictionary."""
    nodes = []
    for name, value in values.items():
        moves = (value.f_to != value.f).any(0).nonzero().tolist()
        nodes += [Node(name, column, latent, 0.0) for column, latent in moves[:: max(1, len(moves) // limit)]]
    return nodes


def predicted(effects: Effects, nodes: list[Node]) -> Tensor:
    found = []
    for name, column, latent, _ in nodes:
        of_node = effects.errors[name][:, column] if latent is None else effects.latents[name][:, column, latent]
        found.append(of_node.sum())
    return torch.stack(found)


def r(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def compared(
    model: Any, metric: Metric, dictionaries: dict[str, Dictionary], baseline: Any, clean: Any, patched: Any
) -> tuple[float, float, float]:
    """Correlations with exact ablation: of atp over all latents, of ig over its top 50 and over all."""
    options: dict[str, Any] = {"dictionaries": dictionaries, "baseline": baseline}
    values = node_values(model, clean, patched, exclude=None, **options)
    nodes = moving_nodes(values)
    assert len(nodes) > 60
    exact = exact_effects(model, metric, clean, patched, nodes=nodes, **options)
    atp = predicted(attribute(model, metric, clean, patched, method="atp", **options), nodes)
    ig = predicted(attribute(model, metric, clean, patched, method="ig", **options), nodes)
    top = ig.abs().topk(50).indices
    figures = r(atp, exact), r(ig[top], exact[top]), r(ig, exact)
    print(f"{baseline}: {len(nodes)} nodes; r of atp {figures[0]:.3f}; of ig {figures[1]:.3f} (50), {figures[2]:.3f}")
    return figures
