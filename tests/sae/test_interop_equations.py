"""Formats whose library does not install beside the others: small files in exactly the published layout are compared
with the published equations, computed here in plain torch.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sae import (
    CrosscoderConfig,
    Dictionary,
    StandardConfig,
)
from tests.sae.foreign import (
    D_IN,
    D_SAE,
    K,
    assert_same,
    random_tensors,
    x_of,
)

pytestmark = pytest.mark.usefixtures("no_resolver")


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


def test_a_plain_standard_sae_stays_one(tmp_path: Path) -> None:
    """Without a threshold, a `dict_class` or a k, nothing is guessed."""
    torch.save(openai_state("ReLU"), tmp_path / "3.pt")
    assert Dictionary.load(tmp_path).config == StandardConfig(d_in=D_IN, d_sae=D_SAE)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "3.pt")
    with pytest.raises(FileNotFoundError, match="is missing"):
        Dictionary.load(tmp_path)
    with pytest.raises(ValueError, match=r"in a single file must be of openai.*has other names: weight"):
        Dictionary.load(tmp_path / "3.pt")
