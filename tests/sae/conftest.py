"""Fixtures of the tests of `sae`."""

import pytest

from sae import Dictionary


@pytest.fixture
def no_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where `pipelines.hub` is not imported; the test session may have done so."""
    monkeypatch.setattr(Dictionary, "_resolver", None)
