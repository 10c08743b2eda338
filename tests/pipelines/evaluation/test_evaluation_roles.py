"""Input and output scores on a model and dictionaries whose roles are known."""

import pytest
import torch
from dictionaries import random_dictionary

from pipelines.evaluation.reconstruction import Block
from pipelines.evaluation.roles import (
    FACTOR,
    PROMPT,
    StrongestWindows,
    output_scores,
    promoted_tokens,
    role_figures,
    sampled_latents,
    writes_to_stream,
)
from sae import SparseLatents, replace_activations

HOOK = "model.layers.1"


def block(values: dict[tuple[int, int], float], n: int, offset: int = 0) -> Block:
    """Tokens offset … offset + n; token i has the id 100 + i."""
    keys = sorted(values)
    latents = SparseLatents(
        torch.tensor([k[0] for k in keys]), torch.tensor([k[1] for k in keys]), torch.tensor([values[k] for k in keys])
    )
    place = torch.arange(offset, offset + n)
    return Block(torch.zeros(n, 4), latents, 100 + place, torch.zeros(n, dtype=torch.long), place)


def test_input_score_counts_windows_whose_peak_token_is_promoted() -> None:
    """Twelve windows of 32 tokens; latent 3 peaks at the first token of each, and tokens 100 and 132 are promoted."""
    windows = StrongestWindows(torch.tensor([3, 5]), d_sae=8)
    fires = (
        {(32 * w, 3): 2.0 for w in range(12)} | {(32 * w + 4, 3): 1.0 for w in range(12)} | {(7, 5): 1.0, (7, 2): 9.0}
    )
    windows(block(fires, 12 * 32))
    scores = windows.input_scores(torch.tensor([[100, 132], [107, 0]]))
    assert scores[0] == pytest.approx(2 / 12)
    assert torch.isnan(scores[1])  # active in one window: too few


def test_strongest_windows_do_not_depend_on_how_the_tokens_come() -> None:
    generator = torch.Generator().manual_seed(0)
    fires = {
        (int(i), int(j)): float(v)
        for i, j, v in zip(
            torch.randint(6400, (3000,), generator=generator),
            torch.randint(4, (3000,), generator=generator),
            torch.rand(3000, generator=generator),
            strict=True,
        )
    }
    promoted = 100 + torch.randint(6400, (4, 900), generator=generator)
    whole, parts = (StrongestWindows(torch.arange(4), 4) for _ in range(2))
    whole(block(fires, 6400))
    for low in range(0, 6400, 640):
        here = {(i - low, j): v for (i, j), v in fires.items() if low <= i < low + 640}
        parts(block(here, 640, low))
    assert torch.equal(whole.input_scores(promoted), parts.input_scores(promoted))
    assert whole._value.shape == (4, 100)


def test_output_score_by_hand(lm) -> None:
    dictionary = random_dictionary(HOOK)
    latents = torch.tensor([4, 50])
    promoted = promoted_tokens(lm, dictionary, latents)
    found = output_scores(lm, dictionary, latents, promoted)
    tokens = torch.tensor([lm.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]])
    for i, latent in enumerate(latents.tolist()):

        def amplify(x, latent=latent):
            acts = dictionary.encode(x[0, -1])
            more = acts.clone()
            more[latent] += FACTOR * acts.max()
            changed = x.clone()
            changed[0, -1] += dictionary.decode(more) - dictionary.decode(acts)  # the error stays
            return changed

        with torch.inference_mode(), replace_activations(lm.model, HOOK, amplify):
            probability = lm.model(input_ids=tokens, use_cache=False).logits[0, -1].softmax(-1)
        order = probability.argsort(descending=True).tolist()
        rank = min(order.index(token) for token in promoted[i].tolist())
        expected = (1 - rank / len(order)) * float(probability[promoted[i]].max())
        assert float(found[i]) == pytest.approx(expected, rel=1e-3)


def test_a_latent_that_writes_a_token_has_a_higher_output_score_than_chance(lm) -> None:
    """Directions that are rows of the output matrix, against random ones."""
    written, drawn = random_dictionary(HOOK), random_dictionary(HOOK)
    norm, W_U = lm.unembedding()
    with torch.no_grad():
        written.sae.W_dec.copy_(torch.nn.functional.normalize(W_U.T[20:116] / norm, dim=1))
    latents = torch.arange(96)
    scores = [float(output_scores(lm, d, latents, promoted_tokens(lm, d, latents)).mean()) for d in (written, drawn)]
    assert scores[0] > 1.5 * scores[1]


def test_only_dictionaries_of_the_stream_have_roles(lm) -> None:
    assert writes_to_stream(lm, random_dictionary("model.layers.1"))
    assert writes_to_stream(lm, random_dictionary("blocks.1.hook_resid_post"))
    assert not writes_to_stream(lm, random_dictionary("model.layers.1.mlp"))


def test_latents_are_a_seeded_sample_and_means_leave_out_the_unknown() -> None:
    assert (
        sampled_latents(50, 8, 1).tolist() == sampled_latents(50, 8, 1).tolist() != sampled_latents(50, 8, 2).tolist()
    )
    assert len(sampled_latents(5, 100, 0)) == 5
    unknown = torch.tensor([0.2, float("nan"), 0.4])
    figures, rows = role_figures(torch.tensor([1, 2, 3]), unknown, torch.tensor([0.1, 0.2, 0.3]), 200, 0)
    assert figures["input_score"].value == pytest.approx(0.3)
    assert (figures["input_score"].n, figures["output_score"].n) == (2, 3)
    assert rows[1] == {"latent": 2, "input_score": None, "output_score": 0.2}
