"""What a model goes on with at a hook: the one place where hooks are put on modules, and taken off again.

Hooks are removed when the block ends, whatever happens in it; nothing is stored on the model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sae.naming import find_hook


@contextmanager
def replace_activations(model: Any, hook_name: str, replace: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """While the block lasts, the model goes on with `replace(x)` at the hook, or with x itself where that is None.

    Where the module takes or returns several values, x is the first. Blocks may be nested, at one hook too: the inner
    one receives what the outer one left.

    Args:
        model: a module, or an nnsight model.
        hook_name: see `sae.naming.find_hook`.
    Raises:
        ValueError: if there is no such hook.
        TypeError: in the forward pass, if the value there is no tensor.
    """
    _, side, module = find_hook(model, hook_name)

    def replaced(x: Any) -> Tensor | None:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"The activations at {hook_name} must be a tensor or a tuple that starts with one, got "
                f"{type(x).__name__}. Choose a module that takes or returns hidden states."
            )
        return replace(x)

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = replaced(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = None if args else next(iter(kwargs))
        new = replaced(args[0] if key is None else kwargs[key])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if key is None else (args, kwargs | {key: new})

    if side == "output":
        handle = module.register_forward_hook(on_output)
    else:
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
