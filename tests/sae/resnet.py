"""A tiny residual network whose forward pass tests write out, and what compares two states of its modules."""

from typing import Any

import torch
from torch import Tensor, nn

from sae import SAE, BatchTopKConfig, BatchTopKSAE, build

D, D_SAE = 8, 32
HOOK = "layers.1"
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.as_tuple = as_tuple

    def forward(self, hidden_states: Tensor) -> Any:
        out = hidden_states + torch.tanh(self.linear(hidden_states))
        return (out, "cache") if self.as_tuple else out


class Model(nn.Module):
    def __init__(self, as_tuple: bool = False, by_keyword: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(as_tuple) for _ in range(3)])
        self.by_keyword = by_keyword

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(hidden_states=x) if self.by_keyword else layer(x)
            x = first(x)
        return x

    def at_hook(self, x: Tensor = X) -> Tensor:
        """The activations at `HOOK`, computed without any hook."""
        return first(self.layers[1](first(self.layers[0](x))))

    def after(self, x: Tensor) -> Tensor:
        """The rest of the model from `HOOK`."""
        return first(self.layers[2](x))


def first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def small_sae(d_in: int = D, d_sae: int = D_SAE, seed: int = 1) -> SAE:
    """A BatchTopK SAE with a threshold that leaves some latents on, and a decoder bias."""
    sae = build(BatchTopKConfig(d_in=d_in, d_sae=d_sae, k=4), seed=seed)
    assert isinstance(sae, BatchTopKSAE)
    sae.threshold.fill_(0.3)
    with torch.no_grad():
        sae.b_dec.fill_(0.2)
    return sae.requires_grad_(False)


def state(model: nn.Module) -> list[tuple[str, list[str], list[tuple[str, int]]]]:
    """Everything that hangs on the modules: the names of all attributes, and the sizes of all dicts among them."""
    return [
        (
            name,
            sorted(vars(module)),
            sorted((key, len(value)) for key, value in vars(module).items() if isinstance(value, dict)),
        )
        for name, module in model.named_modules()
    ]
