import pytest
import torch

from sae.losses import auxk_loss, reconstruction_loss, total_variance


def test_reconstruction_loss_by_hand() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    x_hat = torch.tensor([[1.0, 0.0], [2.0, 2.0]])
    # variance = mean of |(-1,-2)|^2 and |(1,2)|^2 = 5; squared error = 1 + 4, over two tokens
    assert float(total_variance(x)) == pytest.approx(5.0)
    assert float(reconstruction_loss(x, x_hat, total_variance(x), 2)) == pytest.approx(5 / (2 * 5))


def test_reconstruction_loss_is_zero_when_perfect_and_one_at_the_mean_of_data_far_from_zero() -> None:
    x = torch.randn(500, 8, dtype=torch.float64) + 100
    variance = total_variance(x)
    assert float(reconstruction_loss(x, x, variance, len(x))) == 0.0
    assert float(reconstruction_loss(x, x.mean(0).expand_as(x), variance, len(x))) == pytest.approx(1.0)


def test_losses_do_not_depend_on_the_scale_of_the_data() -> None:
    x, x_hat = torch.randn(50, 8), torch.randn(50, 8)
    small = reconstruction_loss(x, x_hat, total_variance(x), 50)
    large = reconstruction_loss(100 * x, 100 * x_hat, total_variance(100 * x), 50)
    torch.testing.assert_close(small, large)


def test_auxk_loss_by_hand_sends_no_gradient_to_the_residual() -> None:
    residual = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    residual_hat = torch.tensor([[0.5, 0.0], [-1.0, 1.0]], requires_grad=True)
    loss = auxk_loss(residual, residual_hat, total_variance(residual.detach()), 2)
    assert loss.item() == pytest.approx((0.25 + 1.0) / (2 * 1.0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert residual.grad is None
    assert residual_hat.grad is not None
    torch.testing.assert_close(residual_hat.grad, torch.tensor([[-0.5, 0.0], [0.0, 1.0]]))
