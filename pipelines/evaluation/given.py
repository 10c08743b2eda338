"""What an evaluation is asked about, as its parts hand it on."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.config import EvaluateConfig
from pipelines.models import LanguageModel
from pipelines.selection import Selection
from sae import Dictionary
from storage import ActivationStore


@dataclass(frozen=True)
class Given:
    """What an evaluation is asked about."""

    store: ActivationStore
    lm: LanguageModel
    dictionaries: Mapping[str, Dictionary]
    settings: EvaluateConfig
    sink_multiple: float
    selection: Selection | None
    seed: int
