"""Somebody else's dictionary, without provenance and without a config: one command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import must, sae, sae_here, sentence
from safetensors.torch import save_file

from pipelines.bring import config_for
from pipelines.config import RunConfig
from pipelines.errors import UsageError
from sae import Dictionary, TopKConfig, TranscoderConfig, build


def gemma_scope_folder(folder: Path) -> Path:
    """`params.npz` and nothing else, below names that tell nothing."""
    sae_ = build(TopKConfig(d_in=32, d_sae=64, k=8), seed=0)
    folder.mkdir(parents=True)
    tensors = {name: tensor.detach().numpy() for name, tensor in sae_.state_dict().items()}
    np.savez(folder / "params.npz", **tensors, threshold=np.full(64, 0.05, np.float32))
    return folder


def saelens_folder(folder: Path) -> Path:
    """As SAELens leaves it, with TransformerLens's name of the hook."""
    folder.mkdir(parents=True)
    sae_ = build(TopKConfig(d_in=32, d_sae=64, k=8), seed=1)
    save_file({n: t.detach().contiguous() for n, t in sae_.state_dict().items()}, folder / "sae_weights.safetensors")
    cfg = {"architecture": "topk", "d_in": 32, "d_sae": 64, "k": 8, "dtype": "float32"}
    cfg["metadata"] = {"sae_lens_version": "6.54.12", "hook_name": "blocks.1.hook_resid_post", "context_size": 32}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


@pytest.mark.slow
def test_a_saelens_and_a_gemma_scope_folder_are_evaluated_in_one_command_each(
    tiny_model: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    common = ("--model", tiny_model, "--text", tiny_texts, "--tokens", 4096, "--set", "ray.num_cpus=2")
    common += ("--set", "evaluate.n_ce_tokens=512", "--json")
    for kind, extra in (("saelens", ()), ("gemma", ("--hook", "model.layers.1"))):
        folder = (saelens_folder if kind == "saelens" else gemma_scope_folder)(tmp_path / kind)
        out = tmp_path / f"run-{kind}"
        must(sae("evaluate", "--dictionary", folder, *common, *extra, "--out", out))
        metrics = json.loads((out / "metrics.json").read_text())
        assert 0 < metrics["main.l0"] < 64
        assert metrics["main.kl_div_score"] <= 1
        trained = Dictionary.load(out / "checkpoints/main/dictionary")
        assert torch.equal(trained.W_dec, Dictionary.load(folder).W_dec)
        must(sae("evaluate", out))  # the run directory is its own config


def test_the_config_that_is_made_says_what_the_dictionary_knows(
    tiny_model: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    made = config_for(str(saelens_folder(tmp_path / "res@8")), str(tiny_model), str(tiny_texts))
    config = RunConfig.model_validate(made)
    assert config.hooks == ("blocks.1.hook_resid_post",)
    assert (config.collect.context_length, config.collect.n_tokens, config.name) == (32, 65_536, "res-8")
    assert config.train is None
    transcoder = build(TranscoderConfig(d_in=32, d_out=32, d_sae=64, k=8), seed=0)
    folder = Dictionary(transcoder, hook_names=("model.layers.1.mlp:input", "model.layers.1.mlp")).save(tmp_path / "t")
    config = RunConfig.model_validate(config_for(str(folder), str(tiny_model), "somebody/texts", tokens=2048))
    assert config.hooks_of("main") == ("model.layers.1.mlp:input", "model.layers.1.mlp")
    assert config.text[0].dataset == "somebody/texts"
    with pytest.raises(UsageError, match=r"does not say where it reads: give --hook"):
        config_for(str(gemma_scope_folder(tmp_path / "npz")), str(tiny_model), str(tiny_texts))
    with pytest.raises(UsageError, match=r"--dictionary: .*is none of them"):
        config_for("nothing", str(tiny_model), str(tiny_texts))


def test_a_config_and_a_dictionary_exclude_each_other(tmp_path: Path) -> None:
    both = sentence(sae_here("evaluate", "quickstart", "--dictionary", tmp_path), 2)
    assert "a config says all of it: drop --dictionary" in both
    neither = sentence(sae_here("label", "--dictionary", tmp_path), 2)
    assert "missing: --model, --text" in neither


def test_info_tells_what_another_tool_s_folder_is(tmp_path: Path) -> None:
    facts = json.loads(must(sae_here("info", gemma_scope_folder(tmp_path / "layer_3"), "--json")))
    assert (facts["kind"], facts["architecture"], facts["d_in"], facts["d_sae"]) == ("dictionary", "jumprelu", 32, 64)
    facts = json.loads(must(sae_here("info", saelens_folder(tmp_path / "saelens"), "--json")))
    assert facts["provenance"]["hook_name"] == "blocks.1.hook_resid_post"
