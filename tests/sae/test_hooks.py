"""Reading, splicing and editing at a module of a tiny residual network, each against the forward pass written out."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sae import SAE, BatchTopKConfig, BatchTopKSAE, Edit, attach, build, find_module, replace_activations
from sae.hooks import split_hook_name

D = 8


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

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(hidden_states=x) if self.by_keyword else layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


def small_sae() -> SAE:
    sae = build(BatchTopKConfig(d_in=D, d_sae=32, k=4), seed=1)
    assert isinstance(sae, BatchTopKSAE)
    sae.threshold.fill_(0.3)
    with torch.no_grad():
        sae.b_dec.fill_(0.2)
    return sae.requires_grad_(False)


X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(3))
HOOK = "layers.1"


def after(model: Model, x: Tensor) -> Tensor:
    """The rest of the model from the output of layer 1."""
    out = model.layers[2](x)
    return out[0] if isinstance(out, tuple) else out


def at_hook(model: Model) -> Tensor:
    captured: list[Tensor] = []
    with replace_activations(model, HOOK, captured.append):  # type: ignore[func-returns-value,arg-type]
        model(X)
    return captured[0]


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("side", ["", ":output", ":input"])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_reading_changes_nothing_and_sees_the_activations(as_tuple: bool, side: str, by_keyword: bool) -> None:
    model, sae = Model(as_tuple, by_keyword), small_sae()
    clean = model(X)
    with attach(model, sae, HOOK + side) as tap:
        assert torch.equal(model(X), clean)
    expected = model.layers[0](X)
    expected = expected[0] if isinstance(expected, tuple) else expected
    if side != ":input":
        expected = model.layers[1](expected)
        expected = expected[0] if isinstance(expected, tuple) else expected
    assert torch.equal(tap.x, expected)
    torch.testing.assert_close(tap.latents, sae.encode(expected))


@pytest.mark.parametrize("as_tuple", [False, True])
def test_splice_replaces_the_activations_by_their_reconstruction(as_tuple: bool) -> None:
    model, sae = Model(as_tuple), small_sae()
    with attach(model, sae, HOOK, splice=True):
        spliced = model(X)
    torch.testing.assert_close(spliced, after(model, sae(at_hook(model)).x_hat))
    assert not torch.allclose(spliced, model(X))


def test_splice_at_an_input_replaces_what_the_module_receives() -> None:
    for by_keyword in (False, True):
        model, sae = Model(by_keyword=by_keyword), small_sae()
        with attach(model, sae, "layers.2:input", splice=True):
            spliced = model(X)
        torch.testing.assert_close(spliced, after(model, sae(at_hook(model)).x_hat))


def test_splice_with_the_error_kept_is_the_identity() -> None:
    model = Model()
    with attach(model, small_sae(), HOOK, splice=True, error="keep"):
        assert torch.equal(model(X), model(X))
        kept = model(X)
    assert torch.equal(kept, model(X))


def test_passthrough_tokens_go_on_unchanged() -> None:
    model, sae = Model(), small_sae()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, 0] = True
    x = at_hook(model)
    expected = after(model, torch.where(mask[..., None], x, sae(x).x_hat))
    for passthrough in (mask, lambda seen: mask):
        with attach(model, sae, HOOK, splice=True, passthrough=passthrough):
            torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize(
    ("edit", "new"),
    [
        (Edit(latent=5, kind="zero"), lambda f: 0 * f),
        (Edit(latent=5, kind="scale", value=3.0), lambda f: 3 * f),
        (Edit(latent=5, kind="clamp", value=2.0), lambda f: 0 * f + 2),
        (Edit(latent=5, kind="add", value=-1.5), lambda f: f - 1.5),
    ],
    ids=lambda value: value.kind if isinstance(value, Edit) else "",
)
def test_edit_moves_along_its_decoder_row_and_keeps_the_error(edit: Edit, new: Any) -> None:
    model, sae = Model(), small_sae()
    x = at_hook(model)
    f = sae.encode(x)[..., 5]
    with attach(model, sae, HOOK, edits=[edit]):
        edited = model(X)
    torch.testing.assert_close(edited, after(model, x + (new(f) - f)[..., None] * sae.W_dec[5]))


def test_edits_of_one_latent_apply_in_order_and_of_several_together() -> None:
    model, sae = Model(), small_sae()
    x = at_hook(model)
    f = sae.encode(x)
    edits = [
        Edit(latent=5, kind="clamp", value=2.0),
        Edit(latent=5, kind="scale", value=2.0),
        Edit(latent=7, kind="zero"),
    ]
    changed = f.clone()
    changed[..., 5], changed[..., 7] = 4.0, 0.0
    with attach(model, sae, HOOK, edits=edits):
        torch.testing.assert_close(model(X), after(model, x + (changed - f) @ sae.W_dec))
    with attach(model, sae, HOOK, splice=True, edits=edits):
        torch.testing.assert_close(model(X), after(model, sae.decode(changed)))


def test_edit_that_changes_nothing_is_the_identity() -> None:
    model = Model()
    with attach(model, small_sae(), HOOK, edits=[Edit(latent=5, kind="scale", value=1.0)]):
        edited = model(X)
    assert torch.equal(edited, model(X))


def test_splice_keeps_the_dtype_of_the_model() -> None:
    model = Model().bfloat16()
    with attach(model, small_sae(), HOOK, splice=True) as tap:
        assert model(X.bfloat16()).dtype == torch.bfloat16
    assert tap.latents.dtype == torch.float32


def test_hooks_are_removed_even_after_an_error() -> None:
    model = Model()
    with pytest.raises(RuntimeError, match="boom"), attach(model, small_sae(), HOOK, splice=True):
        raise RuntimeError("boom")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_tap_shows_the_last_forward_pass_and_refuses_before_the_first() -> None:
    model, sae = Model(), small_sae()
    with attach(model, sae, HOOK) as tap:
        with pytest.raises(ValueError, match="the hooked module has not run"):
            _ = tap.latents
        model(X)
        assert tap.latents.shape == (2, 5, 32)
        model(X[:1])
        assert tap.latents.shape == (1, 5, 32)


def test_split_hook_name() -> None:
    assert split_hook_name("a.b") == split_hook_name("a.b:output") == ("a.b", "output")
    assert split_hook_name("a.b:input") == ("a.b", "input")
    for wrong in ("a.b:outptu", "a.b:"):
        with pytest.raises(ValueError, match="ends in `:output` or `:input`"):
            split_hook_name(wrong)


def test_find_module_names_the_nearest_modules() -> None:
    model = Model()
    assert find_module(model, "layers.1.linear:input") is model.layers[1].linear
    with pytest.raises(ValueError, match=r"module of Model, got 'layer\.1'\. Nearest: .*layers\.1"):
        find_module(model, "layer.1")
    with pytest.raises(ValueError, match="got ''"):
        find_module(model, "")


def test_attach_refuses_another_width_an_unknown_latent_and_wrong_options() -> None:
    model, sae = Model(), small_sae()
    too_wide = build(BatchTopKConfig(d_in=D + 1, d_sae=32, k=4), seed=1)
    wrong_width = r"at layers\.1 must have width d_in=9, got shape \(2, 5, 8\)"
    with attach(model, too_wide, HOOK), pytest.raises(ValueError, match=wrong_width):
        model(X)
    with pytest.raises(ValueError, match=r"Edit\.latent must lie in 0 … 31, got 32"):
        attach(model, sae, HOOK, edits=[Edit(latent=32, kind="zero")]).__enter__()
    # A run-time type checker may refuse these before we do.
    with pytest.raises((ValueError, TypeError), match="lose"):
        attach(model, sae, HOOK, error="lose").__enter__()  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError), match="'double'"):
        Edit(latent=1, kind="double")  # type: ignore[arg-type]
