"""check: a dictionary that fits is said to fit, and each usual mistake is named."""

import copy
from contextlib import ExitStack
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution_oracle import trained
from torch import Tensor

from sae import Dictionary, check, replace_activations
from sae.check import CheckReport

HOOK = "model.layers.1"


@pytest.fixture(scope="module")
def llama(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def texts() -> Tensor:
    return torch.randint(2, 300, (24, 32), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def fitting(llama: Any) -> Dictionary:
    return trained(llama, HOOK, d_in=32, vocab=300, n_steps=200)


def moved(dictionary: Dictionary, hook_name: str, **known: Any) -> Dictionary:
    """The same SAE that says something else about itself."""
    return Dictionary(dictionary.sae, hook_name=hook_name, **known)


def test_a_dictionary_at_its_own_hook_fits(llama: Any, fitting: Dictionary, texts: Tensor) -> None:
    report = check(fitting, llama, texts)
    assert isinstance(report, CheckReport)
    assert (report.ok, report.cause, report.off) == (True, None, ())
    assert report.sentence.startswith("The dictionary fits model.layers.1: FVU 0.")
    assert min(fit.fvu for fit in report.others) > report.own.fvu
    assert report.others[0].hypothesis.startswith("it was trained on a model with centred weights")
    known = {"metrics": {"fvu": report.own.fvu, "l0": report.own.l0}, "provenance": {"median_norm": report.own.norm}}
    again = check(moved(fitting, HOOK, **known), llama, texts)
    assert again.ok
    assert set(again.recorded) == {"fvu", "l0", "norm"}
    assert "recorded" in again.sentence
    with pytest.raises(FrozenInstanceError):
        report.ok = False  # type: ignore[misc]


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ("model.layers.0", "it belongs to model.layers.1, a neighbouring layer"),
        ("model.layers.2", "it belongs to the input of model.layers.2, not its output"),
        ("model.layers.1:input", "it belongs to the output of model.layers.1, not its input"),
        ("blocks.0.hook_resid_post", "it belongs to blocks.1.hook_resid_post, a neighbouring layer"),
    ],
)
def test_a_wrong_hook_is_named(llama: Any, fitting: Dictionary, texts: Tensor, wrong: str, cause: str) -> None:
    report = check(moved(fitting, wrong), llama, texts)
    assert not report.ok
    assert report.cause == cause
    assert f"It looks as if {cause}" in report.sentence


@pytest.mark.parametrize(("norm", "claim"), [(32**0.5, "mean norm of √d_in"), (1.0, "mean norm of 1")])
def test_a_normalisation_scale_is_named(
    llama: Any, fitting: Dictionary, texts: Tensor, norm: float, claim: str
) -> None:
    """The SAE of x · s is the same function of scaled activations."""
    seen: list[Tensor] = []
    with replace_activations(llama, HOOK, seen.append):  # type: ignore[func-returns-value,arg-type]
        llama(texts)
    scale = norm / float(seen[0][:, 1:].norm(dim=-1).mean())
    scaled = Dictionary(copy.deepcopy(fitting.sae), hook_name=HOOK)
    with torch.no_grad():
        scaled.sae.b_dec.mul_(scale)
        scaled.sae.W_dec.mul_(scale)
        scaled.sae.W_enc.div_(scale)
    report = check(scaled, llama, texts)
    assert report.cause is not None
    assert claim in report.cause


def test_centred_weights_are_named(llama: Any, texts: Tensor) -> None:
    """Trained on a residual stream without its mean, where the shift is large enough to matter."""
    shift = 30 * torch.ones(32)
    with replace_activations(llama, HOOK, lambda x: x - x.mean(-1, keepdim=True)):
        centred = trained(llama, HOOK, d_in=32, vocab=300)
    with replace_activations(llama, HOOK, lambda x: x + shift * x.norm(dim=-1, keepdim=True) / 60):
        report = check(centred, llama, texts)
    assert report.cause is not None
    assert "centred weights" in report.cause


def test_missing_bos_is_named_both_ways(llama: Any, texts: Tensor) -> None:
    """A model in which the first token decides the directions of all others: more than it does in real ones."""

    class Sensitive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama.model

        def forward(self, input_ids: Tensor) -> Any:
            begins = input_ids[:, :1, None] == 0
            with replace_activations(llama, "model.layers.0", lambda x: torch.where(begins, x.flip(-1), x)):
                return llama(input_ids)

    model = Sensitive()
    with_bos = trained_with_bos(model)
    said = {"metadata": {"prepend_bos": True}}
    assert check(moved(with_bos, HOOK, **said), model, texts, bos_token_id=0).ok
    report = check(moved(with_bos, HOOK, metadata={"prepend_bos": False}), model, texts, bos_token_id=0)
    assert report.cause == "it was trained with BOS before every text"


def trained_with_bos(model: Any) -> Dictionary:
    class Prepending(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.model

        def forward(self, input_ids: Tensor) -> Any:
            return model(torch.nn.functional.pad(input_ids, (1, 0), value=0))

    return trained(Prepending(), HOOK, d_in=32, vocab=300)


def test_another_model_is_suspected_by_its_name(llama: Any, fitting: Dictionary, texts: Tensor) -> None:
    """Where no hypothesis fits, the recorded name decides what is said."""
    metrics = {"fvu": check(fitting, llama, texts).own.fvu}
    named = moved(fitting, HOOK, metadata={"model_name": "Qwen/Qwen3-8B-Base"}, metrics=metrics)
    offset = torch.tensor([40.0, -40.0]).repeat(16)
    with ExitStack() as stack:
        for layer in range(3):
            stack.enter_context(replace_activations(llama, f"model.layers.{layer}", lambda x: x + offset))
        report = check(named, llama, texts, model_name="Qwen/Qwen3-8B")
        assert "a base model for an instruct model" in (report.cause or "")
        report = check(named, llama, texts, model_name="meta-llama/Llama-3.2-1B")
        assert report.cause == "it was trained on Qwen/Qwen3-8B-Base, and this model is meta-llama/Llama-3.2-1B"
        report = check(named, llama, texts)
        assert (report.ok, report.cause) == (False, None)
        assert "it may belong to another model" in report.sentence


def test_a_hook_that_is_not_the_recorded_one_is_named(llama: Any, fitting: Dictionary, texts: Tensor) -> None:
    here = {"imported_from": {"hook_names": ["blocks.1.hook_resid_post"]}}
    assert check(moved(fitting, HOOK, provenance=here), llama, texts).ok
    there = {"imported_from": {"hook_names": ["blocks.2.hook_resid_post"]}}
    report = check(moved(fitting, HOOK, provenance=there), llama, texts)
    assert report.cause == "it was trained on blocks.2.hook_resid_post, as it records"


def test_figures_that_are_not_as_recorded_are_named(llama: Any, fitting: Dictionary, texts: Tensor) -> None:
    known: dict[str, Any] = {"metrics": {"fvu": 1e-4, "l0": 400.0}, "provenance": {"median_norm": 1e6}}
    report = check(moved(fitting, HOOK, **known), llama, texts)
    assert report.off == ("fvu", "l0", "norm")
    assert not report.ok
    imported = {"imported_from": known["provenance"], "median_norm": report.own.norm}
    assert check(moved(fitting, HOOK, provenance=imported), llama, texts).recorded["norm"] == 1e6


def test_another_width_or_a_missing_hook_is_refused(llama: Any, fitting: Dictionary, texts: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must have width d_in=32 and d_out=32, got 417 and 417: this dictionary"):
        check(moved(fitting, "lm_head"), llama, texts)
    with pytest.raises(ValueError, match="path of a module"):
        check(moved(fitting, "model.layers.7"), llama, texts)
