import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.config import ModelConfig
from pipelines.errors import UsageError
from pipelines.models import LanguageModel, ResolvedModel, cache_root, pick_device, resolve_model
from pipelines.skeleton import probe_widths
from pipelines.sources import sha256_of

HOOKS = ["model.layers.0", "model.layers.1.mlp", "model.layers.1:input", "model.layers.1.self_attn:input"]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="module")
def tokens(lm: LanguageModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, lm.model.config.vocab_size, (3, 20), generator=generator)


@pytest.fixture(scope="module")
def position(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1]).expand_as(tokens)


def plain_forward(lm: LanguageModel, tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Activations by PyTorch's own hooks, and the logits."""
    seen: dict[str, torch.Tensor] = {}
    layers = lm.model.model.layers
    handles = [
        layers[0].register_forward_hook(lambda *a: seen.update({HOOKS[0]: a[2]})),
        layers[1].mlp.register_forward_hook(lambda *a: seen.update({HOOKS[1]: a[2]})),
        layers[1].register_forward_pre_hook(lambda *a: seen.update({HOOKS[2]: a[1][0]})),
        layers[1].input_layernorm.register_forward_hook(lambda *a: seen.update({HOOKS[3]: a[2]})),
    ]
    with torch.inference_mode():
        logits = lm.model(input_ids=tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen, logits


# -- capture -----------------------------------------------------------------------------------------------------------


def test_capture_equals_a_plain_forward_with_hooks(lm, tokens, position):
    expected, _ = plain_forward(lm, tokens)
    captured = lm.capture(tokens, position, HOOKS)
    assert set(captured) == set(HOOKS)
    for name in HOOKS:
        assert captured[name].shape == (3, 20, 32)
        torch.testing.assert_close(captured[name], expected[name], rtol=0, atol=0)


def test_capture_does_not_run_what_comes_after_the_last_hook(lm, tokens, position):
    ran: list[str] = []
    names = ["model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head"]
    modules = dict(lm.model.named_modules())
    handles = [modules[name].register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name in names]
    try:
        lm.capture(tokens, position, ["model.layers.0"])
        assert ran == ["model.layers.0"]
        ran.clear()
        lm.capture(tokens, position, ["model.layers.1:input", "model.layers.0"])
        assert ran == ["model.layers.0", "model.layers.1"]  # entered, stopped before its first line
    finally:
        for handle in handles:
            handle.remove()


def test_capture_leaves_the_model_as_it_was(lm, tokens, position):
    _, before = plain_forward(lm, tokens)
    lm.capture(tokens, position, HOOKS)
    with pytest.raises(UsageError):
        lm.capture(tokens, position, ["model.layers.0", "model.layers.9"])
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in lm.model.modules())
    _, after = plain_forward(lm, tokens)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_packed_documents_equal_separate_runs(lm, tokens):
    a, b, c = tokens[0, :7], tokens[1, :12], tokens[2, :1]
    packed = torch.cat([a, b, c])[None]
    position = torch.cat([torch.arange(len(x)) for x in (a, b, c)])[None]
    hook = "model.layers.2"
    joint = lm.capture(packed, position, [hook])[hook][0]
    alone = [lm.capture(x[None], torch.arange(len(x))[None], [hook])[hook][0] for x in (a, b, c)]
    torch.testing.assert_close(joint, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_capture_of_an_unknown_hook_lists_the_nearest_names(lm, tokens, position):
    with pytest.raises(UsageError, match=r"got 'model\.layer\.1'\. Nearest: model\.layers\.1, .*named_modules"):
        lm.capture(tokens, position, ["model.layer.1"])


def test_capture_of_a_module_that_is_never_called_is_refused(lm, tokens, position):
    with pytest.raises(
        UsageError, match=r"the forward pass never reached \['model\.layers'\]; choose modules that text passes"
    ):
        lm.capture(tokens, position, ["model.layers.0", "model.layers"])


def test_model_takes_no_gradients_and_no_dropout(lm):
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_check_isolation_passes_a_model_that_heeds_positions(lm):
    lm.check_isolation("model.layers.2")


def test_check_isolation_refuses_a_model_that_ignores_positions(lm, monkeypatch):
    capture = lm.capture

    def deaf(tokens, position, hook_names):
        return capture(tokens, torch.arange(tokens.shape[1])[None], hook_names)

    monkeypatch.setattr(lm, "capture", deaf)
    with pytest.raises(
        UsageError, match=r"does not keep packed documents apart .*: set collect\.isolate_documents: false"
    ):
        lm.check_isolation("model.layers.2")


# -- vocabulary --------------------------------------------------------------------------------------------------------


def test_token_strings_join_to_the_text(lm):
    strings = lm.token_strings()
    assert len(strings) == lm.model.config.vocab_size
    text = "the king took a rook, near some old bridge."
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(strings[i] for i in ids) == text
    assert " " in strings
    assert strings[0] == "<s>"


def test_token_strings_keep_the_leading_space_of_sentencepiece(lm, monkeypatch):
    class SentencePiece:
        def convert_ids_to_tokens(self, ids):
            return [["▁king", "s", "▁", None][i % 4] for i in ids]

        def convert_tokens_to_string(self, tokens):
            return tokens[0].replace("▁", " ").lstrip(" ")  # what such tokenizers do to a lone token

    monkeypatch.setattr(lm, "tokenizer", SentencePiece())
    assert lm.token_strings()[:4] == [" king", "s", " ", ""]


def test_unembedding_reproduces_the_models_logits(lm, tokens):
    _, logits = plain_forward(lm, tokens)
    weight, unembed = lm.unembedding()
    assert weight.shape == (32,)
    assert unembed.shape == (32, lm.model.config.vocab_size)
    hook = "model.layers.2"
    x = lm.capture(tokens, torch.arange(20).expand_as(tokens), [hook])[hook]
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + lm.model.config.rms_norm_eps)
    torch.testing.assert_close((normed * weight) @ unembed, logits, rtol=1e-4, atol=1e-5)


def test_unembedding_counts_the_final_norms_weight(lm):
    weight = lm.model.model.norm.weight
    before = weight.clone()
    try:
        weight.copy_(torch.linspace(0.5, 2, 32))
        torch.testing.assert_close(lm.unembedding()[0], torch.linspace(0.5, 2, 32))
    finally:
        weight.copy_(before)


# -- widths without weights --------------------------------------------------------------------------------------------


def test_probed_widths_equal_real_ones(lm, resolved, tokens, position):
    hooks = [
        *HOOKS, "model.layers.2", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj:input",
        "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.o_proj:input", "lm_head", "model.embed_tokens",
        "model.layers.0:output",
    ]  # fmt: skip
    widths = probe_widths(resolved, hooks)
    assert set(widths) == set(hooks)
    for name in hooks:
        assert widths[name] == lm.capture(tokens, position, [name])[name].shape[-1], name
    assert len(set(widths.values())) > 3


def test_probe_lists_the_nearest_names_of_an_unknown_hook(resolved):
    with pytest.raises(UsageError, match=r"model .*got 'model\.layers\.11'\. Nearest: model\.layers\.1"):
        probe_widths(resolved, ["model.layers.11"])
    with pytest.raises(UsageError, match=r"A hook name ends in `:output` or `:input`, got 'model\.layers\.1:inptu'"):
        probe_widths(resolved, ["model.layers.1:inptu"])


def test_probe_refuses_a_module_that_is_never_called(resolved):
    with pytest.raises(UsageError, match=r"the forward pass never reaches \['model\.layers'\]"):
        probe_widths(resolved, ["model.layers"])


@pytest.mark.parametrize("name", ["model.embed_tokens:input", "model.rotary_emb"])
def test_probe_refuses_what_is_not_one_vector_a_token(resolved, name):
    with pytest.raises(
        UsageError, match=rf"the activations at {name} have shape .*; choose a module that gives one vector a token"
    ):
        probe_widths(resolved, [name])


# -- where models come from --------------------------------------------------------------------------------------------


def test_provenance_names_the_source_and_digests_but_no_other_path(tiny_model, resolved):
    assert resolved.provenance() == {
        "source": str(tiny_model),
        "revision": None,
        "weights_sha256": sha256_of(tiny_model / "model.safetensors"),
        "settings_sha256": resolved.settings_sha256,
        "tokenizer_sha256": sha256_of(tiny_model / "tokenizer.json"),
    }


def test_digest_of_several_weight_files_depends_on_each(folder):
    shutil.copyfile(folder / "model.safetensors", folder / "more.safetensors")
    first = resolve_model(ModelConfig(source=str(folder))).weights_sha256
    with (folder / "more.safetensors").open("ab") as file:
        file.write(b"\0")
    assert resolve_model(ModelConfig(source=str(folder))).weights_sha256 != first


def test_digest_of_the_settings_is_that_of_the_network(folder):
    first = resolve_model(ModelConfig(source=str(folder))).settings_sha256
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"transformers_version": "0"}, indent=8))
    assert resolve_model(ModelConfig(source=str(folder))).settings_sha256 == first
    (folder / "modeling_own.py").write_text("")
    assert resolve_model(ModelConfig(source=str(folder))).settings_sha256 != first


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        UsageError, match=r"has no \.safetensors file; pickled weights are not loaded, convert them first"
    ):
        resolve_model(ModelConfig(source=str(folder)))


def test_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"the folder has no config\.json; give a Hugging Face model folder"):
        resolve_model(ModelConfig(source=str(tmp_path)))


def test_model_without_a_fast_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"has no tokenizer\.json; a fast tokenizer is needed"):
        resolve_model(ModelConfig(source=str(folder)))


def test_digest_is_for_single_files(folder):
    with pytest.raises(
        UsageError, match=r"model\.sha256 is for single-file sources .*; pin a Hugging Face model with model\.revision"
    ):
        resolve_model(ModelConfig(source=str(folder), sha256="0" * 64))


@pytest.mark.parametrize("source", ["nobody/no-such-model", "not a name!"])
def test_model_that_is_nowhere_says_what_to_check(source):
    with pytest.raises(
        UsageError, match=r"is neither a folder here nor could it be fetched .*; check the name, the network"
    ):
        resolve_model(ModelConfig(source=source))


def test_missing_gguf_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"m\.gguf: there is no file .*m\.gguf; check the path in the config"):
        resolve_model(ModelConfig(source=str(tmp_path / "m.gguf")))


def test_gguf_without_its_library_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("SAE_PIPELINES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"m\.gguf is a GGUF file: pip install 'sae-pipelines\[gguf\]'"):
        resolve_model(ModelConfig(source=str(tmp_path / "m.gguf")))


def test_converted_gguf_is_taken_from_the_cache_by_its_digest(tmp_path, tiny_model, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    digest = sha256_of(tmp_path / "m.gguf")
    monkeypatch.setenv("SAE_PIPELINES_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_model, tmp_path / "cache" / "models" / f"m-{digest[:12]}")
    found = resolve_model(ModelConfig(source=str(tmp_path / "m.gguf"), sha256=digest))
    assert found.folder.parent == tmp_path / "cache" / "models"
    assert found.weights_sha256 == digest


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("SAE_PIPELINES_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "sae-pipelines"
    monkeypatch.setenv("SAE_PIPELINES_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"


@pytest.mark.parametrize(
    "load", [lambda r, c: probe_widths(r, ["model.layers.0"]), LanguageModel], ids=["probe", "load"]
)
def test_code_in_a_model_folder_is_not_run_unasked(folder, load):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('the code ran')")
    settings = ModelConfig(source=str(folder))
    with pytest.raises(
        UsageError, match=r"ships Python code of its own; read it, then set model\.trust_remote_code: true"
    ):
        load(resolve_model(settings), settings)


@pytest.mark.parametrize(
    "load", [lambda r, c: probe_widths(r, ["model.layers.0"]), LanguageModel], ids=["probe", "load"]
)
@pytest.mark.parametrize("config", ['{"model_type": "unheard-of"}', "{"])
def test_model_that_transformers_cannot_build_is_named(folder, load, config):
    (folder / "config.json").write_text(config)
    settings = ModelConfig(source=str(folder))
    with pytest.raises(UsageError, match=f"model {folder} cannot be loaded: "):
        load(resolve_model(settings), settings)


def test_device_auto_is_a_gpu_where_there_is_one():
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == torch.device("cpu")


def test_model_dtype_is_the_configs(resolved: ResolvedModel):
    half = LanguageModel(resolved, ModelConfig(source=resolved.source, dtype="bfloat16", device="cpu"))
    x = half.capture(torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None], ["model.layers.0"])["model.layers.0"]
    assert x.dtype == torch.bfloat16
    assert np.isfinite(x.float().numpy()).all()


# -- hooks -------------------------------------------------------------------------------------------------------------


def test_inputs_and_outputs_of_modules_in_one_pass_equal_handwritten_hooks(lm):
    """MLP input, attention heads before o_proj, residual stream between attention and MLP, and a block's output."""
    layer = lm.model.model.layers[1]
    seen = {}

    def save(name, x):
        seen[name] = x.clone()

    handles = [
        layer.register_forward_hook(lambda _, __, out: save("block", out if isinstance(out, torch.Tensor) else out[0])),
        layer.mlp.register_forward_pre_hook(lambda _, args: save("mlp in", args[0])),
        layer.mlp.register_forward_hook(lambda _, __, out: save("mlp out", out)),
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: save("heads", args[0])),
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: save("mid", args[0])),
        layer.self_attn.register_forward_hook(lambda _, __, out: save("attention", out[0])),
        layer.register_forward_pre_hook(lambda _, args: save("block in", args[0])),
    ]
    tokens = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    position = torch.arange(9).expand(2, 9)
    with torch.inference_mode():
        lm.model(input_ids=tokens, position_ids=position, use_cache=False)
    for handle in handles:
        handle.remove()
    hooks = {
        "model.layers.1": "block",
        "model.layers.1.mlp:input": "mlp in",
        "model.layers.1.mlp": "mlp out",
        "model.layers.1.self_attn.o_proj:input": "heads",
        "model.layers.1.post_attention_layernorm:input": "mid",
        "model.layers.1.self_attn:output": "attention",
        "model.layers.1:input": "block in",
    }
    captured = lm.capture(tokens, position, list(hooks))
    for hook, name in hooks.items():
        torch.testing.assert_close(captured[hook], seen[name], rtol=0, atol=0)
    torch.testing.assert_close(seen["mid"], seen["block in"] + seen["attention"])  # what these places are
    torch.testing.assert_close(seen["block"], seen["mid"] + seen["mlp out"])


def test_input_of_a_module_that_is_called_by_keyword_is_its_hidden_states(lm):
    tokens, position = torch.arange(5)[None], torch.arange(5)[None]
    captured = lm.capture(tokens, position, ["model.layers.1.self_attn:input", "model.layers.1.input_layernorm"])
    torch.testing.assert_close(*captured.values(), rtol=0, atol=0)


def test_forward_dtype_is_the_wanted_one_unless_the_cpu_would_emulate_it(monkeypatch):
    from pipelines.models import forward_dtype

    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda native=native: native)
        assert forward_dtype("bfloat16", torch.device("cpu")) == expected
        assert forward_dtype("bfloat16", torch.device("cuda")) == torch.bfloat16
        assert forward_dtype("float32", torch.device("cpu")) == torch.float32
