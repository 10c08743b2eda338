"""Names of the same place in different models: one table, read in both directions, and on real module trees."""

from typing import Any

import pytest
import torch
from resnet import HOOK, Model
from torch import Tensor, nn

from sae import find_hook, from_transformer_lens, replace_activations, to_transformer_lens
from sae.naming import FAMILIES, Place, family_of, hook_names_of, place_of, translate

SITES = list(FAMILIES["transformer_lens"].layer)


@pytest.mark.parametrize(
    ("hook_name", "lens"),
    [
        ("model.layers.8", "blocks.8.hook_resid_post"),
        ("model.layers.8:output", "blocks.8.hook_resid_post"),
        ("model.layers.8:input", "blocks.8.hook_resid_pre"),
        ("model.layers.10.mlp", "blocks.10.hook_mlp_out"),
        ("model.layers.3.self_attn", "blocks.3.hook_attn_out"),
        ("model.layers.3.self_attn.o_proj:input", "blocks.3.attn.hook_z"),
        ("model.layers.3.post_attention_layernorm:input", "blocks.3.hook_resid_mid"),
        ("model.layers.3.post_attention_layernorm", "blocks.3.hook_attn_out"),
        ("transformer.h.0", "blocks.0.hook_resid_post"),
        ("transformer.h.0.attn.c_proj:input", "blocks.0.attn.hook_z"),
        ("gpt_neox.layers.5.attention", "blocks.5.hook_attn_out"),
        ("model.embed_tokens", "hook_embed"),
        ("transformer.wte", "hook_embed"),
        ("model.decoder.layers.4", "blocks.4.hook_resid_post"),
    ],
)
def test_a_hook_has_its_name_in_transformer_lens(hook_name: str, lens: str) -> None:
    assert to_transformer_lens(hook_name) == lens


@pytest.mark.parametrize("family", FAMILIES)
def test_aliases_lead_there_and_back(family: str) -> None:
    for place in [Place(site, 7) for site in SITES] + [Place("hook_embed", None)]:
        for name in hook_names_of(place, family):
            assert place_of(name, family) == place
            lens = translate(name, "transformer_lens", family)
            assert place_of(lens) == place
    assert from_transformer_lens("blocks.7.hook_resid_pre", family) == next(
        iter(hook_names_of(Place("hook_resid_pre", 7), family))
    )


def test_families_name_the_same_place_differently() -> None:
    assert from_transformer_lens("blocks.1.hook_resid_mid") == "model.layers.1.post_attention_layernorm:input"
    assert from_transformer_lens("blocks.1.hook_mlp_out", "gemma") == "model.layers.1.post_feedforward_layernorm"
    assert from_transformer_lens("blocks.1.attn.hook_z", "gpt2") == "transformer.h.1.attn.c_proj:input"
    assert from_transformer_lens("blocks.1.mlp.hook_post", "neox") == "gpt_neox.layers.1.mlp.dense_4h_to_h:input"
    assert translate("transformer.h.1.mlp", "llama") == "model.layers.1.mlp"


def test_a_place_without_a_name_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.gate_proj' has no name of the family"):
        to_transformer_lens("model.layers.1.mlp.gate_proj")
    with pytest.raises(ValueError, match="has no name of the family 'neox'"):
        from_transformer_lens("blocks.1.hook_resid_mid", "neox")


def tiny(kind: str) -> Any:
    """A model of two layers of a family of transformers, from its configuration."""
    import transformers

    torch.manual_seed(0)
    llama_like = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 32,
    }
    match kind:
        case "llama":
            config: Any = transformers.LlamaConfig(**llama_like)
        case "gemma":
            config = transformers.Gemma2Config(**llama_like, query_pre_attn_scalar=8)
        case "gpt2":
            config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        case "neox":
            del llama_like["num_key_value_heads"], llama_like["head_dim"]
            config = transformers.GPTNeoXConfig(**llama_like)
        case _:
            config = transformers.OPTConfig(
                vocab_size=50,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                ffn_dim=24,
                word_embed_proj_dim=16,
                max_position_embeddings=32,
            )
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def seen_at(model: Any, hook_name: str) -> Tensor:
    captured: list[Tensor] = []
    with replace_activations(model, hook_name, captured.append):  # type: ignore[func-returns-value,arg-type]
        model(torch.arange(10)[None])
    return captured[0]


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2", "neox", "other"])
def test_the_residual_stream_adds_up_at_the_named_places(kind: str) -> None:
    model = tiny(kind)
    assert family_of(model) == kind
    at = {site: seen_at(model, f"blocks.1.{site}") for site in SITES if site in FAMILIES[kind].layer}
    stream = (at["hook_resid_pre"], at["hook_resid_post"])
    assert torch.equal(stream[0], seen_at(model, "blocks.0.hook_resid_post"))
    if kind == "other":
        assert set(at) == {"hook_resid_pre", "hook_resid_post"}
        return
    torch.testing.assert_close(stream[1], stream[0] + at["hook_attn_out"] + at["hook_mlp_out"])
    if kind != "neox":
        torch.testing.assert_close(at["hook_resid_mid"], stream[0] + at["hook_attn_out"])
    if kind in ("llama", "gpt2"):
        output = model.model.layers[1].self_attn.o_proj if kind == "llama" else model.transformer.h[1].attn.c_proj
        torch.testing.assert_close(output(at["attn.hook_z"]), at["hook_attn_out"])
        mlp = model.model.layers[1].mlp if kind == "llama" else model.transformer.h[1].mlp
        torch.testing.assert_close(mlp(at["mlp.hook_in"]), at["hook_mlp_out"])


def test_names_of_another_family_are_found_in_a_model_and_its_base() -> None:
    model = tiny("gpt2")
    for root, prefix in ((model, "transformer."), (model.transformer, "")):
        assert find_hook(root, "model.layers.1")[:2] == (f"{prefix}h.1", "output")
        assert find_hook(root, "blocks.1.hook_resid_pre")[:2] == (f"{prefix}h.1", "input")
        assert find_hook(root, "transformer.h.1.mlp")[:2] == (f"{prefix}h.1.mlp", "output")
        assert find_hook(root, "hook_embed").path == f"{prefix}wte"


def test_find_hook_names_the_nearest_modules() -> None:
    model = Model()
    assert find_hook(model, "layers.1.linear:input").module is model.layers[1].linear
    assert find_hook(model, HOOK).path == HOOK
    with pytest.raises(ValueError, match=r"module of Model, got 'layer\.1'\. Nearest: .*layers\.1"):
        find_hook(model, "layer.1")
    with pytest.raises(ValueError, match="got ''"):
        find_hook(model, "")
    with pytest.raises(ValueError, match=r"got 'model\.layers\.9'"):
        find_hook(tiny("llama"), "model.layers.9")
    with pytest.raises(TypeError, match="got Linear_"):
        find_hook(type("Linear_", (), {})(), "a")
    assert isinstance(find_hook(type("Wrapper", (), {"_module": model})(), HOOK).module, nn.Module)
