"""What a loaded dictionary does: sparse and partial encoding, precision, compilation, finding and matching latents."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ALL, random_sae

from sae import SAE, Dictionary, SAEConfig, StandardConfig, TopKConfig, TranscoderConfig, build
from sae.matching import assign, correlation_matrix

JUMPRELU = TranscoderConfig(d_in=6, d_out=5, d_sae=24, activation="jumprelu", skip=True)
EVERY = {**ALL, "transcoder_jumprelu": JUMPRELU}
every = pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)


def x_of(config: SAEConfig, *lead: int) -> torch.Tensor:
    return torch.randn(*lead, config.d_in, generator=torch.Generator().manual_seed(4))


# ---- encoding --------------------------------------------------------------------------------------------------------


@every
def test_encode_sparse_is_exactly_what_is_nonzero_in_encode_whatever_the_layout_of_the_weights(
    config: SAEConfig, tmp_path: Path
) -> None:
    dictionary = Dictionary.load(Dictionary(random_sae(config)).save(tmp_path / "d"))
    assert dictionary.sae.W_enc.is_contiguous(), "as the file has it: loading copies nothing"
    x = x_of(config, 3, 20)
    dense = dictionary.encode(x)
    found = dictionary.encode_sparse(x)
    flat = dense.flatten(0, 1)
    assert torch.equal(torch.stack([found.row, found.latent], dim=1), flat.nonzero())
    torch.testing.assert_close(found.value, flat[flat != 0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(dictionary.encode(x), dense, atol=1e-6, rtol=1e-6)


def test_encode_sparse_holds_no_more_than_a_block_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens of 24 latents a block; the whole would be a hundred tokens."""
    import sae.base

    seen: list[int] = []

    def watched(self: SAE, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return SAE.pre_acts(self, x)

    for config in (EVERY["gated"], EVERY["topk"], JUMPRELU):
        one, x = random_sae(config), x_of(config, 100)
        whole = one.encode_sparse(x)
        monkeypatch.setattr(sae.base, "_BLOCK_ELEMENTS", 5 * 24)
        monkeypatch.setattr(type(one), "pre_acts", watched)
        blocks = one.encode_sparse(x)
        monkeypatch.undo()
        assert seen == [5] * 20
        seen.clear()
        for a, b in zip(whole, blocks, strict=True):
            torch.testing.assert_close(a, b)
        assert [len(part) for part in one.encode_sparse(x[:0])] == [0, 0, 0]


def test_sparse_latents_per_token_are_padded_to_the_token_with_most() -> None:
    dictionary = Dictionary(random_sae(EVERY["batchtopk"]))
    x = x_of(dictionary.config, 30)
    x[7] = dictionary.sae.b_dec.detach() - 100 * dictionary.sae.W_enc.detach().sum(1)  # nothing fires there
    dense = dictionary.encode(x)
    latents, values = dictionary.encode_sparse(x).per_token(30)
    assert latents.shape == values.shape == (30, int((dense > 0).sum(1).max()))
    again = torch.zeros(30, 25)
    again[torch.arange(30).unsqueeze(1), latents] = values  # padding goes to the last column
    torch.testing.assert_close(again[:, :24], dense, atol=1e-6, rtol=1e-6)
    assert bool(((latents == -1) == (values == 0)).all())


@every
@pytest.mark.parametrize("latents", [[5, 0, 23], slice(3, 9), [], torch.tensor([7])], ids=str)
def test_encode_of_some_latents_is_that_part_of_encode(
    config: SAEConfig, latents: list[int] | slice | torch.Tensor
) -> None:
    dictionary, x = Dictionary(random_sae(config)), x_of(config, 4, 10)
    found = dictionary.encode(x, latents=latents)
    torch.testing.assert_close(found, dictionary.encode(x)[..., latents], atol=1e-6, rtol=1e-6)


def test_encode_of_some_latents_multiplies_with_theirs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = Dictionary(random_sae(EVERY["jumprelu"]))
    monkeypatch.setattr(type(dictionary.sae), "pre_acts", lambda *_: pytest.fail("all latents were computed"))
    assert dictionary.encode(x_of(dictionary.config, 8), latents=[2]).shape == (8, 1)
    for wrong in ([24], [-1]):
        with pytest.raises(ValueError, match=r"Latents must lie in 0 … 23, got (24|-1)"):
            dictionary.encode(x_of(dictionary.config, 8), latents=wrong)


@every
def test_a_dictionary_in_bfloat16_gives_about_the_same(config: SAEConfig, tmp_path: Path) -> None:
    folder = Dictionary(random_sae(config)).save(tmp_path / "d")
    exact, rough = Dictionary.load(folder), Dictionary.load(folder, dtype=torch.bfloat16)
    x = x_of(config, 200)
    assert rough.W_dec.dtype == rough.encode(x).dtype == torch.bfloat16
    threshold = rough.sae.state_dict().get("threshold")
    assert threshold is None or threshold.dtype == torch.float32
    a, b = exact.encode(x), rough.encode(x).float()
    assert float(((a > 0) == (b > 0)).float().mean()) > 0.97
    both = (a > 0) & (b > 0)
    torch.testing.assert_close(b[both], a[both], atol=0.1, rtol=0.05)
    again = Dictionary.load(rough.save(tmp_path / "rough"), dtype=torch.bfloat16)
    assert torch.equal(again.encode(x), rough.encode(x))


def test_encode_compiles_without_a_graph_break(tmp_path: Path) -> None:
    """In a process of its own: the shape checks of these tests are what would break the graph."""
    names = ["topk", "batchtopk", "jumprelu", "gated", "transcoder_skip", "crosscoder_l1"]
    for name in names:
        Dictionary(random_sae(EVERY[name])).save(tmp_path / name)
    code = """
import sys, torch
from sae import Dictionary
for folder in sys.argv[1:]:
    d = Dictionary.load(folder)
    x = torch.randn(7, d.d_in)
    compiled = torch.compile(d.encode, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), d.encode(x))
"""
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- finding ---------------------------------------------------------------------------------------------------------


def planted(W_dec: torch.Tensor) -> Dictionary:
    sae = build(StandardConfig(d_in=W_dec.shape[1], d_sae=len(W_dec)), seed=0)
    with torch.no_grad():
        sae.W_dec.copy_(W_dec)
        sae.W_enc.copy_(W_dec.t())
    return Dictionary(sae)


def test_nearest_and_similar_go_by_the_cosine_of_decoder_rows_not_their_length() -> None:
    dictionary = planted(torch.tensor([[1.0, 0.0], [10.0, 10.0], [0.0, 3.0], [-5.0, 0.0]]))
    found = dictionary.nearest(torch.tensor([4.0, 0.1]), n=2)
    assert [hit.latent for hit in found] == [0, 1]
    assert found[1].cosine == pytest.approx((4.1 / 2**0.5) / (16.01**0.5), abs=1e-6)
    assert [hit.latent for hit in dictionary.similar(2)] == [1, 0, 3]
    assert dictionary.similar(2)[-1].cosine == pytest.approx(0.0, abs=1e-7)
    assert [hit.latent for hit in dictionary.similar(0, n=1)] == [1]
    with pytest.raises(ValueError, match=r"`direction` must have shape \(2,\), got \(3,\)"):
        dictionary.nearest(torch.ones(3))
    with pytest.raises(ValueError, match="must be finite and not zero, got norm 0"):
        dictionary.nearest(torch.zeros(2))
    with pytest.raises(ValueError, match="Latents must lie in 0 … 3, got 4"):
        dictionary.similar(4)


def test_search_ranks_labels_by_the_words_of_the_query_that_they_hold(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    labels = ["rivers of Europe", "the river Rhine", None, "lakes", "European rivers, canals"]
    table = pa.table({"latent": [0, 1, 2, 3, 4], "label": labels})
    dictionary = Dictionary(build(TopKConfig(d_in=4, d_sae=5, k=1), seed=0))
    path = dictionary.save(tmp_path / "labelled", features=table)
    loaded = Dictionary.load(path)
    found = loaded.search("River europe")
    assert [(hit.latent, hit.score) for hit in found] == [(0, 0.75), (1, 0.5), (4, 0.5)]
    assert loaded.search("LAKES")[0] == (3, "lakes", 1.0)
    assert loaded.search("volcano") == []
    assert len(loaded.search("river", n=1)) == 1
    assert loaded.features_frame["label"].tolist()[3] == "lakes"
    with pytest.raises(ValueError, match="must hold at least one word"):
        loaded.search(" … ")
    with pytest.raises(ValueError, match=r"there is no features\.parquet in"):
        Dictionary.load(dictionary.save(tmp_path / "bare")).search("river")
    other = dictionary.save(tmp_path / "unlabelled", features=pa.table({"latent": [0]}))
    with pytest.raises(ValueError, match="label is missing"):
        Dictionary.load(other).search("river")


# ---- matching --------------------------------------------------------------------------------------------------------


def test_match_finds_a_permutation_back_and_reports_cosines_and_correlations() -> None:
    a = Dictionary(random_sae(EVERY["topk"]))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    b = Dictionary(random_sae(EVERY["topk"]))
    with torch.no_grad():
        for name in ("W_dec", "b_enc"):
            getattr(b.sae, name).copy_(getattr(a.sae, name)[order])
        b.sae.W_enc.copy_(a.sae.W_enc[:, order])
    x = x_of(a.config, 500)
    for by in ("cosine", "correlation"):
        matching = a.match(b, [x[:200], x[200:]], by=by)
        live = (a.encode(x) > 0).any(0).numpy()
        assert matching.latent_a.tolist() == list(range(24))
        found = matching.latent_b[live] if by == "correlation" else matching.latent_b
        expected = order.argsort().numpy()
        np.testing.assert_array_equal(found, expected[live] if by == "correlation" else expected)
        np.testing.assert_allclose(matching.correlation[live], 1, atol=1e-5)
        if by == "cosine":
            np.testing.assert_allclose(matching.cosine, 1, atol=1e-5)
            assert matching.share_above(0.7) == 1.0


def test_match_is_one_to_one_where_nearest_neighbours_collide() -> None:
    a, b = (
        planted(torch.tensor([[1.0, 0.0], [1.0, 0.1]])),
        planted(torch.tensor([[1.0, 0.05], [-1.0, 1.0], [1.0, -1.0]])),
    )
    matching = a.match(b)
    assert len(set(matching.latent_b.tolist())) == 2
    assert matching.correlation is None
    # By hand: both rows of a have b's 0 as their nearest; 1 loses less by taking it when 0 takes b's 2.
    assert matching.latent_b.tolist() == [2, 0]


@pytest.mark.parametrize("dense_share", [0.0, 1.0], ids=["dense", "sparse"])
def test_correlations_are_those_of_numpy(dense_share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.matching._DENSE_SHARE", dense_share)
    a, b = Dictionary(random_sae(EVERY["gated"])), Dictionary(random_sae(EVERY["batchtopk"], seed=9))
    x = x_of(a.config, 300)
    with torch.no_grad():
        b.sae.W_enc[:, 3], b.sae.b_enc[3] = 0, -1.0  # never fires
    acts_a, acts_b = a.encode(x).double().numpy(), b.encode(x).double().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.nan_to_num(np.corrcoef(acts_a, acts_b, rowvar=False)[:24, 24:])
    found = correlation_matrix(a, b, [x[:7], x[7:]])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not found[:, 3].any()


def test_match_refuses_what_it_cannot_compare() -> None:
    a, b = Dictionary(random_sae(EVERY["topk"])), Dictionary(build(TopKConfig(d_in=7, d_sae=24, k=3), seed=0))
    with pytest.raises(ValueError, match="must write to the same space, got widths 6 and 7"):
        a.match(b)
    with pytest.raises(ValueError, match="by correlation needs activations, got none"):
        a.match(a, by="correlation")
    with pytest.raises(ValueError, match="at least two tokens, got 1"):
        a.match(a, [x_of(a.config, 1)])


def test_an_assignment_of_a_rectangle_takes_the_larger_sum() -> None:
    rows, columns = assign(np.array([[1.0, 0.9, 0.0], [0.9, 0.1, 0.0]], dtype=np.float32))
    assert (rows.tolist(), columns.tolist()) == ([0, 1], [1, 0])
