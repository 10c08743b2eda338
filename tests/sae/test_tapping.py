"""Reading, splicing and editing at a module of a tiny residual network, each against the forward pass written out."""

from typing import Any

import pytest
import torch
from resnet import HOOK, D, Model, X, first, small_sae, state
from torch import Tensor

from sae import (
    Add,
    BatchTopKConfig,
    Clamp,
    CrosscoderConfig,
    Dictionary,
    Edit,
    Exclude,
    Mean,
    Patch,
    Scale,
    TopKConfig,
    TranscoderConfig,
    Zero,
    attach,
    build,
    replace_activations,
)


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("side", ["", ":output", ":input"])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_reading_changes_nothing_and_sees_the_activations(as_tuple: bool, side: str, by_keyword: bool) -> None:
    model, sae = Model(as_tuple, by_keyword), small_sae()
    clean = model(X)
    with attach(model, sae, HOOK + side) as tap:
        assert torch.equal(model(X), clean)
    expected = first(model.layers[0](X)) if side == ":input" else model.at_hook()
    assert torch.equal(tap.x, expected)
    torch.testing.assert_close(tap.latents, sae.encode(expected))


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("hook", [HOOK, "layers.2:input"])
def test_splice_replaces_the_activations_by_their_reconstruction(as_tuple: bool, hook: str) -> None:
    model, sae = Model(as_tuple), small_sae()
    with attach(model, sae, hook, splice=True):
        spliced = model(X)
    torch.testing.assert_close(spliced, model.after(sae(model.at_hook()).x_hat))
    assert not torch.allclose(spliced, model(X))


def test_splice_with_the_error_kept_is_the_identity() -> None:
    model = Model()
    with attach(model, small_sae(), HOOK, splice=True, error="keep") as tap:
        kept = model(X)
    assert torch.equal(kept, model(X))
    assert tap.latents.count_nonzero() > 10


@pytest.mark.parametrize(
    ("edit", "new"),
    [
        (Zero(5), lambda f: 0 * f),
        (Scale(5, 3.0), lambda f: 3 * f),
        (Clamp(5, 2.0), lambda f: 0 * f + 2),
        (Add(5, -1.5), lambda f: f - 1.5),
        (Mean(5, torch.arange(32.0)), lambda f: 0 * f + 5),
        (Patch(5, 7 * torch.ones(2, 5, 32)), lambda f: 0 * f + 7),
    ],
    ids=lambda value: type(value).__name__,
)
def test_edit_moves_along_its_decoder_row_and_keeps_the_error(edit: Edit, new: Any) -> None:
    model, sae = Model(), small_sae()
    x = model.at_hook()
    f = sae.encode(x)[..., 5]
    with attach(model, sae, HOOK, edits=[edit]):
        edited = model(X)
    torch.testing.assert_close(edited, model.after(x + (new(f) - f)[..., None] * sae.W_dec[5]))


def test_edits_of_one_latent_apply_in_order_and_of_several_together() -> None:
    model, sae = Model(), small_sae()
    x = model.at_hook()
    f = sae.encode(x)
    changed = f.clone()
    changed[..., 5], changed[..., 7], changed[..., 2] = 4.0, 0.0, 1.0
    edits: list[Edit] = [Clamp((7, 5, 2), torch.tensor([9.0, 2.0, 1.0])), Scale(5, 2.0), Zero(7)]
    for together in (edits, [Clamp("all", f), *edits]):
        with attach(model, sae, HOOK, edits=together):
            torch.testing.assert_close(model(X), model.after(x + (changed - f) @ sae.W_dec))
        with attach(model, sae, HOOK, splice=True, edits=together):
            torch.testing.assert_close(model(X), model.after(sae.decode(changed)))


def test_zeroing_all_with_the_error_kept_leaves_the_decoder_bias_and_the_error() -> None:
    model, sae = Model(), small_sae()
    x = model.at_hook()
    with attach(model, sae, HOOK, splice=True, error="keep", edits=[Zero("all")]):
        zeroed = model(X)
    torch.testing.assert_close(zeroed, model.after(sae.b_dec + (x - sae(x).x_hat)))


def test_clamping_latents_to_their_own_values_changes_nothing() -> None:
    model, sae = Model(), small_sae()
    with attach(model, sae, HOOK) as tap:
        clean = model(X)
    for edit in (Clamp([5, 9], tap.latents[..., [5, 9]]), Clamp("all", tap.latents), Patch("all", tap.latents)):
        with attach(model, sae, HOOK, edits=[edit]):
            assert torch.equal(model(X), clean)


@pytest.mark.parametrize(
    ("positions", "columns"),
    [
        (2, [2]),
        ([0, 3], [0, 3]),
        (range(1, 4), [1, 2, 3]),
        (torch.tensor([False, True, False, False, True]), [1, 4]),
        (torch.tensor([[False, True]]), [1]),
    ],
)
def test_positions_limit_an_edit(positions: Any, columns: list[int]) -> None:
    model, sae = Model(), small_sae()
    x = model.at_hook()
    moved = x.clone()
    moved[:, columns] += 1.5 * sae.W_dec[5]
    with attach(model, sae, HOOK, edits=[Add(5, 1.5, positions=positions)]):
        torch.testing.assert_close(model(X), model.after(moved))


def test_patch_from_a_shorter_run_leaves_the_tokens_beyond_it() -> None:
    model, sae = Model(), small_sae()
    x = model.at_hook()
    f = sae.encode(x)
    source = f[:1, :3] + 1
    expected = f.clone()
    expected[:, :3] = source
    with attach(model, sae, HOOK, edits=[Patch("all", source)]):
        torch.testing.assert_close(model(X), model.after(x + (expected - f) @ sae.W_dec))


def test_excluded_tokens_go_on_unchanged_and_do_not_count() -> None:
    model, sae = Model(), small_sae()
    x = model.at_hook()
    limit = float(x.detach().norm(dim=-1).median())
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, 0] = True
    by_norm = x.norm(dim=-1) > limit
    rules: list[tuple[Any, Tensor]] = [
        (mask, mask),
        (lambda seen: mask, mask),
        (Exclude(), mask),
        (Exclude(max_norm=limit), mask | by_norm),
    ]
    for exclude, excluded in rules:
        with attach(model, sae, HOOK, splice=True, exclude=exclude) as tap:
            spliced = model(X)
        torch.testing.assert_close(spliced, model.after(torch.where(excluded[..., None], x, sae(x).x_hat)))
        assert torch.equal(tap.counted, ~excluded)
        torch.testing.assert_close(tap.mean(), sae.encode(x)[~excluded].mean(0))


def test_two_at_one_hook_work_in_turn_and_two_at_different_hooks_side_by_side() -> None:
    model, sae, other = Model(), small_sae(), small_sae(seed=2)
    x = model.at_hook()
    with attach(model, sae, HOOK, edits=[Add(5, 1.0)]), attach(model, other, HOOK, edits=[Zero("all")]) as inner:
        both = model(X)
    moved = x + sae.W_dec[5]
    torch.testing.assert_close(inner.x, moved)
    torch.testing.assert_close(both, model.after(moved - other.encode(moved) @ other.W_dec))
    with attach(model, sae, "layers.0") as a, attach(model, sae, "layers.0") as b, attach(model, other, HOOK) as c:
        model(X)
    assert torch.equal(a.latents, b.latents)
    torch.testing.assert_close(c.latents, other.encode(x))


def test_splice_keeps_the_dtype_of_the_model() -> None:
    model = Model().bfloat16()
    for edits in ([], [Zero(5)]):
        with attach(model, small_sae(), HOOK, splice=True, edits=edits) as tap:
            assert model(X.bfloat16()).dtype == torch.bfloat16
        assert tap.latents.dtype == torch.float32


def test_nothing_is_left_on_the_modules() -> None:
    model = Model()
    before = state(model)

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("boom")

    with attach(model, small_sae(), HOOK, splice=True), attach(model, small_sae(), "layers.2:input", grad=True):
        model(X)
    assert state(model) == before
    with pytest.raises(RuntimeError, match="boom"), attach(model, small_sae(), HOOK, splice=True):
        raise RuntimeError("boom")
    assert state(model) == before
    with (
        attach(model, small_sae(), HOOK, splice=True) as tap,
        replace_activations(model, "layers.2", fail),
        pytest.raises(RuntimeError, match="boom"),
    ):
        model(X)
    assert state(model) == before
    assert tap.latents.shape == (2, 5, 32)
    with pytest.raises(ValueError, match="path of a module"):
        attach(model, small_sae(), "layers.9").__enter__()
    assert state(model) == before


def test_tap_shows_the_last_forward_pass_and_refuses_before_the_first() -> None:
    model, sae = Model(), small_sae()
    with attach(model, sae, HOOK) as tap:
        with pytest.raises(ValueError, match="the hooked module has not run"):
            _ = tap.latents
        model(X)
        assert tap.latents.shape == (2, 5, 32)
        model(X[:1])
        assert tap.latents.shape == (1, 5, 32)


def test_what_a_tap_keeps_is_not_part_of_the_graph() -> None:
    model, sae = Model(), small_sae()
    for edits in ([], [Zero(5)]):
        with attach(model, sae, HOOK, edits=edits) as tap:
            out = model(X)
        assert out.requires_grad
        assert not tap.x.requires_grad
        assert not tap.latents.requires_grad
    with pytest.raises(ValueError, match=r"attach with grad=True"):
        _ = tap.error


def test_gradients_reach_latents_error_and_the_model_below() -> None:
    model, sae = Model(), small_sae()
    with attach(model, sae, HOOK, grad=True) as tap:
        out = model(X)
        assert torch.equal(out, model(X))
    with attach(model, sae, HOOK, grad=True) as tap:
        model(X)[..., 0].sum().backward()
    below = [parameter.grad.clone() for parameter in model.layers[0].parameters()]
    x = model.at_hook().detach().requires_grad_()
    model.after(x)[..., 0].sum().backward()
    torch.testing.assert_close(tap.error.grad, x.grad)
    torch.testing.assert_close(tap.latents.grad, x.grad @ sae.W_dec.T)
    model.zero_grad()
    model(X)[..., 0].sum().backward()
    for mine, plain in zip(below, model.layers[0].parameters(), strict=True):
        torch.testing.assert_close(mine, plain.grad)


def test_gradients_of_a_splice_without_error_pass_through_the_encoder() -> None:
    model, sae = Model().requires_grad_(False), small_sae()
    x = X.clone().requires_grad_()
    with attach(model, sae, HOOK, splice=True, grad=True) as tap:
        model(x)[..., 0].sum().backward()
    plain = X.clone().requires_grad_()
    f = sae.encode(model.at_hook(plain))
    f.retain_grad()
    model.after(sae.decode(f))[..., 0].sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)
    torch.testing.assert_close(tap.latents.grad, f.grad)


def test_edits_act_on_the_nodes_of_the_graph() -> None:
    model, sae = Model(), small_sae()
    with attach(model, sae, HOOK, edits=[Zero(5)]):
        expected = model(X)
    with attach(model, sae, HOOK, edits=[Zero(5)], grad=True) as tap:
        out = model(X)
        out[..., 0].sum().backward()
    torch.testing.assert_close(out, expected)
    assert tap.latents.grad is not None
    assert not tap.latents.grad[..., 5].any()
    assert tap.latents.grad[..., 6].any()


@pytest.mark.parametrize("skip", [False, True])
def test_transcoder_reads_at_one_hook_and_replaces_at_another(skip: bool) -> None:
    model = Model()
    sae = build(TranscoderConfig(d_in=D, d_out=D, d_sae=24, k=4, activation="topk", skip=skip), seed=1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    dictionary = Dictionary(sae.requires_grad_(False), hook_names=["layers.1.linear:input", "layers.1.linear"])
    x = first(model.layers[0](X))
    y, f = model.layers[1].linear(x), sae.encode(x)
    with dictionary.attach(model, splice=True) as tap:
        spliced = model(X)
    torch.testing.assert_close(tap.latents, f)
    torch.testing.assert_close(spliced, model.after(x + torch.tanh(sae(x).x_hat)))
    with dictionary.attach(model, edits=[Add(5, 2.0)]):
        torch.testing.assert_close(model(X), model.after(x + torch.tanh(y + 2 * sae.W_dec[5])))
    with dictionary.attach(model, grad=True) as tap:
        assert torch.equal(model(X), model.after(model.at_hook()))
    torch.testing.assert_close(tap.error, y - sae(x).x_hat)
    reverse = Dictionary(sae, hook_names=["layers.1", "layers.1.linear"])
    with reverse.attach(model, splice=True), pytest.raises(ValueError, match="ran before its input hook layers"):
        model(X)
    with pytest.raises(ValueError, match="`hook_name` moves an SAE of one hook"):
        dictionary.attach(model, hook_name=HOOK)


def test_crosscoder_is_read_and_not_spliced() -> None:
    model = Model()
    sae = build(CrosscoderConfig(d_ins=(D, D), d_sae=24, sparsity="l1"), seed=1).requires_grad_(False)
    dictionary = Dictionary(sae, hook_names=["layers.0", "layers.1"])
    with dictionary.attach(model) as tap:
        model(X)
        model(X)
    a = first(model.layers[0](X))
    torch.testing.assert_close(tap.latents, sae.encode(torch.cat([a, model.at_hook()], dim=-1)))
    with pytest.raises(ValueError, match=r"several hooks \(layers\.0, layers\.1\) can only be read"):
        dictionary.attach(model, splice=True).__enter__()


def test_attach_refuses_another_width_an_unknown_latent_and_wrong_options() -> None:
    model, sae = Model(), small_sae()
    too_wide = build(BatchTopKConfig(d_in=D + 1, d_sae=32, k=4), seed=1)
    wrong_width = r"at layers\.1 must have width d_in=9, got shape \(2, 5, 8\)"
    with attach(model, too_wide, HOOK), pytest.raises(ValueError, match=wrong_width):
        model(X)
    with pytest.raises(ValueError, match=r"Edit\.latents must lie in 0 … 31, got 32"):
        attach(model, sae, HOOK, edits=[Zero([3, 32])]).__enter__()
    # A run-time type checker may refuse this before we do.
    with pytest.raises((ValueError, TypeError), match="lose"):
        attach(model, sae, HOOK, error="lose").__enter__()  # type: ignore[arg-type]
    elsewhere = small_sae().to("meta")
    with attach(model, elsewhere, HOOK), pytest.raises(ValueError, match="on cpu, but it is on meta"):
        model(X)
    with pytest.raises(TypeError, match="got dict"):
        attach({}, sae, HOOK).__enter__()


def test_attach_refuses_what_does_not_fit_the_tokens() -> None:
    model, sae = Model(), small_sae()
    wrong: list[tuple[Edit, str]] = [
        (Zero(1, positions=lambda ids: ids == 3), "called without"),
        (Clamp(1, torch.zeros(3)), r"one for each of 1 latents.*got shape \(3,\)"),
        (Patch(1, torch.zeros(3, 5, 32)), r"Patch\.source must have shape \[2 or 1, seq, 1\], got \(3, 5, 1\)"),
        (Zero(1, positions=torch.ones(3, 5, dtype=torch.bool)), r"fit \[2, 5\], got torch\.bool \(3, 5\)"),
    ]
    for edit, message in wrong:
        with attach(model, sae, HOOK, edits=[edit]), pytest.raises(ValueError, match=message):
            model(X)
    with (
        attach(model, sae, HOOK, edits=[Zero(1, positions=[0])]),
        pytest.raises(ValueError, match="positions are known only inside a call of the model"),
    ):
        model.layers[1](X)


def test_edits_refuse_what_they_cannot_mean() -> None:
    with pytest.raises(ValueError, match="different latents, at least one, got \\(3, 3\\)"):
        Zero([3, 3])
    with pytest.raises(ValueError, match="at least one, got \\(\\)"):
        Zero([])
    with pytest.raises((ValueError, TypeError), match="some"):
        Zero("some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be 0 or more, got \\(-1,\\)"):
        Zero(3, positions=-1)
    with pytest.raises(ValueError, match=r"boolean mask .* got torch\.int64"):
        Zero(3, positions=torch.tensor([1, 2]))


def test_an_sae_that_normalises_tokens_is_edited_in_the_units_of_the_model() -> None:
    model = Model()
    sae = build(TopKConfig(d_in=D, d_sae=24, k=4), seed=1).requires_grad_(False)
    sae.token_norm = "layer_norm"
    x = model.at_hook()
    f = sae.encode(x)
    expected = x + sae.decode(f + 1, x) - sae.decode(f, x)
    for grad in (False, True):
        with attach(model, sae, HOOK, edits=[Add("all", 1.0)], grad=grad):
            torch.testing.assert_close(model(X), model.after(expected))
