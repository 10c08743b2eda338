"""Which language model a dictionary belongs to: what its provenance says, or what the user says."""

from pipelines.config import ModelConfig
from pipelines.errors import UsageError
from pipelines.models import load_tokenizer, resolve_settings
from sae import Dictionary
from sae.spelling import Speller


def model_of(dictionary: Dictionary, given: str | None = None) -> ModelConfig:
    """The dictionary's model; `given` replaces what it records.

    Raises:
        UsageError: neither says.
    """
    recorded = dictionary.provenance.get("model")
    recorded = recorded if isinstance(recorded, dict) else {}
    source = given or recorded.get("source") or _name(dictionary)
    if source is None:
        raise UsageError("the dictionary does not say which model it belongs to: give --model")
    revision = None if given else recorded.get("revision")
    dtype = dictionary.provenance.get("dtype")
    precision = {"dtype": dtype} if dtype in ("bfloat16", "float16", "float32") else {}
    return ModelConfig(source=source, revision=revision, **precision)


def _name(dictionary: Dictionary) -> str | None:
    name = dictionary.provenance.get("model_name") or dictionary.metadata.get("model_name")
    return name if isinstance(name, str) and name else None


def speller_of(model: ModelConfig) -> Speller:
    """Spells the tokens of a model; its weights are not loaded.

    Raises:
        UsageError: there is no such model, or no tokenizer with it.
    """
    return Speller(load_tokenizer(resolve_settings(model), model.trust_remote_code))
