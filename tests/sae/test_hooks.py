"""Hooks alone: what a model goes on with, on either side of a module, however it passes its values."""

import pytest
import torch
from resnet import Model, X
from torch import nn

from sae import replace_activations
from sae.naming import split_hook_name


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("name", ["layers.1", "layers.1:output", "layers.2:input"])
def test_replacement_is_what_the_model_goes_on_with(as_tuple: bool, by_keyword: bool, name: str) -> None:
    model = Model(as_tuple, by_keyword)
    with replace_activations(model, name, lambda x: x * 2):
        replaced = model(X)
    torch.testing.assert_close(replaced, model.after(2 * model.at_hook()))


def test_none_leaves_the_activations_alone() -> None:
    model = Model()
    seen: list[torch.Tensor] = []
    with replace_activations(model, "layers.1", seen.append):  # type: ignore[func-returns-value,arg-type]
        assert torch.equal(model(X), model(X))
    assert torch.equal(seen[0], model.at_hook())


def test_inner_block_receives_what_the_outer_one_left() -> None:
    model = Model()
    with (
        replace_activations(model, "layers.1", lambda x: x + 1),
        replace_activations(model, "layers.1", lambda x: x * 3),
    ):
        nested = model(X)
    torch.testing.assert_close(nested, model.after(3 * (model.at_hook() + 1)))


def test_a_hook_without_a_tensor_is_refused() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": x}

    model = nn.Sequential(Odd())
    with (
        replace_activations(model, "0", lambda x: x),
        pytest.raises(TypeError, match=r"at 0 must be a tensor or a tuple that starts with one, got dict"),
    ):
        model(X)


def test_split_hook_name() -> None:
    assert split_hook_name("a.b") == split_hook_name("a.b:output") == ("a.b", "output")
    assert split_hook_name("a.b:input") == ("a.b", "input")
    for wrong in ("a.b:outptu", "a.b:"):
        with pytest.raises(ValueError, match="ends in `:output` or `:input`"):
            split_hook_name(wrong)
