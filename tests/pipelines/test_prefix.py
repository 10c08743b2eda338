"""A replayed prefix changes nothing but the work: logits equal those of whole passes, and its layers do not run."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipelines.prefix import Prefix
from sae.hooks import replace_activations

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
GPT2 = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=4, n_head=4)


@pytest.fixture(params=["model.layers.{}", "transformer.h.{}"])
def named_model(request: pytest.FixtureRequest) -> tuple[nn.Module, str]:
    """A model and how its layers are called."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA) if request.param.startswith("model") else GPT2LMHeadModel(GPT2)
    return model.eval(), request.param


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize(
    ("hook", "n_layers"),
    [("{}", 3), ("{}:input", 2), ("{}.mlp", 2), ("{}.mlp:input", 2)],
    ids=["output", "input", "mlp", "mlp-input"],
)
def test_replay_equals_whole_passes(named_model: tuple[nn.Module, str], hook: str, n_layers: int) -> None:
    model, name = named_model
    hook = hook.format(name.format(2))
    tokens = torch.arange(24).view(2, 12)
    prefix = Prefix(model, [hook])
    assert len(prefix) == n_layers
    runs = dict.fromkeys(range(4), 0)
    handles = [
        layer.mlp.register_forward_hook(lambda *_, index=index: runs.update({index: runs[index] + 1}))
        for index, layer in enumerate(model.get_submodule(name.removesuffix(".{}")))
    ]
    with prefix.record():
        clean = logits(model, tokens)
    with prefix.replay():
        again = logits(model, tokens)
        with replace_activations(model, hook, lambda x: x * 2):
            doubled = logits(model, tokens)
    assert list(runs.values()) == [1] * n_layers + [3] * (4 - n_layers)
    for handle in handles:
        handle.remove()
    assert torch.equal(again, clean)
    with replace_activations(model, hook, lambda x: x * 2):
        assert torch.equal(doubled, logits(model, tokens))
    assert not torch.equal(doubled, clean)


def test_several_hooks_share_what_comes_before_all_of_them(named_model: tuple[nn.Module, str]) -> None:
    model, name = named_model
    assert len(Prefix(model, [name.format(3), name.format(1)])) == 2


def test_hook_outside_of_a_list_of_layers_has_no_prefix(named_model: tuple[nn.Module, str]) -> None:
    model, _ = named_model
    prefix = Prefix(model, ["lm_head:input"])
    tokens = torch.arange(12)[None]
    with prefix.record():
        clean = logits(model, tokens)
    with prefix.replay():
        assert len(prefix) == 0
        assert torch.equal(logits(model, tokens), clean)


def test_nothing_stays_on_the_model(named_model: tuple[nn.Module, str]) -> None:
    model, name = named_model
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    prefix = Prefix(model, [name.format(2)])
    with prefix.record():
        logits(model, torch.arange(12)[None])
    with pytest.raises(RuntimeError), prefix.replay():
        raise RuntimeError
    after = {path: dict(vars(module)) for path, module in model.named_modules()}
    assert after == before


def test_replay_without_a_recording_is_refused(named_model: tuple[nn.Module, str]) -> None:
    model, name = named_model
    with pytest.raises(ValueError, match="inside of `record`"), Prefix(model, [name.format(1)]).replay():
        pass
