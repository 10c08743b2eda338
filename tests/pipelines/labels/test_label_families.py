import numpy as np
import pytest

from pipelines.labels.families import SHAPES, TokenTable, build_families

STRINGS = [" batt", "alion", " Batt", ".", " 1", "9", "\n", " naïve", "<|end|>", " NATO", "the"]


def table(token, document=None, position=None, usable=None, length=None, n_train=None):
    token = np.array(token, np.int32)
    n = len(token)
    return TokenTable(
        token=token,
        document=np.array(document if document is not None else [0, 1] * (n // 4) + [2, 3] * (n // 4), np.int32),
        position=np.array(position if position is not None else np.arange(n), np.int32),
        usable=np.ones(n, bool) if usable is None else np.array(usable),
        context_length=length or n,
        n_train=n // 2 if n_train is None else n_train,
    )


def by_name(families):
    return {family.name: family for family in families}


def reads(family):
    return [family.names[code] for code in family.code]


def test_token_family_folds_case_and_space_and_shows_the_commonest_spelling():
    family = by_name(build_families(table([0, 2, 2, 3, 2, 0, 3, 3]), STRINGS))["token"]
    assert family.code[0] == family.code[1] != family.code[3]
    assert reads(family)[:4] == [" Batt", " Batt", " Batt", "."]


def test_word_family_joins_the_pieces_of_a_word():
    family = by_name(build_families(table([0, 1, 3, 1, 4, 5, 0, 1]), STRINGS))["word"]
    assert reads(family) == [" batt", " battalion", ".", "alion", " 1", " 19", " batt", " battalion"]
    assert family.code[1] == family.code[7]


def test_word_family_does_not_join_across_documents_or_contexts():
    across_pieces = by_name(build_families(table([0, 1, 0, 1], position=[0, 0, 1, 2]), STRINGS))["word"]
    assert reads(across_pieces)[:2] == [" batt", "alion"]
    across_contexts = by_name(build_families(table([0, 0, 1, 1], position=[0, 1, 2, 3], length=2), STRINGS))["word"]
    assert reads(across_contexts)[1:3] == [" batt", "alion"]


def test_word_family_bounds_the_pieces_of_one_word():
    family = by_name(build_families(table([0] + [1] * 11), STRINGS))["word"]
    assert reads(family)[7] == " batt" + "alion" * 7
    assert reads(family)[8] == "alion"


def test_previous_family_names_the_token_before_and_the_start_of_a_document():
    family = by_name(build_families(table([0, 1, 3, 4], position=[0, 1, 0, 1]), STRINGS))["previous"]
    assert reads(family) == ["the start of a document", " batt", "the start of a document", "."]


def test_shape_family_tells_kinds_of_token_apart():
    tokens = [0, 1, 2, 3, 4, 6, 7, 8, 9, 3, 10, 3]
    family = by_name(build_families(table(tokens), STRINGS))["shape"]
    assert reads(family) == [
        "lower-case words",
        "pieces inside a word",
        "capitalised words",
        "punctuation",
        "numbers",
        "white space",
        "lower-case words",
        "other symbols",
        "words in capitals",
        "punctuation",
        "lower-case words",
        "punctuation",
    ]
    assert set(reads(family)) == set(SHAPES)


def test_position_family_bins_the_distance_from_the_start():
    family = by_name(build_families(table([3] * 8, position=[0, 1, 2, 3, 4, 7, 8, 900]), STRINGS))["position"]
    assert reads(family) == ["0", "1", "2", "3", "4 to 7", "4 to 7", "8 to 15", "256 and later"]


@pytest.mark.parametrize("strings", [["�", " ‮שלום", "🙂", "ـه", "\x00", "", " ", "ﬀ"]])
def test_families_accept_any_text_a_tokenizer_yields(strings):
    families = build_families(table(list(range(8))), strings)
    assert all(family.code.min() >= 0 and family.code.max() < len(family.names) for family in families)


def test_tokens_that_are_part_of_a_character_are_not_confused():
    family = build_families(table([0, 1, 2, 2]), ["\ufffd", "\ufffd", "x"])[0]
    assert reads(family) == ["<bytes 0>", "<bytes 1>", "x", "x"]


def test_families_refuse_a_token_without_a_string():
    with pytest.raises(ValueError, match="id 11 and the tokenizer has 11"):
        build_families(table([0, 1, 2, 11]), STRINGS)


def test_table_refuses_a_document_in_both_splits():
    with pytest.raises(ValueError, match=r"must not share documents, but 1 are in both \(first: row 1\)"):
        table([0, 1, 2, 3], document=[0, 1, 1, 2])


def test_table_ignores_padding_when_it_compares_splits():
    made = table([0, 1, 2, 3, 4, 5], document=[0, 1, -1, -1, 2, 3], usable=np.array([1, 1, 0, 0, 1, 1], bool))
    assert made.rows("train").tolist() == [0, 1]
    assert made.rows("heldout").tolist() == [4, 5]


def test_table_refuses_too_few_documents():
    with pytest.raises(ValueError, match="at least 2 held-out documents with usable tokens, but there are 1"):
        table([0, 1, 2, 3], document=[0, 1, 2, 2])


def test_table_refuses_columns_of_different_length():
    with pytest.raises(ValueError, match="one entry per token: token has 4"):
        table([0, 1, 2, 3], position=[0, 1])


def test_table_refuses_partial_contexts():
    with pytest.raises(ValueError, match="4 tokens are not whole contexts of 3"):
        table([0, 1, 2, 3], length=3)


def test_rows_refuses_an_unknown_split():
    with pytest.raises(ValueError, match="'train' or 'heldout', got 'test'"):
        table([0, 1, 2, 3]).rows("test")
