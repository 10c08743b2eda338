import pytest
import torch

from sae.optim import normalise_rows, project_gradient, schedule


def test_schedule_warms_up_holds_and_decays_by_hand() -> None:
    values = [schedule(step, 10, 0.2, 0.3) for step in range(10)]
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_schedule_is_never_zero_nor_above_one() -> None:
    for n_steps in (1, 2, 7, 225):
        values = [schedule(step, n_steps, 0.05, 0.3) for step in range(n_steps)]
        assert min(values) > 0
        assert max(values) <= 1


def test_schedule_without_warmup_and_decay_is_constant() -> None:
    assert {schedule(step, 5, 0.0, 0.0) for step in range(5)} == {1.0}


def test_project_gradient_leaves_nothing_along_the_rows() -> None:
    W_dec = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
    gradient = torch.randn(6, 4)
    before = gradient.clone()
    project_gradient(W_dec, gradient)
    torch.testing.assert_close((gradient * W_dec).sum(1), torch.zeros(6), atol=1e-6, rtol=0)
    removed = before - gradient
    torch.testing.assert_close(removed, (removed * W_dec).sum(1, keepdim=True) * W_dec, atol=1e-6, rtol=1e-5)


def test_normalise_rows_gives_unit_norm_and_keeps_direction() -> None:
    W_dec = torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]])
    normalise_rows(W_dec)
    torch.testing.assert_close(W_dec, torch.tensor([[0.6, 0.8], [0.0, -1.0], [0.0, 0.0]]))
