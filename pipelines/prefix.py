"""Run the layers before a hook once, and what follows them as often as something is changed at the hook.

    prefix = Prefix(model, ["model.layers.8"])
    with prefix.record():
        clean = model(**inputs).logits
    with prefix.replay(), replace_activations(model, "model.layers.8", change):
        changed = model(**inputs).logits           # the same inputs; layers 0 … 8 are not computed again

Layers are the entries of a `ModuleList` whose first argument and first output is the residual stream, one after the
other, as in every decoder of Transformers. A model that passes something else from layer to layer would be replayed
wrongly: `Prefix` is for callers that compare one replayed pass without a change with the recorded one.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sae.naming import find_hook


class Prefix:
    """The layers of a model before the first of some hooks; none if the hooks do not lie in a list of layers."""

    def __init__(self, model: nn.Module, hook_names: Collection[str]) -> None:
        """Raises: ValueError for a hook that the model does not have."""
        self._layers = min((_before(model, name) for name in hook_names), key=len, default=[])
        self._output: Any = None

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Keep what the last of the layers gives in the forward pass that is run inside of the block."""
        if not self._layers:
            yield
            return
        handle = self._layers[-1].register_forward_hook(self._keep)
        try:
            yield
        finally:
            handle.remove()

    def _keep(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._output = output

    @contextmanager
    def replay(self, copies: int = 1) -> Iterator[None]:
        """Skip the layers and go on from what was kept. Only for the inputs of that forward pass.

        Args:
            copies: how often the inputs are repeated along the batch: `tokens.repeat(copies, 1)`.
        Raises: ValueError if nothing was recorded.
        """
        if self._layers and self._output is None:
            raise ValueError("There is nothing to replay: run the model inside of `record` first.")
        as_tuple = isinstance(self._output, tuple)
        output = self._output if copies == 1 else _repeated(self._output, copies)
        skipped = self._layers[:-1]
        try:
            for layer in skipped:
                layer.forward = _pass_on(as_tuple)
            if self._layers:
                self._layers[-1].forward = lambda *_args, **_kwargs: output
            yield
        finally:
            for layer in self._layers:
                vars(layer).pop("forward", None)


def _pass_on(as_tuple: bool) -> Callable[..., Any]:
    """A layer that gives what it is given."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if as_tuple else hidden

    return forward


def _repeated(output: Any, copies: int) -> Any:
    """A layer's output for a batch that holds every row `copies` times; what is no residual stream stays out."""
    if isinstance(output, tuple):
        return (_repeated(output[0], copies), *output[1:])
    return output.repeat(copies, *[1] * (output.ndim - 1))


def _before(model: nn.Module, hook_name: str) -> list[nn.Module]:
    """The layers that are finished when the hook is reached, in order."""
    path, side, _ = find_hook(model, hook_name)
    parts = path.split(".")
    for depth, part in enumerate(parts):
        parent = model.get_submodule(".".join(parts[:depth]))
        if isinstance(parent, nn.ModuleList) and part.isdecimal():
            is_layer_output = depth == len(parts) - 1 and side == "output"
            return list(parent)[: int(part) + is_layer_output]
    return []
