"""Hook names and widths from a model's config alone: built on the meta device, no weights, no forward pass of the
real one."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from pipelines.errors import UsageError
from pipelines.models import ResolvedModel, _quiet_transformers
from sae.hooks import replace_activations


def probe_widths(resolved: ResolvedModel, hook_names: Sequence[str], trust_remote_code: bool = False) -> dict[str, int]:
    """Width of the activations at each hook.

    Raises:
        UsageError: the model has no such module; the message lists the nearest names.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _quiet_transformers(), torch.device("meta"):
        config = AutoConfig.from_pretrained(resolved.folder, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", trust_remote_code=trust_remote_code
        ).eval()
    widths: dict[str, int] = {}

    def keep(name: str, x: Tensor) -> None:
        widths[name] = int(x.shape[-1])

    with ExitStack() as stack, torch.device("meta"), torch.inference_mode():
        for name in hook_names:
            try:
                stack.enter_context(replace_activations(model, name, partial(keep, name)))
            except ValueError as error:
                raise UsageError(f"model {resolved.source}: {error}") from error
        # Eager attention and a given mask: the other paths look at numbers, which tensors on "meta" do not have.
        tokens = torch.zeros(1, 4, dtype=torch.long)
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    missing = [name for name in hook_names if name not in widths]
    if missing:
        raise UsageError(
            f"model {resolved.source}: the forward pass never reaches {missing}; choose modules that text "
            "passes through"
        )
    return widths
