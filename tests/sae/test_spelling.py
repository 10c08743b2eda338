import pytest

from sae.spelling import Speller

TEXTS = [
    "the river flows near an old bridge.",
    "a 🌊 wave, 👩‍🔬 and é, naïve",
    "نهر قديم near נהר",
    "川の流れ\n\tタブ  two  spaces",
    "\x00\x1b[31m\u202eevil\u202c",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = Speller(tokenizer).spell(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_belongs_to_its_first_token(tokenizer):
    ids = tokenizer("🌊", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4  # one for each byte
    assert Speller(tokenizer).spell(ids) == ["🌊", "", "", ""]
    assert Speller(tokenizer).spell(ids[1:]) == ["\ufffd"] * 3
    assert Speller(tokenizer).spell([*ids[:2], *ids]) == ["\ufffd", "\ufffd", "🌊", "", "", ""]
    assert Speller(tokenizer).piece(ids[0]) == "\ufffd"


def test_pieces_are_the_strings_of_the_vocabulary(tokenizer, tiny_model):
    from pipelines.config import ModelConfig
    from pipelines.models import LanguageModel, resolve_model

    config = ModelConfig(source=str(tiny_model), dtype="float32", device="cpu")
    strings = LanguageModel(resolve_model(config), config).token_strings()
    speller = Speller(tokenizer)
    assert [speller.piece(token) for token in range(len(strings))] == strings


def test_an_id_without_a_token_is_named(tokenizer):
    assert Speller(tokenizer).spell([10**6]) == ["<unused 1000000>"]


def test_a_tokenizer_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="must have convert_ids_to_tokens and convert_tokens_to_string"):
        Speller(object())
