"""Dictionaries of other tools: the same latents and the same output as their own library.

`golden/peers` was written by `peer_dictionaries.py` in the peers' environment: by SAELens, dictionary_learning and
sparsify themselves, and for Gemma Scope and Llama Scope by SAELens's converters from files laid out as they are
published.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae import (
    BatchTopKConfig,
    Dictionary,
    JumpReLUConfig,
    MatryoshkaBatchTopKConfig,
    TopKConfig,
    TranscoderConfig,
    build,
)
from tests.sae.foreign import (
    D_IN,
    D_SAE,
    GOLDEN,
    NAMES,
    PEERS,
    K,
    assert_as_golden,
    assert_same,
    copied,
    random_tensors,
    x_of,
)

pytestmark = pytest.mark.usefixtures("no_resolver")


@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_dictionary_computes_what_its_own_library_does(name: str) -> None:
    assert_as_golden(GOLDEN / name, GOLDEN / f"{name}.expected.safetensors")


@pytest.mark.slow
def test_the_peers_that_are_installed_still_write_and_compute_that(tmp_path: Path) -> None:
    if not PEERS.exists():
        pytest.skip("needs the peers' environment; `make peers` builds it")
    command = [str(PEERS), str(Path(__file__).with_name("peer_dictionaries.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == NAMES
    for name in NAMES:
        assert_as_golden(tmp_path / name, tmp_path / f"{name}.expected.safetensors")


HOOKED_SCRIPT = """
import sys, torch
from sae_lens import SAE, HookedSAETransformer
from safetensors.torch import save_file
from transformer_lens import HookedTransformerConfig
cfg = HookedTransformerConfig(n_layers=2, d_model=6, n_ctx=16, d_head=3, n_heads=2, d_vocab=20, act_fn="gelu", seed=0)
model, tokens = HookedSAETransformer(cfg), torch.arange(16).reshape(2, 8)
hook = "blocks.1.hook_resid_post"
_, plain = model.run_with_cache(tokens)
_, spliced = model.run_with_cache_with_saes(tokens, saes=[SAE.load_from_disk(sys.argv[1])])
found = {"x": plain[hook], "latent_acts": spliced[f"{hook}.hook_sae_acts_post"]}
found["output"] = spliced[f"{hook}.hook_sae_output"]
save_file({name: tensor.detach().contiguous() for name, tensor in found.items()}, sys.argv[2])
"""


@pytest.mark.slow
def test_a_dictionary_of_ours_runs_in_a_hooked_sae_transformer(tmp_path: Path) -> None:
    if not PEERS.exists():
        pytest.skip("needs the peers' environment; `make peers` builds it")
    sae = build(BatchTopKConfig(d_in=D_IN, d_sae=D_SAE, k=K), seed=0)
    sae.state_dict()["threshold"].fill_(0.3)
    folder = Dictionary(sae, hook_name="blocks.1.hook_resid_post").save(tmp_path / "ours")
    command = [str(PEERS), "-c", HOOKED_SCRIPT, str(folder), str(tmp_path / "found.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, dictionary = load_file(tmp_path / "found.safetensors"), Dictionary.load(folder)
    assert int(found["latent_acts"].count_nonzero()) > 10
    assert_same(dictionary.encode(found["x"]), found["latent_acts"])
    torch.testing.assert_close(dictionary.sae(found["x"]).x_hat, found["output"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "hooks"),
    [
        ("sae_lens-gated", ("blocks.2.hook_resid_post",)),
        ("sae_lens-before_6", ("blocks.2.hook_resid_post",)),
        ("dictionary_learning-BatchTopKSAE", ("blocks.2.hook_resid_post",)),
        ("sparsify-topk", ("blocks.10.hook_resid_post",)),
        ("sparsify-skip", ("blocks.4.hook_mlp_out",)),
        ("sparsify-transcoder", ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")),
        ("gemma_scope", ("blocks.12.hook_resid_post",)),
        ("gemma_scope-embedding", ("hook_embed",)),
        ("gemma_scope-transcoder", ("blocks.12.ln2.hook_normalized", "blocks.12.hook_mlp_out")),
        ("gemma_scope_2-resid", ("model.layers.9",)),
        (
            "gemma_scope_2-transcoder",
            ("model.layers.9.pre_feedforward_layernorm", "model.layers.9.post_feedforward_layernorm"),
        ),
        ("llama_scope", ("blocks.8.hook_resid_post",)),
    ],
)
def test_the_hooks_of_a_foreign_dictionary_are_those_that_it_records(name: str, hooks: tuple[str, ...]) -> None:
    (subfolder,) = Dictionary.list(GOLDEN / name)
    assert Dictionary.load(GOLDEN / name, subfolder=subfolder).hook_names == hooks


def test_what_a_foreign_dictionary_was_trained_as_is_kept() -> None:
    def config(name: str) -> object:
        (subfolder,) = Dictionary.list(GOLDEN / name)
        return Dictionary.load(GOLDEN / name, subfolder=subfolder).config

    assert config("dictionary_learning-BatchTopKSAE") == BatchTopKConfig(d_in=6, d_sae=24, k=3)
    nested = MatryoshkaBatchTopKConfig(d_in=6, d_sae=24, k=3, prefix_sizes=(6, 12, 24))
    assert config("dictionary_learning-MatryoshkaBatchTopKSAE") == nested
    assert config("sae_lens-matryoshka_checkpoint") == nested
    assert config("sae_lens-batchtopk_checkpoint") == BatchTopKConfig(d_in=6, d_sae=24, k=3)
    assert config("sae_lens-batchtopk") == JumpReLUConfig(d_in=6, d_sae=24)
    assert config("sparsify-topk") == TopKConfig(d_in=6, d_sae=24, k=3)
    skip = TranscoderConfig(d_in=6, d_out=5, d_sae=24, activation="jumprelu", skip=True)
    assert config("sae_lens-skip_transcoder") == skip


@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_dictionary_saved_here_is_the_same_when_it_comes_back(name: str, tmp_path: Path) -> None:
    (subfolder,) = Dictionary.list(GOLDEN / name)
    foreign = Dictionary.load(GOLDEN / name, subfolder=subfolder)
    again = Dictionary.load(foreign.save(tmp_path / "ours"), verify=True)
    x = load_file(GOLDEN / f"{name}.expected.safetensors")["x"]
    assert_same(again.encode(x), foreign.encode(x))
    torch.testing.assert_close(again.sae(x).x_hat, foreign.sae(x).x_hat)
    assert (again.hook_names, again.config, again.sae.token_norm) == (
        foreign.hook_names,
        foreign.config,
        foreign.sae.token_norm,
    )


def test_loading_leaves_the_files_alone_although_it_folds_into_mapped_weights(tmp_path: Path) -> None:
    folder = copied("sae_lens-topk_rescaled", tmp_path / "one")
    before = (folder / "sae_weights.safetensors").read_bytes()
    dictionary = Dictionary.load(folder)
    stored = load_file(folder / "sae_weights.safetensors")
    assert not torch.equal(dictionary.W_dec, stored["W_dec"]), "it was folded"
    dictionary.sae.W_dec.zero_()
    assert (folder / "sae_weights.safetensors").read_bytes() == before
    assert Dictionary.load(folder).W_dec.any()


def test_a_training_backup_of_dictionary_learning_has_its_biases_scaled(tmp_path: Path) -> None:
    source = GOLDEN / "dictionary_learning-BatchTopKSAE"
    state = torch.load(source / "ae.pt", weights_only=True)
    backup = {"step": 5, "ae": state, "norm_factor": 2.5, "optimizer": {"state": {}}, "config": {"lr": 1e-3}}
    torch.save(backup, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    x = x_of()
    acts = ((x - 2.5 * state["b_dec"]) @ state["encoder.weight"].t() + 2.5 * state["encoder.bias"]).relu()
    assert_same(Dictionary.load(tmp_path).encode(x), acts * (acts > 2.5 * state["threshold"]))


def test_an_average_norm_is_folded_where_the_factor_is_known_and_else_refused(tmp_path: Path) -> None:
    """`activation_scaler.json` is what SAELens writes beside its checkpoints."""
    tensors = random_tensors(W_enc=(D_IN, D_SAE), b_enc=(D_SAE,), W_dec=(D_SAE, D_IN), b_dec=(D_IN,))
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    cfg = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"}
    cfg |= {"normalize_activations": "expected_average_only_in", "metadata": {"sae_lens_version": "6.0.0"}}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match=r"factor is not known: activation_scaler\.json must hold `scaling_factor`"):
        Dictionary.load(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.4, "has_whitening": false}')
    x, dictionary = x_of(), Dictionary.load(tmp_path)
    expected = ((0.4 * x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    assert_same(dictionary.encode(x), expected)
    output = (expected @ tensors["W_dec"] + tensors["b_dec"]) / 0.4
    torch.testing.assert_close(dictionary.decode(expected), output, atol=1e-5, rtol=1e-5)


def test_the_dictionaries_of_a_folder_are_listed_without_being_read(tmp_path: Path) -> None:
    assert Dictionary.list(GOLDEN / "sae_lens-gated") == ["."]
    listed = Dictionary.list(GOLDEN)
    assert len(listed) == len(NAMES)
    assert "gemma_scope/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82" in listed
    assert Dictionary.list(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Dictionary.list(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"is missing.*There are some below it: .*sae_lens-gated|Pass one as"):
        Dictionary.load(GOLDEN)
