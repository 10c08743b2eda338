"""What each latent writes: the tokens that a decoder direction promotes and suppresses when it reaches the output."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class LensTokens(NamedTuple):
    """The strongest tokens of each latent, strongest first; values are logits up to one positive factor per token."""

    promoted: Int[Tensor, "d_sae n_top"]
    promoted_value: Float[Tensor, "d_sae n_top"]
    suppressed: Int[Tensor, "d_sae n_top"]
    suppressed_value: Float[Tensor, "d_sae n_top"]


@torch.no_grad()
def logit_lens(
    W_dec: Float[Tensor, "d_sae d_in"],
    norm_weight: Float[Tensor, " d_model"],
    W_U: Float[Tensor, "d_model vocab"],
    *,
    n_top: int = 10,
    batch_size: int = 256,
) -> LensTokens:
    """Tokens whose logits a decoder row raises or lowers most.

        logits_i = (W_dec_i * norm_weight) @ W_U,   minus their mean over the vocabulary (a shift: softmax ignores it)

    The final norm divides by a positive scale that depends on the rest of the residual stream; it changes no ranking
    and is left out, and so is whatever later layers do. Reference: nostalgebraist 2020, "interpreting GPT: the logit
    lens". Differs: of directions, not of states.

    Raises:
        ValueError: widths differ (a dictionary of another model, or of a hook that is not the residual stream), or
            `n_top` exceeds the vocabulary.
    """
    d_model, vocab = W_U.shape
    if W_dec.shape[1] != d_model or norm_weight.shape[0] != d_model:
        raise ValueError(
            f"The logit lens needs decoder rows as wide as the residual stream: W_dec is {tuple(W_dec.shape)}, "
            f"the final norm {tuple(norm_weight.shape)}, W_U {tuple(W_U.shape)}. "
            "Use the language model that the dictionary was trained on; a hook outside the residual stream has no lens."
        )
    if not 1 <= n_top <= vocab:
        raise ValueError(f"n_top must be between 1 and the vocabulary size {vocab}, got {n_top}.")
    parts = []
    for start in range(0, len(W_dec), batch_size):
        logits = (W_dec[start : start + batch_size].float() * norm_weight.float()) @ W_U.float()
        logits -= logits.mean(dim=1, keepdim=True)
        up, down = logits.topk(n_top, dim=1), logits.topk(n_top, dim=1, largest=False)
        parts.append((up.indices, up.values, down.indices, down.values))
    promoted, promoted_value, suppressed, suppressed_value = (torch.cat(column) for column in zip(*parts, strict=True))
    return LensTokens(promoted, promoted_value, suppressed, suppressed_value)
