import html
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from chats import CHATML
from typer.testing import CliRunner, Result

from pipelines.cli import app
from pipelines.errors import UsageError
from pipelines.inspection import inspect_text, open_dictionary, read_messages
from pipelines.models import LanguageModel
from pipelines.run import Run, save_config
from sae import Dictionary

TEXT = "the old river flows near a bridge 🌊 نهر"
HOSTILE = "[red]x[/red] [link=http://a.b]y \x1b[31m\u202e</script><b>"


@pytest.fixture
def folder(trained: Run, tmp_path: Path) -> Path:
    """A dictionary folder with a feature table whose labels are hostile, and with pages."""
    dictionary = Dictionary.load(trained.dir.trained("main"))
    labels = [HOSTILE + str(i) if i % 2 else None for i in range(dictionary.d_sae)]
    features = pa.table({"latent": list(range(dictionary.d_sae)), "label": labels})
    place = dictionary.save(tmp_path / "a folder", features=features)
    (place / "pages").mkdir()
    (place / "pages" / "feature.html").touch()
    return place


def inspected(*arguments: object, **options: object) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], **options)


def test_every_token_has_what_the_dictionary_gives(folder: Path, lm: LanguageModel):
    opened = open_dictionary(str(folder))
    shown = inspect_text(opened, lm, text=TEXT, n=4)
    assert "".join(token.piece for token in shown.tokens) == TEXT
    ids = torch.tensor([[token.token_id for token in shown.tokens]])
    (hook,) = opened.dictionary.hook_names
    captured = lm.capture(ids, torch.arange(ids.shape[1])[None], [hook])  # another way to the same activations
    latents = opened.dictionary.encode(captured[hook])[0]
    assert not shown.tokens[0].counted
    for token in shown.tokens[1:]:
        values, order = latents[token.position].topk(4)
        assert [found.latent for found in token.firings] == order[values > 0].tolist()
        torch.testing.assert_close(torch.tensor([f.activation for f in token.firings]), values[values > 0])


def test_json_has_every_token_with_labels_and_links(folder: Path):
    done = inspected(folder, "--text", TEXT, "--json")
    assert done.exit_code == 0, done.output
    tokens = json.loads(done.stdout)["tokens"]
    assert "".join(token["text"] for token in tokens) == TEXT
    found = [latent for token in tokens for latent in token["latents"]]
    assert len(found) > 20
    for one in found:
        assert one["label"] == (HOSTILE + str(one["latent"]) if one["latent"] % 2 else None)
        assert one["page"] == f"{(folder / 'pages' / 'feature.html').as_uri()}#{one['latent']}"


def test_the_table_shows_tokens_and_labels_as_they_are(folder: Path):
    done = inspected(folder, "--text", f"river {HOSTILE}", "--labelled")
    assert done.exit_code == 0, done.output
    assert "[red]x[/red] [link=http://a.b]y ⟨001B⟩[31m⟨202E⟩</script><b>" in done.stdout
    assert not {"\x1b", "\u202e"} & set(done.stdout)
    assert "strongest in the text" in done.stdout
    assert "training left it out" in done.stdout


def test_a_page_is_written_instead(folder: Path, tmp_path: Path):
    done = inspected(folder, "--text", TEXT, "--html", tmp_path / "out.html")
    assert (done.exit_code, done.stdout) == (0, f"wrote {tmp_path / 'out.html'}\n")
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "<b>" not in page
    assert html.escape("</script><b>") in page
    assert "نهر"[0] in page


def test_a_chat_goes_through_the_template_and_has_its_authors(trained: Run, folder: Path, lm: LanguageModel):
    opened = open_dictionary(str(folder))._replace(chat_template=CHATML)
    messages = read_messages(json.dumps([{"role": "user", "content": "old river"}]))
    shown = inspect_text(opened, lm, messages=messages)
    assert "".join(token.piece for token in shown.tokens).endswith("<|im_start|>user\nold river<|im_end|>\n")
    said = "".join(token.piece for token in shown.tokens if token.role == "user")
    assert said.strip() == "old river"
    assert {token.role for token in shown.tokens} == {"user", "template"}
    with pytest.raises(UsageError, match="has no chat template: give --text"):
        inspect_text(open_dictionary(str(folder)), lm, messages=messages)


def test_messages_may_be_a_file(tmp_path: Path):
    file = tmp_path / "chat.json"
    file.write_text(json.dumps([{"role": "user", "content": "نهر"}]), encoding="utf-8")
    assert read_messages(str(file)) == [["user", "نهر"]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.json", "must be JSON or a file, but 'nowhere.json' is neither"),
        ("[{]", "--messages is not valid JSON"),
        ('{"role": "user"}', "must be a list"),
        ('[{"role": "usr", "content": "x"}]', "has the role 'usr'; the nearest"),
        ('[{"role": "user", "content": " "}]', "has an empty content"),
        ("[]", "1 to"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_messages_that_are_none_are_a_clear_error(given: str, message: str):
    with pytest.raises(UsageError, match=message):
        read_messages(given)


def test_a_file_of_messages_that_is_not_utf8_is_a_clear_error(tmp_path: Path):
    (tmp_path / "chat.json").write_bytes(b"[\xff]")
    with pytest.raises(UsageError, match=r"not UTF-8 \(byte 1\)"):
        read_messages(str(tmp_path / "chat.json"))


def test_a_run_directory_is_a_dictionary_with_its_model(trained: Run, run: Run, folder: Path):
    save_config(run)
    done = inspected(run.dir.path, "--text", "river")
    assert done.exit_code == 1
    assert "run `sae export" in done.output
    shutil.copytree(folder, run.dir.dictionary("main"))
    opened = open_dictionary(str(run.dir.path))
    assert opened.model == run.config.model
    assert opened.dictionary.d_sae == 96
    with pytest.raises(UsageError, match="no SAE 'other', only main"):
        open_dictionary(str(run.dir.path), sae="other")


def test_the_text_may_come_from_standard_input(folder: Path):
    done = inspected(folder, "--text", "-", "--json", input=TEXT.encode())
    assert "".join(token["text"] for token in json.loads(done.stdout)["tokens"]) == TEXT
    broken = inspected(folder, "--text", "-", input=b"ab\xff")
    assert broken.exit_code == 2
    assert "standard input is not UTF-8 (byte 2)" in broken.output


def test_a_long_text_is_cut_and_says_so(folder: Path):
    done = inspected(folder, "--text", "river " * 2000, "--max-tokens", 20)
    assert done.exit_code == 0
    assert "tokens were not read. Raise --max-tokens to read them." in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --text and --messages"),
        (("--text", "a", "--messages", "[]"), "give one of --text and --messages"),
        (("--text", ""), "the text is empty"),
        (("--text", "a\udcff"), r"--text is not UTF-8 (character 1)"),
        (("--text", "a", "--sae", "x"), "is not a run directory"),
        (("--text", "a", "--hook", "model.layers.77"), "model.layers.77"),
        (("--text", "a", "--model", "no/where"), "no/where"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_2(folder: Path, arguments: tuple[str, ...], message: str):
    done = inspected(folder, *arguments)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_a_dictionary_that_says_nothing_is_asked_about(folder: Path, lm: LanguageModel, tmp_path: Path):
    silent = Dictionary(Dictionary.load(folder).sae).save(tmp_path / "silent")
    assert "give --hook" in inspected(silent, "--text", "a").output
    assert "give --model" in inspected(silent, "--text", "a", "--hook", "model.layers.1").output
    done = inspected(silent, "--text", "a river", "--hook", "model.layers.1", "--model", lm.model_id)
    assert done.exit_code == 0, done.output
    assert "unlabelled" in done.stdout
    assert inspected(tmp_path / "nothing", "--text", "a").exit_code == 2
