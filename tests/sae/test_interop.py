"""Dictionaries of other tools: the same latents and the same output as their own library, or a refusal that says why.

`golden/peers` was written by `peer_dictionaries.py` in the peers' environment: by SAELens, dictionary_learning and
sparsify themselves, and for Gemma Scope and Llama Scope by SAELens's converters from files laid out as they are
published. The other formats have no library that installs beside these; their tests write small files in exactly the
published layout and compare with the published equations, computed here in plain torch.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae import (
    BatchTopKConfig,
    CrosscoderConfig,
    Dictionary,
    JumpReLUConfig,
    MatryoshkaBatchTopKConfig,
    StandardConfig,
    TopKConfig,
    TranscoderConfig,
    build,
)

GOLDEN = Path(__file__).parent / "golden" / "peers"
PEERS = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
D_IN, D_SAE, K = 6, 24, 3


@pytest.fixture(autouse=True)
def no_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where `pipelines.hub` is not imported; the test session may have done so."""
    monkeypatch.setattr(Dictionary, "_resolver", None)


def random_tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}


def x_of(width: int = D_IN) -> torch.Tensor:
    return torch.randn(40, width, generator=torch.Generator().manual_seed(5)) + 0.3


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def assert_as_golden(folder: Path, expected_file: Path) -> None:
    (subfolder,) = Dictionary.list(folder)
    dictionary, expected = Dictionary.load(folder, subfolder=subfolder), load_file(expected_file)
    assert int(expected["latent_acts"].count_nonzero()) > 40
    assert int((expected["latent_acts"] == 0).sum()) > 40
    assert_same(dictionary.encode(expected["x"]), expected["latent_acts"])
    output = dictionary.sae(expected["x"]).x_hat
    torch.testing.assert_close(output, expected["output"], atol=1e-5, rtol=1e-5)


# ---- as their own libraries ------------------------------------------------------------------------------------------


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


# ---- formats whose library does not install --------------------------------------------------------------------------


def openai_state(kind: str) -> dict[str, Any]:
    """The state that openai/sparse_autoencoder's `Autoencoder.state_dict` gives."""
    shapes = {"pre_bias": (D_IN,), "latent_bias": (D_SAE,)}
    tensors = random_tensors(**shapes, encoder=(D_SAE, D_IN), decoder=(D_IN, D_SAE))
    state: dict[str, Any] = {
        "pre_bias": tensors["pre_bias"],
        "latent_bias": tensors["latent_bias"],
        "encoder.weight": tensors["encoder"],
        "decoder.weight": tensors["decoder"],
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
        "latents_activation_frequency": torch.ones(D_SAE),
        "latents_mean_square": torch.zeros(D_SAE),
        "activation": kind,
    }
    return state | ({"activation_state_dict": {"k": K, "postact_fn": "ReLU"}} if kind == "TopK" else {})


@pytest.mark.parametrize("kind", ["ReLU", "TopK"])
def test_an_openai_dictionary_computes_its_published_equations(kind: str, tmp_path: Path) -> None:
    """Layout of openaipublic's `resid_post_mlp/v5_32k/autoencoders/6.pt`; TopK normalises each token, ReLU does not."""
    state, x = openai_state(kind), x_of()
    torch.save(state, tmp_path / "6.pt")
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    read = (x - mean) / (std + 1e-5) if kind == "TopK" else x
    pre = (read - state["pre_bias"]) @ state["encoder.weight"].t() + state["latent_bias"]
    acts = pre.relu()
    if kind == "TopK":
        top = pre.topk(K)
        acts = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    output = acts @ state["decoder.weight"].t() + state["pre_bias"]
    output = output * std + mean if kind == "TopK" else output
    for place in (tmp_path, tmp_path / "6.pt"):
        dictionary = Dictionary.load(place)
        assert_same(dictionary.encode(x), acts)
        torch.testing.assert_close(dictionary.sae(x).x_hat, output, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(dictionary.decode(acts, x), output, atol=1e-5, rtol=1e-5)


def test_decoding_without_the_input_of_a_dictionary_that_normalises_tokens_is_refused(tmp_path: Path) -> None:
    torch.save(openai_state("TopK"), tmp_path / "6.pt")
    dictionary = Dictionary.load(tmp_path)
    with pytest.raises(ValueError, match=r"`token_norm` is 'layer_norm'.*Pass them as `x`"):
        dictionary.decode(torch.zeros(2, D_SAE))


def test_a_dictionary_that_normalises_tokens_splices_and_edits_in_the_units_of_the_model(tmp_path: Path) -> None:
    from sae import Clamp

    torch.save(openai_state("TopK"), tmp_path / "6.pt")
    dictionary, x = Dictionary.load(tmp_path, hook_name="0"), x_of()
    model = torch.nn.Sequential(torch.nn.Identity())
    with dictionary.attach(model, splice=True):
        torch.testing.assert_close(model(x), dictionary.sae(x).x_hat)
    acts = dictionary.encode(x)
    clamped = acts.clone()
    clamped[:, 7] = 2.0
    expected = x + dictionary.decode(clamped, x) - dictionary.decode(acts, x)
    with dictionary.attach(model, edits=[Clamp(7, 2.0)]):
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    with dictionary.attach(model, splice=True, edits=[Clamp(7, 2.0)]):
        torch.testing.assert_close(model(x), dictionary.decode(clamped, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", ["Relu", "TopK", "BatchTopK", "BatchTopK per token"])
def test_a_saev_dictionary_computes_its_published_equations(cls: str, tmp_path: Path) -> None:
    """Layout of saev's `dump`: one line of JSON, then a state dict. Old BatchTopK files hold no threshold."""
    tensors = random_tensors(W_enc=(D_IN, D_SAE), b_enc=(D_SAE,), W_dec=(D_SAE, D_IN), b_dec=(D_IN,))
    with_threshold = cls == "BatchTopK"
    kind = cls.partition(" ")[0]
    params = {} if kind == "Relu" else {"top_k": K}
    header = {
        "schema": 5 if with_threshold else 2,
        "cfg": {"d_vit": D_IN, "exp_factor": 4, "activation": {"cls": kind, "params": params}},
        "commit": "unknown",
        "lib": "0.1",
    }
    state = tensors | ({"activation.threshold": torch.tensor(0.3)} if with_threshold else {})
    with (tmp_path / "sae.pt").open("wb") as stream:
        stream.write((json.dumps(header) + "\n").encode())
        torch.save(state, stream)
    x = x_of()
    pre = x @ tensors["W_enc"] + tensors["b_enc"]
    acts = pre.relu()
    if with_threshold:
        acts = torch.where(pre > 0.3, pre, 0)
    elif kind != "Relu":
        top = pre.topk(K)
        acts = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    dictionary = Dictionary.load(tmp_path)
    assert_same(dictionary.encode(x), acts)
    output = acts @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(dictionary.sae(x).x_hat, output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("mode", ["dataset-wise", "inference", "token-wise"])
@pytest.mark.parametrize("transcodes", [False, True])
def test_a_llamascopium_dictionary_computes_its_published_equations(
    act_fn: str, mode: str, transcodes: bool, tmp_path: Path
) -> None:
    """Layout of llamascopium 2's `save_pretrained`; TopK latents come out times the decoder norm."""
    if transcodes and mode == "token-wise":
        pytest.skip("refused: a token's own norm says nothing about another hook")
    tensors = random_tensors(W_E=(D_IN, D_SAE), b_E=(D_SAE,), W_D=(D_SAE, D_IN), b_D=(D_IN,))
    state = dict(tensors)
    log_threshold = torch.linspace(-2, 0, D_SAE)
    if act_fn == "jumprelu":
        state["activation_function.log_jumprelu_threshold"] = log_threshold
    norms = {"blocks.4.hook_resid_pre": 1.7, "blocks.4.hook_mlp_out": 0.6}
    state |= {f"dataset_average_activation_norm.{hook}": torch.tensor(norm) for hook, norm in norms.items()}
    save_file(state, tmp_path / "sae_weights.safetensors")
    hook_in, hook_out = "blocks.4.hook_resid_pre", "blocks.4.hook_mlp_out" if transcodes else "blocks.4.hook_resid_pre"
    config = {
        "sae_type": "sae",
        "d_model": D_IN,
        "expansion_factor": 4.0,
        "use_decoder_bias": True,
        "act_fn": act_fn,
        "norm_activation": mode,
        "sparsity_include_decoder_norm": True,
        "top_k": K,
        "hook_point_in": hook_in,
        "hook_point_out": hook_out,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = x_of()
    s_in = s_out = torch.ones(())
    if mode == "dataset-wise":
        s_in, s_out = torch.tensor(D_IN**0.5 / norms[hook_in]), torch.tensor(D_IN**0.5 / norms[hook_out])
    elif mode == "token-wise":
        s_in = s_out = D_IN**0.5 / x.norm(dim=-1, keepdim=True)
    pre = (x * s_in) @ tensors["W_E"] + tensors["b_E"]
    decoder_norm = tensors["W_D"].norm(dim=1)
    scaled = pre * decoder_norm
    if act_fn == "relu":
        acts = pre.relu()
    elif act_fn == "jumprelu":
        acts = torch.where(scaled > log_threshold.exp(), scaled, 0) / decoder_norm
    else:
        top = scaled.topk(K)
        acts = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()) / decoder_norm
    dictionary = Dictionary.load(tmp_path)
    assert_same(dictionary.encode(x), acts * decoder_norm if act_fn == "topk" else acts)
    output = (acts @ tensors["W_D"] + tensors["b_D"]) / s_out
    torch.testing.assert_close(dictionary.sae(x).x_hat, output, atol=1e-5, rtol=1e-5)
    assert dictionary.hook_names == ((hook_in, hook_out) if transcodes else (hook_in,))


@pytest.mark.parametrize("layout", ["numbered", "hub"])
def test_a_crosscoder_of_two_models_computes_its_published_equations(layout: str, tmp_path: Path) -> None:
    """Layout of ckkissane/crosscoder-model-diff-replication: `cc_weights.pt` on the Hub, else `0.pt`, `0_cfg.json`."""
    shapes = {"W_enc": (2, 3, D_SAE), "W_dec": (D_SAE, 2, 3), "b_enc": (D_SAE,), "b_dec": (2, 3)}
    tensors = random_tensors(**shapes)
    names = ("cc_weights.pt", "cfg.json") if layout == "hub" else ("0.pt", "0_cfg.json")
    torch.save(tensors, tmp_path / names[0])
    cfg = {"dict_size": D_SAE, "d_in": 3, "enc_dtype": "fp32", "hook_point": "blocks.14.hook_resid_pre", "seed": 0}
    (tmp_path / names[1]).write_text(json.dumps(cfg))
    x = x_of().reshape(-1, 2, 3)
    acts = (torch.einsum("bmd,mdh->bh", x, tensors["W_enc"]) + tensors["b_enc"]).relu()
    output = torch.einsum("bh,hmd->bmd", acts, tensors["W_dec"]) + tensors["b_dec"]
    dictionary = Dictionary.load(tmp_path)
    assert_same(dictionary.encode(x.flatten(1)), acts)
    torch.testing.assert_close(dictionary.decode(acts), output.flatten(1), atol=1e-5, rtol=1e-5)
    assert dictionary.config == CrosscoderConfig(d_ins=(3, 3), d_sae=D_SAE, sparsity="l1")
    assert dictionary.hook_names == ("blocks.14.hook_resid_pre",) * 2


@pytest.mark.parametrize("code", [None, 1, 2, 4])
def test_a_crosscoder_of_dictionary_learning_computes_its_published_equations(code: int | None, tmp_path: Path) -> None:
    """Layout of science-of-finetuning/dictionary_learning's hub mixin, with BatchTopK unless `code` is None."""
    shapes = {"encoder.weight": (2, 3, D_SAE), "decoder.weight": (2, D_SAE, 3)}
    tensors = random_tensors(**shapes, **{"encoder.bias": (D_SAE,), "decoder.bias": (2, 3)})
    state = dict(tensors)
    if code is not None:
        state |= {"code_normalization_id": torch.tensor(code), "k": torch.tensor(K), "threshold": torch.tensor(0.6)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"activation_dim": 3, "dict_size": D_SAE, "num_layers": 2}))
    x, W_dec = x_of().reshape(-1, 2, 3), tensors["decoder.weight"]
    acts = (torch.einsum("bld,ldf->bf", x, tensors["encoder.weight"]) + tensors["encoder.bias"]).relu()
    scale = torch.ones(D_SAE)
    if code is not None:
        scale = {1: W_dec.norm(dim=2).sum(0), 2: W_dec.norm(dim=(0, 2)), 4: scale}[code]
        acts = acts * (acts * scale > 0.6)
    output = torch.einsum("bf,lfd->bld", acts, W_dec) + tensors["decoder.bias"]
    dictionary = Dictionary.load(tmp_path)
    assert_same(dictionary.encode(x.flatten(1)), acts * scale)
    torch.testing.assert_close(dictionary.sae(x.flatten(1)).x_hat, output.flatten(1), atol=1e-5, rtol=1e-5)


# ---- what is refused -------------------------------------------------------------------------------------------------


class Malicious:
    """Unpickled, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.write_text, (self.target, "written by a pickle"))


@pytest.mark.parametrize("name", ["ae.pt", "6.pt", "cc_weights.pt", "sae.pt"])
def test_a_malicious_pickle_is_refused_and_does_nothing(name: str, tmp_path: Path) -> None:
    folder, target = tmp_path / "dictionary", tmp_path / "written"
    folder.mkdir()
    with (folder / name).open("wb") as stream:
        if name == "sae.pt":
            stream.write(b'{"schema": 2, "cfg": {}}\n')
        names = dict.fromkeys(("pre_bias", "latent_bias", "W_enc"), torch.zeros(2, 2))
        torch.save(names | {"payload": Malicious(target)}, stream)
    (folder / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    (folder / "cfg.json").write_text("{}")
    if name != "sae.pt":  # whose first line torch.load does not skip
        torch.load(folder / name, weights_only=False)
        assert target.exists(), "the pickle must be able to do harm"
        target.unlink()
    with pytest.raises(ValueError, match=rf"{name} must hold tensors and plain values only.*Nothing was run"):
        Dictionary.load(folder)
    assert not target.exists()


def test_an_npz_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    import numpy as np

    objects = np.array([Malicious(tmp_path / "written")], dtype=object)
    np.savez(tmp_path / "params.npz", W_enc=objects)
    with pytest.raises(ValueError, match=r"params\.npz: array `W_enc` must hold plain numbers"):
        Dictionary.load(tmp_path)
    assert not (tmp_path / "written").exists()


def test_a_folder_of_two_formats_is_refused_naming_both(tmp_path: Path) -> None:
    for source in ("sparsify-topk/layers.10", "dictionary_learning-AutoEncoderTopK", "sae_lens-gated"):
        for file in (GOLDEN / source).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").unlink()
    message = r"of 3: SAELens \(.*sae_weights\.safetensors\); dictionary_learning \(ae\.pt\); sparsify \(sae\.safe"
    with pytest.raises(ValueError, match=message):
        Dictionary.load(tmp_path)


def test_our_own_record_is_authoritative_over_foreign_files_beside_it(tmp_path: Path) -> None:
    ours = Dictionary.load(GOLDEN / "sae_lens-gated")
    folder = ours.save(tmp_path / "ours")
    (folder / "ae.pt").write_bytes((GOLDEN / "dictionary_learning-AutoEncoderTopK" / "ae.pt").read_bytes())
    assert Dictionary.load(folder).config == ours.config


def copied(name: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in (GOLDEN / name).rglob("*"):
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def changed(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The folder after a change to a JSON file, a safetensors file or a `.pt` file of it."""
    path = folder / file
    if file.endswith(".json"):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    elif file.endswith(".pt"):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    else:
        content = load_file(path)
        change(content)
        save_file(content, path)
    return folder


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("sparsify-topk", "sae.safetensors", lambda t: t.pop("W_dec"), r"sae\.safetensors.*tensor `W_dec` is missing"),
        ("sparsify-topk", "sae.safetensors", lambda t: t.update(more=torch.zeros(1)), r"tensor `more` is not part"),
        (
            "sparsify-topk",
            "sae.safetensors",
            lambda t: t.update(W_dec=t["W_dec"].t().contiguous()),
            r"tensor `W_dec` must have shape \(24, 6\), got \(6, 24\)",
        ),
        (
            "sparsify-topk",
            "sae.safetensors",
            lambda t: t["encoder.bias"].fill_(float("nan")),
            r"tensor `encoder\.bias` holds NaN or infinity",
        ),
        (
            "sparsify-topk",
            "sae.safetensors",
            lambda t: t.update({"encoder.bias": torch.zeros(24, dtype=torch.int32)}),
            r"tensor `encoder\.bias` must hold floating-point numbers, got I32",
        ),
        ("sparsify-topk", "cfg.json", lambda c: c.pop("k"), r"cfg\.json.*`k` must be a whole number"),
        ("sparsify-topk", "cfg.json", lambda c: c.update(d_in=7), r"tensor `b_dec` must have shape \(7,\), got \(6,\)"),
        ("sparsify-topk", "cfg.json", lambda c: c.update(activation="groupmax"), r"`activation` must be 'topk'"),
        ("sparsify-topk", "cfg.json", lambda c: c.update(num_latents=10**12), r"must have shape \(1000000000000, 6\)"),
        (
            "dictionary_learning-AutoEncoderTopK",
            "config.json",
            lambda c: c["trainer"].update(dict_class="IdentityDict"),
            r"config\.json.*`trainer\.dict_class` must be one of AutoEncoder, .*got 'IdentityDict'",
        ),
        (
            "dictionary_learning-AutoEncoderTopK",
            "ae.pt",
            lambda t: t.update({"b_dec": "zero"}),
            r"ae\.pt.*tensor `b_dec` must hold floating-point numbers, got str",
        ),
        (
            "dictionary_learning-AutoEncoderTopK",
            "ae.pt",
            lambda t: t.pop("encoder.weight"),
            r"tensor `encoder\.weight` must be a matrix, got nothing",
        ),
        (
            "sae_lens-gated",
            "cfg.json",
            lambda c: c.update(architecture="temporal"),
            r"`architecture` must be one of .*",
        ),
        ("sae_lens-gated", "cfg.json", lambda c: c.update(architecture="abstopk"), r"got 'abstopk'"),
        ("sae_lens-gated", "cfg.json", lambda c: c.update(d_sae="24"), r"`d_sae` must be a whole number"),
        (
            "sae_lens-gated",
            "cfg.json",
            lambda c: c.update(dtype="bfloat16"),
            r"`dtype` is 'bfloat16', but tensor `W_dec` holds float32",
        ),
        ("llama_scope", "hyperparams.json", lambda c: c.update(act_fn="batchtopk"), r"`act_fn` must be relu, jumprelu"),
    ],
)
def test_a_wrong_file_is_refused_naming_the_file_and_the_key(
    name: str, file: str, change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    folder = copied(name, tmp_path / "dictionary")
    if name == "llama_scope":
        (folder / "checkpoints").mkdir()
        (folder / "final.safetensors").rename(folder / "checkpoints" / "final.safetensors")
    with pytest.raises(ValueError, match=message):
        Dictionary.load(changed(folder, file, change))


def header(folder: Path, content: bytes, length: int | None = None) -> Path:
    """A sparsify folder whose weights begin with this header."""
    copied("sparsify-topk", folder)
    n = len(content) if length is None else length
    (folder / "sae.safetensors").write_bytes(n.to_bytes(8, "little") + content + bytes(96))
    return folder


def test_a_safetensors_header_that_lies_is_refused_before_it_is_believed(tmp_path: Path) -> None:
    for length in (2**62, 10**9, 0, 5000):
        with pytest.raises(
            ValueError, match=rf"sae\.safetensors must be a safetensors file.*header of {length:,} bytes"
        ):
            Dictionary.load(header(tmp_path, b"{}", length))
    record = {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}
    for change, message in (
        (
            {"dtype": "F64"},
            r"`b_dec` of dtype F64 and shape \(6,\) needs 48 bytes, but its place in the file is 0 to 24",
        ),
        ({"data_offsets": [80, 104]}, r"its place in the file is 80 to 104 of 96"),
        ({"data_offsets": [-24, 0]}, r"its place in the file is -24 to 0"),
        ({"dtype": "F128"}, r"tensor `b_dec` must have one of the dtypes F64, F32, F16, BF16, got F128"),
        ({"shape": "6x"}, r"record of tensor `b_dec` cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            Dictionary.load(header(tmp_path, json.dumps({"b_dec": record | change}).encode()))


def test_a_link_out_of_the_folder_is_refused_unless_it_is_the_hub_cache_s_own(tmp_path: Path) -> None:
    outside = copied("sparsify-topk", tmp_path / "outside")
    folder = tmp_path / "dictionary"
    folder.mkdir()
    for file in outside.iterdir():
        (folder / file.name).symlink_to(file)
    with pytest.raises(ValueError, match=r"must lie in its folder, but .*cfg\.json leads to .*outside"):
        Dictionary.load(folder)
    snapshot, blobs = (
        tmp_path / "models--a--b" / "snapshots" / "1234" / "layers.10",
        tmp_path / "models--a--b" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in outside.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / file.name)
    assert Dictionary.load(snapshot).config == TopKConfig(d_in=6, d_sae=24, k=3)
    with pytest.raises(ValueError, match=r"`subfolder` must lie inside"):
        Dictionary.load(snapshot, subfolder="../../../outside")


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


def test_a_plain_standard_sae_stays_one(tmp_path: Path) -> None:
    """Without a threshold, a `dict_class` or a k, nothing is guessed."""
    torch.save(openai_state("ReLU"), tmp_path / "3.pt")
    assert Dictionary.load(tmp_path).config == StandardConfig(d_in=D_IN, d_sae=D_SAE)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "3.pt")
    with pytest.raises(FileNotFoundError, match="is missing"):
        Dictionary.load(tmp_path)
    with pytest.raises(ValueError, match=r"in a single file must be of openai.*has other names: weight"):
        Dictionary.load(tmp_path / "3.pt")
