"""Small dictionaries in the formats of other tools, each with what its own library computes from it.

    .venv-peers/bin/python tests/sae/peer_dictionaries.py FOLDER [NAME …]

writes FOLDER/NAME/… and FOLDER/NAME.expected.safetensors: x, latent_acts, and output, the reconstruction with all that
the library does to it. It runs in the peers' environment and imports nothing of this project. `golden/peers` is its
output. Gemma Scope and Llama Scope have no library that installs: their files are laid out as they are published, and
read by SAELens's converters, whose downloads are answered from the folder itself.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

D_IN, D_SAE, K = 6, 24, 3
MAKERS: dict[str, Callable[[Path], Any]] = {}


def maker(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    MAKERS[function.__name__.replace("__", "-")] = function
    return function


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with random parameters; decoder rows of norms other than 1, thresholds positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5
                values = values.abs() * 0.4 + 0.1 if "threshold" in name else values
                tensor.copy_(values)
    return module


def expect(folder: Path, x: torch.Tensor, latent_acts: torch.Tensor, output: torch.Tensor) -> None:
    tensors = {"x": x, "latent_acts": latent_acts, "output": output}
    save_file(
        {name: tensor.detach().float().clone().contiguous() for name, tensor in tensors.items()},
        folder.with_name(folder.name + ".expected.safetensors"),
    )


def inputs(width: int = D_IN, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, width, generator=generator) * torch.linspace(0.5, 2, width) + 0.3


# ---- SAELens ---------------------------------------------------------------------------------------------------------


def of_sae_lens(folder: Path, name: str, save: str = "save_model", width: int = D_IN, **settings: Any) -> None:
    import sae_lens
    from sae_lens.saes.sae import SAE, SAEMetadata

    config = getattr(sae_lens, name + "Config")(
        d_in=D_IN, d_sae=D_SAE, metadata=SAEMetadata(hook_name="blocks.2.hook_resid_post"), **settings
    )
    sae = randomised(getattr(sae_lens, name)(config))
    getattr(sae, save)(str(folder))
    if save == "save_inference_model":
        sae = SAE.load_from_disk(str(folder))
    elif "Training" in name:  # what it will be at inference is what counts
        inference = folder.with_name(folder.name + ".inference")
        sae.save_inference_model(str(inference))
        sae = SAE.load_from_disk(str(inference))
        for file in inference.iterdir():
            file.unlink()
        inference.rmdir()
    x = inputs()
    expect(folder, x, sae.encode(x), sae(x))


@maker
def sae_lens__gated(folder: Path) -> None:
    of_sae_lens(folder, "GatedSAE")


@maker
def sae_lens__jumprelu_without_b_dec(folder: Path) -> None:
    of_sae_lens(folder, "JumpReLUSAE", apply_b_dec_to_input=False)


@maker
def sae_lens__topk_rescaled(folder: Path) -> None:
    of_sae_lens(folder, "TopKSAE", k=K, rescale_acts_by_decoder_norm=True)


@maker
def sae_lens__standard_layer_norm(folder: Path) -> None:
    of_sae_lens(folder, "StandardSAE", normalize_activations="layer_norm")


@maker
def sae_lens__topk_constant_norm(folder: Path) -> None:
    of_sae_lens(folder, "TopKSAE", k=K, normalize_activations="constant_norm_rescale")


@maker
def sae_lens__transcoder(folder: Path) -> None:
    of_sae_lens(folder, "Transcoder", d_out=5, apply_b_dec_to_input=False)


@maker
def sae_lens__skip_transcoder(folder: Path) -> None:
    of_sae_lens(folder, "SkipTranscoder", d_out=5, apply_b_dec_to_input=False)


@maker
def sae_lens__jumprelu_transcoder(folder: Path) -> None:
    of_sae_lens(folder, "JumpReLUTranscoder", d_out=5, apply_b_dec_to_input=False)


@maker
def sae_lens__jumprelu_skip_transcoder(folder: Path) -> None:
    of_sae_lens(folder, "JumpReLUSkipTranscoder", d_out=5, apply_b_dec_to_input=False)


@maker
def sae_lens__batchtopk(folder: Path) -> None:
    of_sae_lens(folder, "BatchTopKTrainingSAE", "save_inference_model", k=K)


@maker
def sae_lens__batchtopk_checkpoint(folder: Path) -> None:
    of_sae_lens(folder, "BatchTopKTrainingSAE", k=K)


@maker
def sae_lens__matryoshka_checkpoint(folder: Path) -> None:
    of_sae_lens(folder, "MatryoshkaBatchTopKTrainingSAE", k=K, matryoshka_widths=[6, 12, 24])


@maker
def sae_lens__jumprelu_checkpoint(folder: Path) -> None:
    of_sae_lens(folder, "JumpReLUTrainingSAE")


@maker
def sae_lens__before_6(folder: Path) -> None:
    """cfg.json as SAELens 3 wrote it, with a TopK behind `activation_fn_str` and a scaling factor of ones."""
    from sae_lens.saes.sae import SAE

    of_sae_lens(folder, "TopKSAE", k=K)
    from safetensors.torch import load_file

    tensors = load_file(folder / "sae_weights.safetensors") | {"scaling_factor": torch.ones(D_SAE)}
    save_file(tensors, folder / "sae_weights.safetensors")
    old = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "torch.float32",
        "device": "cpu",
        "model_name": "gpt2-small",
        "hook_point": "blocks.2.hook_resid_post",
        "hook_point_layer": 2,
        "hook_point_head_index": None,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "normalize_activations": False,
        "context_size": 128,
        "dataset_path": "openwebtext",
        "prepend_bos": True,
    }
    (folder / "cfg.json").write_text(json.dumps(old))
    sae, x = SAE.load_from_disk(str(folder)), inputs()
    expect(folder, x, sae.encode(x), sae(x))


# ---- dictionary_learning ---------------------------------------------------------------------------------------------


def of_dictionary_learning(folder: Path, ae: Any, path: str, **trainer: Any) -> None:
    folder.mkdir(parents=True)
    state = {name: tensor.cpu() for name, tensor in randomised(ae).state_dict().items()}
    torch.save(state, folder / "ae.pt")
    settings = {"dict_class": type(ae).__name__, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 2}
    settings |= {"lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_2", **trainer}
    (folder / "config.json").write_text(json.dumps({"trainer": settings, "buffer": {"ctx_len": 128}}))
    loaded = type(ae).from_pretrained(str(folder / "ae.pt"))
    x = inputs()
    latent_acts = loaded.encode(x)
    expect(folder, x, latent_acts, loaded.decode(latent_acts))


@maker
def dictionary_learning__AutoEncoder(folder: Path) -> None:
    from dictionary_learning.dictionary import AutoEncoder

    of_dictionary_learning(folder, AutoEncoder(D_IN, D_SAE), "ae.pt")


@maker
def dictionary_learning__AutoEncoderNew(folder: Path) -> None:
    from dictionary_learning.dictionary import AutoEncoderNew

    of_dictionary_learning(folder, AutoEncoderNew(D_IN, D_SAE), "ae.pt")


@maker
def dictionary_learning__GatedAutoEncoder(folder: Path) -> None:
    from dictionary_learning.dictionary import GatedAutoEncoder

    of_dictionary_learning(folder, GatedAutoEncoder(D_IN, D_SAE), "ae.pt")


@maker
def dictionary_learning__JumpReluAutoEncoder(folder: Path) -> None:
    from dictionary_learning.dictionary import JumpReluAutoEncoder

    of_dictionary_learning(folder, JumpReluAutoEncoder(D_IN, D_SAE), "ae.pt")


@maker
def dictionary_learning__AutoEncoderTopK(folder: Path) -> None:
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    of_dictionary_learning(folder, AutoEncoderTopK(D_IN, D_SAE, K), "ae.pt", k=K)


@maker
def dictionary_learning__BatchTopKSAE(folder: Path) -> None:
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE

    of_dictionary_learning(folder, BatchTopKSAE(D_IN, D_SAE, K), "ae.pt", k=K)


@maker
def dictionary_learning__MatryoshkaBatchTopKSAE(folder: Path) -> None:
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE

    of_dictionary_learning(folder, MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [6, 6, 12]), "ae.pt", k=K)


# ---- sparsify --------------------------------------------------------------------------------------------------------


def of_sparsify(folder: Path, hookpoint: str, **settings: Any) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    coder = randomised(SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K, **settings)))
    coder.save_to_disk(folder / hookpoint)
    x = inputs()
    values, indices, _ = coder.encode(x)
    expect(folder, x, torch.zeros(len(x), D_SAE).scatter(1, indices, values), coder(x).sae_out)


@maker
def sparsify__topk(folder: Path) -> None:
    of_sparsify(folder, "layers.10")


@maker
def sparsify__transcoder(folder: Path) -> None:
    of_sparsify(folder, "h.3.mlp", transcode=True, skip_connection=True)


@maker
def sparsify__skip(folder: Path) -> None:
    of_sparsify(folder, "layers.4.mlp", skip_connection=True)


# ---- other projects' formats, through SAELens's converters -----------------------------------------------------------


def through_sae_lens(folder: Path, converter: str, repo_id: str, name: str, factor: float | None = None) -> None:
    """Expected values from SAELens's converter; files that it would download are below `folder`."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.saes.sae import SAE
    from safetensors import safe_open

    def local(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        return str(folder / (subfolder or "") / filename)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(folder / filename, framework="pt") as file:
            return {key: list(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = local, shapes
    overrides = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "d_out": D_IN}
    cfg, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[converter](repo_id, name, "cpu", False, overrides)
    cfg = loaders.handle_config_defaulting(cfg)
    sae = SAE.get_sae_class_for_architecture(cfg["architecture"])(
        SAE.get_sae_config_class_for_architecture(cfg["architecture"]).from_dict(cfg)
    )
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    if factor is not None:
        sae.fold_activation_norm_scaling_factor(factor)
    x = inputs()
    expect(folder, x, sae.encode(x), sae(x))


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}
    return {
        name: t.abs() * 0.4 + 0.1 if "threshold" in name and "log" not in name else t for name, t in tensors.items()
    }


def gemma_tensors(lower: bool = False, skip: bool = False) -> dict[str, torch.Tensor]:
    shapes = {
        "W_enc": (D_IN, D_SAE),
        "W_dec": (D_SAE, D_IN),
        "b_enc": (D_SAE,),
        "b_dec": (D_IN,),
        "threshold": (D_SAE,),
    }
    shapes |= {"affine_skip_connection": (D_IN, D_IN)} if skip else {}
    return {name.lower() if lower else name: t for name, t in random_tensors(shapes).items()}


def gemma_npz(folder: Path, name: str) -> None:
    (folder / name).mkdir(parents=True)
    np.savez(folder / name / "params.npz", **{key: tensor.numpy() for key, tensor in gemma_tensors().items()})


@maker
def gemma_scope(folder: Path) -> None:
    repo, name = "google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82"
    gemma_npz(folder, f"gemma-scope-2b-pt-res/{name}")
    through_sae_lens(folder, "gemma_2", repo, f"gemma-scope-2b-pt-res/{name}")


@maker
def gemma_scope__embedding(folder: Path) -> None:
    repo, name = "google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"
    gemma_npz(folder, f"gemma-scope-2b-pt-res/{name}")
    through_sae_lens(folder, "gemma_2", repo, f"gemma-scope-2b-pt-res/{name}")


@maker
def gemma_scope__transcoder(folder: Path) -> None:
    repo, name = "google/gemma-scope-2b-pt-transcoders", "layer_12/width_16k/average_l0_6"
    gemma_npz(folder, f"gemma-scope-2b-pt-transcoders/{name}")
    through_sae_lens(folder, "gemma_2_transcoder", repo, f"gemma-scope-2b-pt-transcoders/{name}")


def gemma_scope_2(folder: Path, name: str, skip: bool = False, **settings: Any) -> None:
    (folder / name).mkdir(parents=True)
    save_file(gemma_tensors(lower=True, skip=skip), folder / name / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", **settings}
    (folder / name / "config.json").write_text(json.dumps(config))
    through_sae_lens(folder, "gemma_3", "google/gemma-scope-2-1b-pt", name)


@maker
def gemma_scope_2__resid(folder: Path) -> None:
    gemma_scope_2(folder, "resid_post/layer_9_width_16k_l0_small", hf_hook_point_in="model.layers.9.output")


@maker
def gemma_scope_2__transcoder(folder: Path) -> None:
    gemma_scope_2(
        folder,
        "transcoder_all/layer_9_width_16k_l0_small_affine",
        skip=True,
        affine_connection=True,
        hf_hook_point_in="model.layers.9.pre_feedforward_layernorm.output",
        hf_hook_point_out="model.layers.9.post_feedforward_layernorm.output",
    )


def llama_tensors() -> dict[str, torch.Tensor]:
    return random_tensors(
        {
            "encoder.weight": (D_SAE, D_IN),
            "encoder.bias": (D_SAE,),
            "decoder.weight": (D_IN, D_SAE),
            "decoder.bias": (D_IN,),
        }
    )


@maker
def llama_scope(folder: Path) -> None:
    name = "Llama3_1-8B-Base-L8R-8x"
    (folder / name / "checkpoints").mkdir(parents=True)
    tensors = {key: tensor.bfloat16() for key, tensor in llama_tensors().items()}
    save_file(tensors, folder / name / "checkpoints" / "final.safetensors")
    norm = 1.75
    hyperparams = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "hook_point_in": "blocks.8.hook_resid_post",
        "hook_point_out": "blocks.8.hook_resid_post",
        "jump_relu_threshold": 0.2021484375,
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "norm_activation": "dataset-wise",
        "apply_decoder_bias_to_pre_encoder": False,
        "use_decoder_bias": True,
        "act_fn": "jumprelu",
        "top_k": 50,
    }
    (folder / name / "hyperparams.json").write_text(json.dumps(hyperparams))
    through_sae_lens(folder, "llama_scope", "fnlp/Llama3_1-8B-Base-LXR-8x", name, factor=D_IN**0.5 / norm)


def main() -> None:
    root, names = Path(sys.argv[1]), sys.argv[2:] or list(MAKERS)
    failed = 0
    for name in names:
        try:
            MAKERS[name](root / name)
        except Exception as error:  # noqa: BLE001 — another tool's version may lack one class; the others count
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            failed += 1
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
