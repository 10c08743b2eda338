"""Hook names and widths from a model's config alone: built on the meta device, no weights, no forward pass of the
real one."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from pipelines.errors import UsageError
from pipelines.models import ResolvedModel, _quiet_transformers, unusable
from sae.hooks import replace_activations


def probe_widths(resolved: ResolvedModel, hook_names: Sequence[str], trust_remote_code: bool = False) -> dict[str, int]:
    """Width of the activations at each hook.

    Raises:
        UsageError: transformers cannot build the model; it has no such module (the message lists the nearest names); or
            the module does not give one vector a token.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _quiet_transformers(), torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(resolved.folder, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", trust_remote_code=trust_remote_code
            ).eval()
        except (ValueError, OSError) as error:
            raise unusable(resolved, error) from error
    tokens = torch.zeros(2, 4, dtype=torch.long, device="meta")
    widths: dict[str, int] = {}

    def keep(name: str, x: Tensor) -> None:
        if x.shape[:-1] != tokens.shape or not x.is_floating_point():
            raise UsageError(
                f"model {resolved.source}: the activations at {name} have shape {tuple(x.shape)} and {x.dtype} for "
                f"tokens of shape {tuple(tokens.shape)}; choose a module that gives one vector a token"
            )
        widths[name] = int(x.shape[-1])

    with ExitStack() as stack, torch.device("meta"), torch.inference_mode():
        for name in hook_names:
            try:
                stack.enter_context(replace_activations(model, name, partial(keep, name)))
            except ValueError as error:
                raise UsageError(f"model {resolved.source}: {error}") from error
        # Eager attention and a given mask: the other paths look at numbers, which tensors on "meta" do not have.
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    missing = [name for name in hook_names if name not in widths]
    if missing:
        raise UsageError(
            f"model {resolved.source}: the forward pass never reaches {missing}; choose modules that text "
            "passes through"
        )
    return widths
