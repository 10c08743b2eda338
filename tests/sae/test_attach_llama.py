"""attach on a small Llama of transformers: padding, generation with its KV cache, token ids, and the identity tests."""

from pathlib import Path
from typing import Any

import pytest
import torch
from resnet import small_sae, state
from torch import Tensor

from sae import Add, Clamp, Exclude, Patch, Zero, attach, replace_activations

HOOK = "model.layers.1"
D = 32


@pytest.fixture(scope="module")
def llama(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sae() -> Any:
    return small_sae(d_in=D, d_sae=96)


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 300, shape, generator=torch.Generator().manual_seed(seed))


def padded(texts: list[Tensor], left: bool) -> dict[str, Tensor]:
    """Texts of several lengths as one batch."""
    length = max(len(text) for text in texts)
    rows, masks = [], []
    for text in texts:
        pad, real = torch.ones(length - len(text), dtype=torch.long), torch.ones(len(text), dtype=torch.long)
        rows.append(torch.cat([pad, text] if left else [text, pad]))
        masks.append(torch.cat([0 * pad, real] if left else [real, 0 * pad]))
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}


def moved(model: Any, hook: str, delta: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Logits when `delta` is added to the activations: the oracle of an edit."""
    with replace_activations(model, hook, lambda x: x + delta):
        logits: Tensor = model(*args, **kwargs).logits
    return logits


@pytest.mark.parametrize("hook", [HOOK, "model.layers.2:input", "model.layers.1.mlp", "model.layers.1.self_attn"])
def test_no_op_splice_keeps_the_logits(llama: Any, sae: Any, hook: str) -> None:
    tokens = ids(3, 12)
    clean = llama(tokens).logits
    with attach(llama, sae, hook, splice=True, error="keep") as tap:
        assert torch.equal(llama(tokens).logits, clean)
    assert tap.latents.count_nonzero() > 10
    # The same by way of the graph's nodes, and by decoding and adding the error back.
    with attach(llama, sae, hook, grad=True):
        torch.testing.assert_close(llama(tokens).logits, clean, rtol=0, atol=1e-4)
    with attach(llama, sae, hook, splice=True, edits=[Clamp("all", tap.latents)]) as spliced:
        dropped = llama(tokens).logits
    error = tap.x - sae(tap.x).x_hat
    assert not torch.allclose(dropped, clean, atol=1e-2)
    with replace_activations(llama, hook, lambda x: sae.decode(spliced.latents) + error):
        torch.testing.assert_close(llama(tokens).logits, clean, rtol=0, atol=1e-4)


def test_clamping_latents_to_their_own_values_keeps_the_logits(llama: Any, sae: Any) -> None:
    tokens = ids(2, 9)
    with attach(llama, sae, HOOK) as tap:
        clean = llama(tokens).logits
    with attach(llama, sae, HOOK, edits=[Clamp("all", tap.latents), Clamp([3, 8], tap.latents[..., [3, 8]])]):
        assert torch.equal(llama(tokens).logits, clean)


@pytest.mark.parametrize("left", [False, True])
def test_single_equals_batch(llama: Any, sae: Any, left: bool) -> None:
    texts = [ids(5, seed=1), ids(9, seed=2), ids(7, seed=3)]
    edits = [Add(4, 2.0, positions=[1, 3]), Zero("all", positions=4), Add(6, 1.0, positions=lambda t: t % 2 == 0)]
    for exclude in (None, Exclude()):
        options: dict[str, Any] = {"splice": True, "edits": edits, "exclude": exclude}
        batch = padded(texts, left)
        with attach(llama, sae, HOOK, **options) as tap:
            together = llama(**batch).logits
        real = batch["attention_mask"].bool()
        assert int(tap.counted.sum()) == 21 - (3 if exclude else 0)
        means = tap.mean()
        counted = []
        for row, text in enumerate(texts):
            with attach(llama, sae, HOOK, **options) as alone:
                single = llama(text[None]).logits[0]
            torch.testing.assert_close(together[row][real[row]], single, rtol=0, atol=1e-4)
            torch.testing.assert_close(tap.latents[row][real[row]], alone.latents[0], rtol=0, atol=1e-4)
            counted.append(alone.latents[0][1 if exclude else 0 :])
        torch.testing.assert_close(means, torch.cat(counted).mean(0), rtol=1e-4, atol=1e-5)


def test_padding_goes_on_unchanged(llama: Any, sae: Any) -> None:
    batch = padded([ids(4, seed=1), ids(9, seed=2)], left=True)
    seen: list[Tensor] = []
    with (
        attach(llama, sae, HOOK, splice=True, edits=[Add("all", 1.0)]) as tap,
        replace_activations(llama, HOOK, seen.append),  # type: ignore[func-returns-value,arg-type]
    ):
        llama(**batch)
    real = batch["attention_mask"].bool()
    assert torch.equal(tap.counted, real)
    assert torch.equal(seen[0][~real], tap.x[~real])
    torch.testing.assert_close(seen[0][real], sae.decode(tap.latents[real] + 1))


def test_token_ids_and_masks_choose_tokens(llama: Any, sae: Any) -> None:
    tokens = ids(2, 8)
    tokens[0, 3] = tokens[1, 6] = 301
    delta = torch.zeros(2, 8, D)
    delta[0, 3] = delta[1, 6] = 1.5 * sae.W_dec[4]
    expected = moved(llama, HOOK, delta, tokens)
    for positions in (lambda t: t == 301, tokens == 301):
        with attach(llama, sae, HOOK, edits=[Add(4, 1.5, positions=positions)]):
            torch.testing.assert_close(llama(tokens).logits, expected)
    with attach(llama, sae, HOOK, exclude=Exclude(first=False, token_ids=(301,))) as tap:
        llama(tokens)
    assert torch.equal(tap.counted, tokens != 301)


def test_positions_of_packed_documents_restart(llama: Any, sae: Any) -> None:
    tokens = ids(1, 8)
    position = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    delta = torch.zeros(1, 8, D)
    delta[0, [1, 4]] = sae.W_dec[4]
    expected = moved(llama, HOOK, delta, tokens, position_ids=position)
    with attach(llama, sae, HOOK, edits=[Add(4, 1.0, positions=1)], exclude=Exclude()) as tap:
        torch.testing.assert_close(llama(tokens, position_ids=position).logits, expected)
    assert tap.counted.tolist() == [[False, True, True, False, True, True, True, True]]


GREEDY = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.mark.parametrize("left", [False, True])
def test_generation_equals_forward_passes_over_the_whole_text(llama: Any, sae: Any, left: bool) -> None:
    """Editing at positions in the prompt and beyond, every decode step against one pass without a cache."""
    texts = [ids(4, seed=1), ids(7, seed=2)] if left else [ids(6, seed=1), ids(6, seed=2)]
    batch = padded(texts, left=True)
    options: dict[str, Any] = {
        "edits": [Add(4, 2.0, positions=[2, 7, 9]), Zero("all", positions=8), Clamp(5, 1.0)],
        "exclude": Exclude(),
    }
    before = state(llama)
    with attach(llama, sae, HOOK, **options) as tap:
        out = llama.generate(**batch, **GREEDY, pad_token_id=1, eos_token_id=None)
    assert state(llama) == before
    n_new = len(out.logits)
    assert n_new == 6
    whole = out.sequences[:, :-1]
    mask = torch.cat([batch["attention_mask"], torch.ones(2, n_new - 1, dtype=torch.long)], dim=1)
    with attach(llama, sae, HOOK, **options) as at_once:
        logits = llama(whole, attention_mask=mask).logits
    torch.testing.assert_close(torch.stack(out.logits, dim=1), logits[:, -n_new:], rtol=0, atol=2e-4)
    real = mask.bool()
    assert tap.x.shape[:2] == whole.shape
    torch.testing.assert_close(tap.latents[real], at_once.latents[real], rtol=0, atol=2e-4)
    assert torch.equal(tap.counted, at_once.counted)
    assert int(tap.counted.sum()) == int(real.sum()) - 2


def test_a_second_generation_replaces_what_was_seen(llama: Any, sae: Any) -> None:
    with attach(llama, sae, HOOK) as tap:
        for length in (5, 3):
            llama.generate(ids(1, length), max_new_tokens=3, do_sample=False, pad_token_id=1, eos_token_id=None)
            assert tap.latents.shape == (1, length + 2, 96)


def test_patch_from_another_run_works_while_generating(llama: Any, sae: Any) -> None:
    """Patching all latents and keeping no error makes the other text's reconstruction, whatever this text is."""
    other, prompt = ids(1, 8, seed=5), ids(1, 4, seed=6)
    with attach(llama, sae, HOOK) as tap:
        llama(other)
    seen: list[Tensor] = []
    with (
        attach(llama, sae, HOOK, splice=True, edits=[Patch("all", tap.latents)]) as patched,
        replace_activations(llama, HOOK, seen.append),  # type: ignore[func-returns-value,arg-type]
    ):
        llama.generate(prompt, max_new_tokens=7, do_sample=False, pad_token_id=1, eos_token_id=None)
    after = torch.cat(seen, dim=1)
    torch.testing.assert_close(after[:, :8], sae.decode(tap.latents), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[:, 8:], sae.decode(patched.latents)[:, 8:], rtol=1e-4, atol=1e-4)


def test_a_module_that_runs_on_its_own_after_a_call_knows_no_positions(llama: Any, sae: Any) -> None:
    with attach(llama, sae, HOOK, edits=[Add(4, 1.0, positions=[0])]):
        llama(ids(1, 5))
        with pytest.raises(ValueError, match="positions are known only inside a call of the model"):
            llama.model(ids(1, 5))
