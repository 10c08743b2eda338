import torch

from sae import TopKConfig, TranscoderConfig, build
from sae.geometry import geometry, max_cosines


def test_largest_cosines_are_those_of_the_whole_matrix_whatever_the_block() -> None:
    W = torch.randn(101, 12, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(W, dim=1)
    expected = (unit @ unit.T).fill_diagonal_(-1).amax(1)
    for block in (1, 7, 101, 1000):
        torch.testing.assert_close(max_cosines(W, block), expected)


def test_orthogonal_rows_have_cosine_zero_a_copy_one_and_zeros_nothing() -> None:
    assert torch.equal(max_cosines(torch.eye(5)), torch.zeros(5))
    W = torch.tensor([[1.0, 0], [0, 2], [3, 0], [0, 0]])
    assert torch.equal(max_cosines(W), torch.tensor([1.0, 0, 1, 0]))
    assert torch.equal(max_cosines(torch.ones(1, 3)), torch.tensor([-1.0]))


def test_permuting_and_scaling_latents_permutes_the_cosines() -> None:
    W = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(max_cosines(5 * W[order]), max_cosines(W)[order])


def test_geometry_by_hand() -> None:
    sae = build(TopKConfig(d_in=2, d_sae=2, k=1), seed=0)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[3.0, 4.0], [0, 1]]))
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, -2.0]]))  # columns are what latents read
    found = geometry(sae)
    torch.testing.assert_close(found.decoder_norm, torch.tensor([5.0, 1.0]))
    torch.testing.assert_close(found.encoder_norm, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(found.max_decoder_cosine, torch.tensor([0.8, 0.8]))
    assert found.encoder_decoder_cosine is not None
    torch.testing.assert_close(found.encoder_decoder_cosine, torch.tensor([0.6, -1.0]))


def test_a_transcoder_has_no_cosine_between_what_it_reads_and_writes() -> None:
    sae = build(TranscoderConfig(d_in=4, d_out=4, d_sae=8, k=2), seed=0)
    assert geometry(sae, same_space=False).encoder_decoder_cosine is None
