import html.parser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from sae import Dictionary, JumpReLUConfig, TopKConfig, build
from sae.rendering import html_page, plain_text

HOOK = "model.layers.1"
HOSTILE = "</span><script>alert(1)</script>\" onmouseover='x' \x1b[31m\u202eevil\u202c & <b>"
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def plain(d_in: int = 32, **metadata: Any) -> Dictionary:
    """Without provenance, labels or a folder."""
    return Dictionary(build(TopKConfig(d_in=d_in, d_sae=96, k=8), seed=0), hook_name=HOOK, metadata=metadata)


def labelled(folder: Path, label: str = "a river", pages: bool = False) -> Dictionary:
    """Even latents have labels; odd ones fire on a token that is known."""
    features = pa.table(
        {
            "latent": list(range(96)),
            "label": [f"{label} {i}" if i % 2 == 0 else None for i in range(96)],
            "top_tokens": [[f" word{i}", HOSTILE] for i in range(96)],
        }
    )
    plain().save(folder, features=features)
    if pages:
        (folder / "pages").mkdir()
        (folder / "pages" / "feature.html").touch()
    return Dictionary.load(folder)


class Elements(html.parser.HTMLParser):
    """What a browser would make of it: tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_firings_are_the_strongest_of_what_attach_reads(model, tokenizer):
    dictionary = plain()
    text = "the old river flows near a bridge and the king is in check"
    shown = dictionary.show(text, model, tokenizer, n=4)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with dictionary.attach(model) as tap, torch.no_grad():
        model(ids)
    assert [token.token_id for token in shown.tokens] == ids[0].tolist()
    for token in shown.tokens[1:]:
        values, latents = tap.latents[0, token.position].topk(4)
        assert [f.latent for f in token.firings] == latents.tolist()
        torch.testing.assert_close(torch.tensor([f.activation for f in token.firings]), values)
        assert token.n_active == int((tap.latents[0, token.position] > 0).sum()) == 8
    first = shown.tokens[0]
    assert (first.counted, first.firings, first.n_active) == (False, (), 0)


def test_tokens_that_training_left_out_have_no_latents(model, tokenizer):
    dictionary = plain()
    ids = tokenizer("river bank king rook", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with dictionary.attach(model) as tap, torch.no_grad():
        model(ids)
    norms = tap.x[0].norm(dim=-1)
    limit = float(norms[1:].median())
    dictionary.provenance |= {"sink_multiple": 1.0, "median_norm": limit}
    shown = dictionary.show(ids, model, tokenizer)
    counted = [token.counted for token in shown.tokens]
    assert counted == [False, *(norms[1:] <= limit).tolist()]
    assert 0 < sum(counted) < len(counted) - 1
    assert "training left it out" in str(shown)


def test_strongest_latents_of_the_text_are_each_named_once(model, tokenizer):
    shown = plain().show("the old river flows near a bridge 🌊 and a song", model, tokenizer, n=8)
    best: dict[int, float] = {}
    for token in shown.tokens:
        for firing in token.firings:
            best[firing.latent] = max(best.get(firing.latent, 0.0), firing.activation)
    found = shown.strongest(6)
    assert [f.activation for f, _ in found] == sorted(best.values(), reverse=True)[:6]
    assert len({f.latent for f, _ in found}) == 6
    assert all(token.piece for _, token in found)  # the token that begins the character


def test_any_text_is_shown_whole(model, tokenizer):
    for text in ("a 🌊 wave", "نهر قديم", "עולם\n\ttab", "\x00\x1b[31m", "é" * 20):
        shown = plain().show(text, model, tokenizer)
        assert "".join(token.piece for token in shown.tokens) == text
        assert Elements(shown._repr_html_()).text.replace("⟨", "").strip()


def test_labels_and_pages_are_shown_where_there_are_any(model, tokenizer, tmp_path):
    text = "the old river flows near a bridge"
    shown = labelled(tmp_path / "with pages", pages=True).show(text, model, tokenizer, n=8)
    latents = {f.latent for token in shown.tokens for f in token.firings}
    assert dict(shown.labels) == {i: f"a river {i}" for i in latents if i % 2 == 0}
    link = (tmp_path / "with pages" / "pages" / "feature.html").as_uri()
    some = max(latents)
    assert shown.page_of(some) == f"{link}#{some}"
    assert f'href="{link}#{some}"' in shown._repr_html_()
    odd = next(i for i in latents if i % 2)
    assert f"unlabelled; on ␣word{odd}" in str(shown)
    only = labelled(tmp_path / "no-pages").show(text, model, tokenizer, n=8, labelled=True)
    assert {f.latent for token in only.tokens for f in token.firings} == {i for i in latents if i % 2 == 0}
    assert [token.n_active for token in only.tokens] == [token.n_active for token in shown.tokens]
    assert only.page_of(some) is None
    bare = plain().show(text, model, tokenizer)
    assert dict(bare.labels) == {}
    assert "unlabelled" in str(bare)
    assert "none of them labelled" in str(plain().show(text, model, tokenizer, labelled=True))


def test_a_dictionary_of_another_tool_is_shown(model, tokenizer, tmp_path):
    sae = build(JumpReLUConfig(d_in=32, d_sae=64), seed=0)
    Dictionary(sae, hook_name="blocks.1.hook_resid_post", metadata={"prepend_bos": True}).save(tmp_path / "d")
    (tmp_path / "d" / "dictionary.json").unlink()  # what is left is SAELens's own layout
    foreign = Dictionary.load(tmp_path / "d")
    assert not foreign.provenance
    shown = foreign.show("the river", model, tokenizer)
    assert shown.tokens[0].piece == "<s>"
    assert "".join(token.piece for token in shown.tokens[1:]) == "the river"
    assert any(token.firings for token in shown.tokens)


def test_chats_go_through_the_template(model, tokenizer):
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "flows"}]
    shown = plain().show(messages, model, tokenizer)
    assert "".join(token.piece for token in shown.tokens) == "user: the river\nassistant: flows\n"


def test_a_long_text_is_cut_and_says_so(model, tokenizer):
    shown = plain().show("river " * 700, model, tokenizer, max_tokens=40)
    n = len(tokenizer("river " * 700, add_special_tokens=False)["input_ids"])
    assert (len(shown.tokens), shown.n_left_out) == (40, n - 40)
    assert f"last {n - 40:,} tokens were not read" in str(shown)
    whole = plain().show("river " * 700, model, tokenizer, max_tokens=10**6)
    assert len(whole.tokens) == 256  # the positions that this model has
    assert whole.n_left_out == n - 256


def test_hostile_texts_and_labels_are_shown_and_do_nothing(model, tokenizer, tmp_path):
    dictionary = labelled(tmp_path / "d", label=HOSTILE)
    shown = dictionary.show(HOSTILE, model, tokenizer, n=8)
    assert "".join(token.piece for token in shown.tokens) == HOSTILE
    table = plain_text(shown)
    assert not {"\x1b", "\u202e"} & set(table)
    assert "⟨001B⟩" in table
    page = Elements(html_page(shown, HOSTILE))
    assert not {"script", "b", "img"} & set(page.tags)
    assert {name for name, _ in page.attributes} <= {
        *("lang", "charset", "name", "content", "http-equiv", "class", "dir", "style", "title")
    }
    assert page.text.count("<script>alert(1)</script>") > 3
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_the_same_is_had_as_json_values(model, tokenizer, tmp_path):
    import json

    shown = labelled(tmp_path / "d", pages=True).show("the old river", model, tokenizer, n=2)
    values = json.loads(json.dumps(shown.to_dict()))
    assert [token["text"] for token in values["tokens"]] == [token.piece for token in shown.tokens]
    firing = values["tokens"][-1]["latents"][0]
    assert firing["latent"] == shown.tokens[-1].firings[0].latent
    assert firing["page"].endswith(f"feature.html#{firing['latent']}")
    assert values["n_left_out"] == 0
    assert "role" not in values["tokens"][0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one token, got ''"),
        ([], r"at least one token, got \[\]"),
        ("a \ud83c b", "valid Unicode, but character 2 is half of a pair"),
        (torch.zeros(3), "must be integers of one text"),
        (torch.zeros(2, 3, dtype=torch.long), "must be integers of one text"),
        ([{"role": "user"}], r"a list of \{'role', 'content'\}, but one"),
        ([{"role": "user", "content": "hi"}], "has none. Pass the text itself"),
    ],
)
def test_a_text_that_cannot_be_shown_is_a_clear_error(model, tokenizer, text, message):
    with pytest.raises(ValueError, match=message):
        plain().show(text, model, tokenizer)


def test_what_does_not_fit_is_a_clear_error(model, tokenizer):
    with pytest.raises(ValueError, match="A tokenizer is needed"):
        plain().show("river", model)
    with pytest.raises(ValueError, match="must have width d_in=16"):
        plain(d_in=16).show("river", model, tokenizer)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        plain().show("river", model, tokenizer, n=0)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        plain().show("river", object(), tokenizer)
