"""Run in the peers' environment: latents of one dictionary on one model, held by four libraries.

Prints JSON: for each library and hook the largest difference of its latents from those on the Hugging Face model, that
of its logits under an edit, or why it is absent.
"""

import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers

from sae import Add, BatchTopKConfig, Dictionary, attach, build

warnings.simplefilter("ignore")
SITES = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_z",
    "mlp.hook_in",
)
TOKENS = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(0))
D = 16


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=D, n_layer=3, n_head=2, n_positions=32, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)


def bridge(model: Any, kind: str) -> tuple[Any, Callable[[Any], Any]]:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    built = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    return built, lambda held: held(TOKENS)


def hooked(model: Any, kind: str) -> tuple[Any, Callable[[Any], Any]]:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions

    common: dict[str, Any] = {
        "n_layers": 3,
        "d_model": D,
        "d_head": D // 2,
        "n_heads": 2,
        "n_ctx": 32,
        "d_vocab": 60,
        "device": "cpu",
        "seed": 0,
    }
    if kind == "llama":
        config = HookedTransformerConfig(
            **common,
            d_mlp=24,
            act_fn="silu",
            normalization_type="RMS",
            positional_embedding_type="rotary",
            rotary_dim=D // 2,
            rotary_adjacent_pairs=False,
            gated_mlp=True,
            final_rms=True,
            eps=model.config.rms_norm_eps,
            n_key_value_heads=2,
            original_architecture="LlamaForCausalLM",
        )
        weights = weight_conversions.convert_llama_weights(model, config)
    else:
        config = HookedTransformerConfig(
            **common, d_mlp=4 * D, act_fn="gelu_new", normalization_type="LN", original_architecture="GPT2LMHeadModel"
        )
        weights = weight_conversions.convert_gpt2_weights(model, config)
    built = HookedTransformer(config)
    built.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return built.eval().requires_grad_(False), lambda held: held(TOKENS)


def nnsight(model: Any, kind: str) -> tuple[Any, Callable[[Any], Any]]:
    from nnsight import NNsight

    def run(held: Any) -> Any:
        with held.trace(TOKENS):
            logits = held.lm_head.output.save()
        return logits

    return NNsight(model), run


def main() -> None:
    answer: dict[str, Any] = {}
    sae = build(BatchTopKConfig(d_in=D, d_sae=64, k=8), seed=1).requires_grad_(False)
    dictionary = Dictionary(sae, hook_name="model.layers.1")
    for kind, model in (("llama", llama()), ("gpt2", gpt2())):
        expected = {}
        for site in SITES:
            with attach(model, sae, f"blocks.1.{site}") as tap:
                model(TOKENS)
            expected[site] = tap.latents
        edits = [Add(3, 2.0, positions=[2, 4])]
        with dictionary.attach(model, edits=edits):
            edited = model(TOKENS).logits
        answer[f"{kind}.edit moves"] = float((edited - model(TOKENS).logits).abs().max())
        answer[f"{kind}.n_active"] = min(int(latents.count_nonzero()) for latents in expected.values())
        for name, hold in (("hooked", hooked), ("nnsight", nnsight), ("bridge", bridge)):
            try:
                held, run = hold(model, kind)
            except (ImportError, AttributeError, TypeError, ValueError) as error:
                answer[f"{kind}.{name}"] = f"{type(error).__name__}: {error}"
                continue
            differences = {}
            for site in SITES:
                with attach(held, sae, f"blocks.1.{site}") as tap:
                    run(held)
                differences[site] = float((tap.latents - expected[site]).abs().max())
            with dictionary.attach(held, edits=edits) as tap:
                logits = run(held)
            differences["own hook name"] = float((tap.latents - expected["hook_resid_post"]).abs().max())
            differences["edited logits"] = float((logits - edited).abs().max())
            answer[f"{kind}.{name}"] = differences
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
