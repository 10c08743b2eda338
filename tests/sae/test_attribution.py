"""Attribution against exact ablation: effects are right when they predict what moving each node alone does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from attribution_oracle import compared, predicted, r, trained
from resnet import state
from torch import Tensor

from sae import Dictionary, Exclude, replace_activations
from sae.attribution import Node, attribute, exact_effects, node_values

HOOKS = {"stream": "model.layers.0", "mlp": "model.layers.1.mlp"}


@pytest.fixture(scope="module")
def llama(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def dictionaries(llama: Any) -> dict[str, Dictionary]:
    """Two dictionaries, trained for a second each on what the model makes of random tokens."""
    return {name: trained(llama, hook, d_in=32, vocab=300) for name, hook in HOOKS.items()}


def tokens(*shape: int, seed: int) -> Tensor:
    return torch.randint(2, 300, shape, generator=torch.Generator().manual_seed(seed))


def metric(output: Any) -> Tensor:
    """Difference of two logits at the last token of every row."""
    logits: Tensor = output.logits[:, -1]
    return logits[:, 20] - logits[:, 40]


@pytest.mark.parametrize("baseline", ["zero", "mean", "resample"])
def test_effects_predict_exact_ablation(llama: Any, dictionaries: dict[str, Dictionary], baseline: str) -> None:
    clean = tokens(1, 8, seed=9)
    patched = {"zero": None, "mean": tokens(4, 12, seed=2), "resample": tokens(1, 8, seed=3)}[baseline]
    before = state(llama)
    atp, ig_top, ig = compared(llama, metric, dictionaries, baseline, clean, patched)
    assert atp >= 0.8
    assert ig_top >= 0.95
    assert ig >= 0.9
    assert state(llama) == before


def test_errors_have_effects_too(llama: Any, dictionaries: dict[str, Dictionary]) -> None:
    clean = tokens(2, 8, seed=9)
    one = {"mlp": dictionaries["mlp"]}
    nodes = [Node("mlp", column, None, 0.0) for column in range(8)]
    exact = exact_effects(llama, metric, clean, dictionaries=one, nodes=nodes)
    ig = attribute(llama, metric, clean, dictionaries=one, method="ig")
    assert r(predicted(ig, nodes), exact) >= 0.95


def test_gradients_are_those_of_small_moves(llama: Any, dictionaries: dict[str, Dictionary]) -> None:
    """Where the move is small, attribution patching is exact to first order: an oracle of a node's gradient."""
    clean = tokens(1, 6, seed=4)
    values = node_values(llama, clean, None, dictionaries=dictionaries, baseline="zero", exclude=None)
    effects = attribute(llama, metric, clean, dictionaries=dictionaries)
    for name, dictionary in dictionaries.items():
        column, latent = divmod(int(effects.latents[name][0].abs().argmax()), dictionary.d_sae)
        step = torch.zeros_like(values[name].error)
        step[0, column] = -0.01 * values[name].f[0, column, latent] * dictionary.W_dec[latent]
        sides = []
        for sign in (1, -1):
            with replace_activations(llama, dictionary.required_hook_name, lambda y, by=sign * step: y + by):
                sides.append(metric(llama(clean)).sum())
        central = (sides[0] - sides[1]) / 2
        torch.testing.assert_close(0.01 * effects.latents[name][0, column, latent], central, rtol=0.02, atol=1e-4)


def test_one_group_adds_up_to_moving_everything(llama: Any, dictionaries: dict[str, Dictionary]) -> None:
    """Completeness, the property that integrated gradients are known for."""
    clean, patched = tokens(1, 8, seed=9), tokens(1, 8, seed=3)
    one = {"stream": dictionaries["stream"]}
    effects = attribute(llama, metric, clean, patched, dictionaries=one, method="ig", groups=1, steps=60)
    total = effects.latents["stream"].sum() + effects.errors["stream"].sum()
    activations: list[Tensor] = []
    with replace_activations(llama, HOOKS["stream"], activations.append):  # type: ignore[func-returns-value,arg-type]
        llama(patched)
    with replace_activations(llama, HOOKS["stream"], lambda _: activations[0]):
        everything = metric(llama(clean))
    torch.testing.assert_close(total, (everything - effects.clean).sum(), rtol=0.02, atol=0.05)


def test_a_batch_has_the_effects_of_its_rows(llama: Any, dictionaries: dict[str, Dictionary]) -> None:
    texts = [tokens(6, seed=5), tokens(4, seed=6)]
    rows = torch.stack([texts[0], torch.cat([torch.ones(2, dtype=torch.long), texts[1]])])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    for method in ("atp", "ig"):
        options: dict[str, Any] = {"dictionaries": dictionaries, "exclude": Exclude(), "groups": 1, "method": method}
        both = attribute(llama, metric, {"input_ids": rows, "attention_mask": mask}, **options)
        for row, text in enumerate(texts):
            alone = attribute(llama, metric, text[None], **options)
            torch.testing.assert_close(both.clean[row], alone.clean[0], rtol=1e-4, atol=1e-4)
            for name in HOOKS:
                mine = both.latents[name][row, 6 - len(text) :]
                torch.testing.assert_close(mine, alone.latents[name][0], rtol=1e-3, atol=1e-3)
                assert not mine[0].any(), "the first token is excluded"
                assert not both.latents[name][row, : 6 - len(text)].any(), "padding has no effect"
                assert not both.errors[name][row, : 7 - len(text)].any()


def test_top_lists_the_largest_effects(llama: Any, dictionaries: dict[str, Dictionary]) -> None:
    effects = attribute(llama, metric, tokens(2, 5, seed=1), dictionaries=dictionaries)
    values = [
        *(abs(v) for each in effects.latents.values() for v in each.sum(0).flatten().tolist()),
        *(abs(v) for each in effects.errors.values() for v in each.sum(0).tolist()),
    ]
    top = effects.top(30)
    assert [abs(node.effect) for node in top] == pytest.approx(sorted(values, reverse=True)[:30])
    assert {node.latent is None for node in top} == {True, False}
    assert all(node.latent is not None for node in effects.top(30, errors=False))
    node = effects.top(1, errors=False)[0]
    assert node.effect == pytest.approx(float(effects.latents[node.dictionary][:, node.column, node.latent].sum()))


def test_wrong_options_are_refused(llama: Any, dictionaries: dict[str, Dictionary]) -> None:
    clean = tokens(1, 5, seed=1)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"baseline": "resample"}, "with `patched` inputs, 'resample', got 'resample'"),
        ({"patched": tokens(1, 6, seed=1)}, r"as many columns as the clean ones.*got \[1, 6\] for \[1, 5\]"),
        ({"steps": 0}, "`steps` and `groups` must be 1 or more, got 0 and 24"),
        ({"metric": lambda out: out.logits[:, -1]}, r"one number, or one for each row, got shape \(1, 417\)"),
    ]
    for options, message in wrong:
        arguments: dict[str, Any] = {"metric": metric, "clean": clean, "dictionaries": dictionaries} | options
        with pytest.raises(ValueError, match=message):
            attribute(llama, **arguments)
    with pytest.raises((ValueError, TypeError), match="guess"):
        attribute(llama, metric, clean, dictionaries=dictionaries, method="guess")  # type: ignore[arg-type]
    nowhere = {"x": Dictionary(dictionaries["stream"].sae)}
    with pytest.raises(ValueError, match=r"'x' reconstructs 0 hooks, and effects are of one"):
        attribute(llama, metric, clean, dictionaries=nowhere)
