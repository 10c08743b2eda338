import pytest
import torch

from pipelines.labels.logit_lens import logit_lens


def test_lens_agrees_with_a_full_product():
    torch.manual_seed(0)
    W_dec, norm, W_U = torch.randn(11, 8), torch.rand(8) + 0.5, torch.randn(8, 50)
    lens = logit_lens(W_dec, norm, W_U, n_top=4, batch_size=3)
    logits = (W_dec * norm) @ W_U
    logits = logits - logits.mean(1, keepdim=True)
    assert torch.equal(lens.promoted, logits.argsort(1, descending=True)[:, :4])
    assert torch.equal(lens.suppressed, logits.argsort(1)[:, :4])
    torch.testing.assert_close(lens.promoted_value, logits.sort(1, descending=True).values[:, :4])


def test_lens_reads_a_planted_direction_through_the_norm_weight():
    W_U = torch.eye(4)
    lens = logit_lens(torch.tensor([[1.0, 0.9, 0.0, -2.0]]), torch.tensor([1.0, 2.0, 1.0, 1.0]), W_U, n_top=1)
    assert lens.promoted.tolist() == [[1]]
    assert lens.suppressed.tolist() == [[3]]


def test_lens_refuses_a_direction_of_another_width():
    with pytest.raises(ValueError, match=r"W_dec is \(2, 6\), the final norm \(4,\), W_U \(4, 9\)"):
        logit_lens(torch.zeros(2, 6), torch.ones(4), torch.zeros(4, 9))


def test_lens_refuses_more_tokens_than_there_are():
    with pytest.raises(ValueError, match="between 1 and the vocabulary size 9, got 10"):
        logit_lens(torch.zeros(2, 4), torch.ones(4), torch.zeros(4, 9))
