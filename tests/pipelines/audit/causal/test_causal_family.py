"""The causal tests on a network whose wiring is known, and their bench against whole passes of a real architecture."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipelines.audit.causal.family import Case, CausalSettings, Finding, Measured, choose_dose, dose_curve, run_family
from pipelines.audit.causal.intervene import Bench
from pipelines.audit.causal.outcomes import Judge, Probe, SideEffects, TokenOdds, single_tokens
from pipelines.errors import UsageError
from pipelines.models import LanguageModel
from sae import Clamp, Dictionary, Exclude, TopKConfig, Zero, build
from tests.pipelines.audit.causal.wired import CAUSAL, CORRELATED, TARGET, Net, net


def cases(wired: Net, *sets: tuple[int, ...]) -> list[Case]:
    odds = TokenOdds((TARGET,))
    return [Case("concept", latents, wired.positive, wired.neutral, odds, wired.traits) for latents in sets]


def findings(seed: int) -> list[Finding]:
    wired = net(seed)
    return run_family(wired.dictionary, cases(wired, (CAUSAL,), (CORRELATED,)), CausalSettings(seed=seed))


def test_the_feature_that_is_read_is_causal_and_the_one_that_goes_along_is_not() -> None:
    causal, correlated = findings(0)
    assert causal.verdict == "causal"
    assert [test.effect < 0 for test in causal.tests] == [True, False], "off takes away, on brings"
    assert all(test.p == 1 / 80 for test in causal.tests), "beyond all 79 controls of both kinds"
    assert causal.curve.trend.p < 0.01
    assert causal.curve.trend.statistic > 0.8
    assert correlated.verdict == "no effect"
    assert min(test.p_holm for test in correlated.tests) > 0.05


@pytest.mark.slow
def test_power_and_error_over_many_networks() -> None:
    """At least 0.9 of the planted causes found, at most alpha of the correlates (and two standard errors)."""
    n = 100
    found = [findings(seed) for seed in range(n)]
    power = np.mean([pair[0].verdict == "causal" for pair in found])
    false = np.mean([pair[1].verdict == "causal" for pair in found])
    assert power >= 0.9
    assert false <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / n)


LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def llama() -> tuple[LlamaForCausalLM, Dictionary, torch.Tensor]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA).eval().requires_grad_(False)
    dictionary = Dictionary(build(TopKConfig(d_in=32, d_sae=64, k=8), seed=0), hook_name="model.layers.1")
    return model, dictionary, torch.randint(64, (3, 10), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_an_intervention_equals_an_edit_of_a_whole_pass(
    llama: tuple[LlamaForCausalLM, Dictionary, torch.Tensor], value: float
) -> None:
    model, dictionary, tokens = llama
    bench, odds = Bench(model, dictionary, tokens, at_once=2), TokenOdds((3, 4))
    latents = [5, 9, 11]
    deltas = [bench.delta(bench.push(i, value), dictionary.W_dec[i]) for i in latents]
    found = list(bench.run(deltas, odds))
    for latent, changed in zip(latents, found, strict=True):
        edit = Zero(latent) if value == 0 else Clamp(latent, value)
        with torch.inference_mode(), dictionary.attach(model, edits=[edit], exclude=Exclude(first=True)):
            whole = odds.read(model(input_ids=tokens, use_cache=False).logits)
        torch.testing.assert_close(changed, whole, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(bench.clean(odds), odds.read(model(input_ids=tokens).logits), atol=1e-5, rtol=1e-5)


def test_an_outcome_at_a_later_layer_ends_the_pass_there(
    llama: tuple[LlamaForCausalLM, Dictionary, torch.Tensor],
) -> None:
    model, dictionary, tokens = llama
    bench, weight = Bench(model, dictionary, tokens), torch.randn(32)
    ran: list[int] = []
    handle = model.model.layers[3].mlp.register_forward_hook(lambda *_: ran.append(1))
    found = bench.clean(Probe("model.layers.2", weight, bias=0.5))
    handle.remove()
    with torch.inference_mode():
        hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states[3]
    torch.testing.assert_close(found, (hidden[:, 1:] @ weight).mean(1) + 0.5, atol=1e-4, rtol=1e-4)
    assert not ran


def test_side_effects_are_those_of_the_textbook(llama: tuple[LlamaForCausalLM, Dictionary, torch.Tensor]) -> None:
    model, _, tokens = llama
    with torch.inference_mode():
        clean = model(input_ids=tokens).logits
    changed = clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    found = SideEffects(tokens, clean).read(changed)
    p, q = clean.softmax(-1), changed.softmax(-1)
    torch.testing.assert_close(found[:, 0], (p * (p / q).log()).sum(-1)[:, 1:].mean(1), atol=1e-4, rtol=1e-4)
    ce = torch.nn.functional.cross_entropy(changed[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(found[:, 1], ce, atol=1e-5, rtol=1e-5)
    assert float(SideEffects(tokens, clean).read(clean)[:, 0].abs().max()) < 1e-6


def test_token_odds_are_log_odds() -> None:
    logits = torch.randn(4, 1, 9)
    p = logits[:, 0].softmax(-1)[:, [2, 7]].sum(-1)
    torch.testing.assert_close(TokenOdds((2, 7)).read(logits), (p / (1 - p)).log(), atol=1e-5, rtol=1e-5)


def test_outcomes_that_are_none_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(UsageError, match=r"raised ZeroDivisionError"):
        Judge(lambda _: 1 / 0).read(torch.zeros(2, 1, 3))
    with pytest.raises(UsageError, match=r"must give 2 finite numbers.*some not finite"):
        Judge(lambda x: x[:, 0] * torch.nan).read(torch.zeros(2, 1, 3))
    with pytest.raises(UsageError, match=r"must give 2 finite numbers.*got shape \(3,\)"):
        Judge(lambda x: x[0]).read(torch.zeros(2, 1, 3))
    with pytest.raises(UsageError, match=r"'river bank' is \d+ tokens"):
        single_tokens(lm.tokenizer, ["river bank"])
    assert single_tokens(lm.tokenizer, ["king", "king"]) == tuple(lm.tokenizer.encode("king", add_special_tokens=False))


def test_a_set_is_switched_as_one_and_finished_tests_are_not_run_again() -> None:
    wired = net(0)
    both = cases(wired, (CORRELATED, CAUSAL))
    done: dict[tuple[int, Any], Measured] = {}
    (found,) = run_family(wired.dictionary, both, on_test=lambda place, test: done.update({(place, test.kind): test}))
    assert found.latents == (CORRELATED, CAUSAL)
    assert found.verdict == "causal"
    again: list[int] = []
    (same,) = run_family(wired.dictionary, both, known=done, on_test=lambda place, _test: again.append(place))
    assert not again
    assert same.tests == found.tests


def test_a_dose_is_chosen_among_those_that_side_effects_allow() -> None:
    wired = net(0)
    (case,) = cases(wired, (CAUSAL,))
    settings = CausalSettings()
    curve = dose_curve(wired.dictionary, case, settings, beyond=0.0)
    assert (np.diff(curve.kl[2:]) > 0).all(), "stronger pushes move the predictions further"
    assert choose_dose(wired.dictionary, case, settings) == curve.window.dose


def test_a_family_without_enough_latents_to_match_says_so() -> None:
    wired = net(0)
    traits = wired.traits._replace(auroc=np.full(len(wired.traits.auroc), 0.9))
    few = [replace(case, traits=traits) for case in cases(wired, (CAUSAL,), (CORRELATED,))]
    with pytest.raises(UsageError, match="needs 79 matched controls, but only 0 latents"):
        run_family(wired.dictionary, few)
