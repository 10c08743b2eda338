import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from chats import CHATML, HEADERS, INST, letters
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipelines import tokencache, tokenising
from pipelines.chat import ROLES
from pipelines.config import TextSource
from pipelines.corpora import Document
from pipelines.errors import RunError, UsageError
from pipelines.spool import Spool
from pipelines.tokencache import tokenised
from pipelines.tokenising import Encoder, TextTokenizer, cut_batches, tokenising_pool

CHAT = [["system", "Be  brief. "], ["user", "  two\n\n  lines é日本 "], ["assistant", " Hello\n"]]


@pytest.fixture(scope="module")
def tiny(tiny_model):
    """The tiny model's byte-level tokenizer."""
    return AutoTokenizer.from_pretrained(tiny_model)


def encode(hf, kind, contents, template=None):
    tokenizer = TextTokenizer.of(hf, chat_template=template)
    return Encoder(tokenizer, kind).encode([str(i) for i in range(len(contents))], contents)


# -- one batch ---------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_the_hugging_face_tokenizer(tiny):
    texts = ["the king", "a\n\n  b </s> c", "é日本 \u2028", " ", "<s>"]
    found = encode(tiny, "text", [text.encode() for text in texts])
    expected = [tiny(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert found.tokens.tolist() == [id_ for ids in expected for id_ in ids]
    assert found.lengths.tolist() == [len(ids) for ids in expected]
    assert found.texts == texts


@pytest.mark.parametrize("template", [CHATML, INST, HEADERS])
def test_chats_get_the_ids_of_apply_chat_template(tiny, template, monkeypatch):
    messages = [{"role": role, "content": content} for role, content in CHAT]
    found = encode(tiny, "chat", [json.dumps(CHAT).encode()], template)
    (text,) = found.texts
    tiny.chat_template = template
    if "strftime_now" not in template:
        assert text == tiny.apply_chat_template(messages, tokenize=False)
        assert found.tokens.tolist() == list(tiny.apply_chat_template(messages)["input_ids"])
    else:
        assert "26 Jul 2024" in text
    tiny.chat_template = None


@pytest.mark.parametrize("template", [CHATML, INST, HEADERS])
def test_roles_of_byte_level_tokens_cover_exactly_the_messages(tiny, template):
    # Not one space of a message goes to its neighbours: the tokens of a role decode to what was said.
    found = encode(tiny, "chat", [json.dumps(CHAT).encode()], template)
    assert found.role is not None
    assert found.turn is not None
    for turn, (role, content) in enumerate(CHAT):
        chosen = found.role == ROLES[role]
        said = content if template == CHATML else content.strip()
        assert tiny.decode(found.tokens[chosen].tolist()) == said
        assert (found.turn[chosen] == turn).all()
    assert set(found.role.tolist()) == {1, 2, 3, 5}


def test_template_that_writes_bos_twice_gives_it_once():
    hf = letters(bos="<s>")
    found = encode(hf, "chat", [json.dumps([["user", "x"]]).encode()], "{{ bos_token * 3 }}{{ messages[0].content }}")
    assert found.tokens.tolist() == hf("<s>x", add_special_tokens=False)["input_ids"]
    assert found.role.tolist() == [5, 2]


def test_tokenizer_without_a_fast_backend_is_refused():
    with pytest.raises(UsageError, match=r"the tokenizer object is no fast one: give a model with a tokenizer\.json"):
        TextTokenizer.of(object())


def test_fingerprint_follows_the_vocabulary_and_template_sha256_the_template():
    one, two = TextTokenizer.of(letters(template=CHATML)), TextTokenizer.of(letters(template=INST))
    assert one.fingerprint == two.fingerprint != TextTokenizer.of(letters(5999)).fingerprint
    assert one.template_sha256 != two.template_sha256
    assert TextTokenizer.of(letters()).template_sha256 is None


@given(sizes=st.lists(st.integers(0, tokenising.BATCH_BYTES * 2), max_size=60), seed=st.integers(0, 9))
def test_batches_are_the_whole_order_in_bounded_pieces(sizes, seed):
    sizes = np.array(sizes, np.int64)
    order = np.random.default_rng(seed).permutation(len(sizes))
    batches = list(cut_batches(order, sizes))
    assert [row for batch in batches for row in batch.tolist()] == order.tolist()
    for batch in batches:
        assert len(batch) == 1 or sizes[batch].sum() <= tokenising.BATCH_BYTES
        assert 0 < len(batch) <= tokenising.BATCH_DOCUMENTS


# -- processes ---------------------------------------------------------------------------------------------------------


def jsonl(path, n=400, seed=0):
    rng = np.random.default_rng(seed)
    lines = [
        json.dumps({"id": f"d{i}", "text": "".join(map(chr, rng.integers(97, 122, rng.integers(1, 400)))), "t": i % 3})
        for i in range(n)
    ]
    path.write_text("\n".join(lines))
    return TextSource(path=str(path), topic_field="t", columns=("t",))


def files_of(root):
    (entry,) = root.iterdir()
    return {file.name: file.read_bytes() for file in entry.iterdir()}


def test_any_number_of_processes_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(tokencache, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(tokenising, "BATCH_DOCUMENTS", 16)
    source, tokenizer = jsonl(tmp_path / "a.jsonl"), TextTokenizer.of(letters())
    found = []
    for n in (1, 3):
        tokenised(source, tokenizer, budget=50_000, seed=0, n_workers=n, root=tmp_path / str(n))
        found.append(files_of(tmp_path / str(n)))
    assert found[0].keys() == {"tokens.bin", "documents.arrow", "entry.json"}
    assert found[0] == found[1]
    assert len(found[0]["tokens.bin"]) >= 4 * 50_000


def test_killed_process_is_told_plainly(tmp_path):
    spool = Spool.write(tmp_path / "spool.arrow", [])
    with tokenising_pool(TextTokenizer.of(letters()), "text", 2) as pool:
        executor = pool._executor
        executor.submit(os.getpid).result()
        for process in list(executor._processes.values()):
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(RunError, match=r"a process that tokenises was killed, .*: lower collect\.text_workers"):
            list(pool.encode(spool, iter([np.empty(0, np.int64)])))


def test_spool_gives_rows_in_any_order_and_topics_by_name(tmp_path):
    names = ["river", "", "bird", "river", "é", "bird"]
    documents = [
        Document(id=f"d{i}", title=f"t{i}", topic=name, content=name.encode() * i, columns="{}")
        for i, name in enumerate(names)
    ]
    spool = Spool.write(tmp_path / "spool.arrow", iter(documents))
    rows = np.array([5, 0, 3])
    assert len(spool) == 6
    assert spool.read(rows) == (["d5", "d0", "d3"], [documents[row].content for row in rows])
    assert spool.sizes.tolist() == [len(document.content) for document in documents]
    assert np.array(sorted(set(names)))[spool.topics].tolist() == names
    assert len(Spool.write(tmp_path / "empty.arrow", []).topics) == 0


_PEAK = """
import sys, threading, time
sys.path.insert(0, "tests/pipelines")
from pathlib import Path
from chats import letters
from pipelines.config import TextSource
from pipelines.tokencache import tokenised
from pipelines.tokenising import TextTokenizer

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) // 1024

tokenizer = TextTokenizer.of(letters())
tokenised(TextSource(path=sys.argv[1]), tokenizer, budget=1000, seed=1, n_workers=1, root=Path(sys.argv[2]))
before = peak = anonymous()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
found = tokenised(TextSource(path=sys.argv[1]), tokenizer, budget=int(sys.argv[3]), seed=0, n_workers=1,
                  root=Path(sys.argv[2]))
done = True
thread.join()
print(peak - before, len(found.tokens))
"""


@pytest.mark.slow
def test_ten_times_the_text_takes_little_more_memory(tmp_path):
    peaks = []
    for n in (1, 10):
        path = tmp_path / f"{n}.jsonl"
        with path.open("w") as file:
            for i in range(8000 * n):
                file.write(json.dumps({"text": f"{i:08d} {'the quick brown fox ' * 12}"}) + "\n")
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, str(path), str(tmp_path / "cache"), str(1_900_000 * n)],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        peak, n_tokens = map(int, done.stdout.split())
        assert n_tokens >= 1_900_000 * n
        peaks.append(peak)
    # 17 million more tokens are 69 MB as an array and about 700 MB as lists of numbers.
    assert peaks[1] - peaks[0] < 25, peaks


# -- cache -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def built(tmp_path, monkeypatch):
    """A source, a way to read it through the cache, and the cache's folder."""
    monkeypatch.setattr(tokenising, "BATCH_DOCUMENTS", 16)
    source, tokenizer, root = jsonl(tmp_path / "a.jsonl", 300), TextTokenizer.of(letters()), tmp_path / "cache"

    def read(budget=5000, **kw):
        return tokenised(**({"source": source, "tokenizer": tokenizer, "seed": 0, "root": root} | kw), budget=budget)

    return source, read, root


@pytest.fixture
def counted(monkeypatch):
    """How often a source was read."""
    reads = []
    real = tokencache.documents_of
    monkeypatch.setattr(tokencache, "documents_of", lambda *a, **kw: reads.append(1) or real(*a, **kw))
    return reads


def content(found):
    return found.tokens.tolist(), found.documents.to_pylist()


def test_second_reading_comes_from_the_cache(built, counted):
    _, read, _ = built
    first = content(read())
    assert content(read()) == first
    assert len(counted) == 1
    assert sum(document["n_tokens"] for document in first[1]) == len(first[0]) >= 5000


def test_smaller_budget_is_a_prefix_and_a_larger_one_goes_on(built, counted):
    _, read, root = built
    middle, small = content(read(20_000)), content(read(3000))
    assert len(counted) == 1
    large = content(read(50_000))
    assert len(counted) == 2
    for less, more in ((small, middle), (middle, large)):
        assert less[0] == more[0][: len(less[0])]
        assert less[1] == more[1][: len(less[1])]
    shutil.rmtree(root)
    assert content(read(3000)) == small  # whatever the cache holds


def test_anything_that_changes_the_bytes_is_another_entry(built, counted, tmp_path):
    source, read, root = built
    read()
    read(tokenizer=TextTokenizer.of(letters(template=CHATML)))  # the same ids
    assert len(counted) == 1
    read(tokenizer=TextTokenizer.of(letters(5999)))
    read(seed=1)
    read(index=1)
    read(source=source.model_copy(update={"columns": ()}))
    read(source=source.model_copy(update={"topic_field": None}))
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("d1", "e1"))
    read()
    assert len(counted) == len(list(root.iterdir())) == 7
    read(source=source.model_copy(update={"weight": 2.0, "id": "other"}))
    assert len(counted) == 7


@pytest.mark.parametrize("name", ["tokens.bin", "documents.arrow", "entry.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_entry_is_made_again(built, counted, name, damage):
    _, read, root = built
    whole = content(read())
    (entry,) = root.iterdir()
    file = entry / name
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(data[:-9])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert content(read()) == whole
    assert len(counted) == 2
    (again,) = root.iterdir()
    assert {f.name for f in again.iterdir()} == {"tokens.bin", "documents.arrow", "entry.json"}


def test_failed_reading_leaves_nothing_behind(built, tmp_path):
    _, read, root = built
    (tmp_path / "a.jsonl").write_text('{"text": "fine", "t": 0}\n{"text": 3, "t": 0}\n')
    with pytest.raises(UsageError, match="is int, not text"):
        read()
    (tmp_path / "a.jsonl").write_text('{"text": " ", "t": 0}\n')
    with pytest.raises(UsageError, match=r"text source .*a\.jsonl has no documents with text"):
        read()
    assert list(root.iterdir()) == []


def test_source_that_is_too_short_is_not_read_again(built, counted):
    _, read, _ = built
    for _ in range(2):
        with pytest.raises(UsageError, match=r"tokens, the config asks for 10,000,000: lower collect\.n_tokens"):
            read(10_000_000)
    assert len(counted) == 1


def test_stream_is_read_no_further_than_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(tokencache, "STREAM_BLOCK", 50)
    seen = []

    def endless(source, **_):
        for i in range(10**9):
            seen.append(i)
            yield tokencache_document(i)

    monkeypatch.setattr(tokencache, "documents_of", endless)
    source = TextSource(dataset="someone/texts", revision="0" * 40)
    tokenizer = TextTokenizer.of(letters())
    few = tokenised(source, tokenizer, budget=900, seed=0, root=tmp_path / "few")
    assert len(seen) == 100
    many = tokenised(source, tokenizer, budget=4000, seed=0, root=tmp_path / "many")
    assert content(few)[1] == content(many)[1][:90]
    ids = [int(document["id"]) for document in content(many)[1]]
    assert sorted(ids[:50]) == list(range(50)) != ids[:50]


def tokencache_document(i):
    return Document(id=str(i), title=str(i), topic="", content=b"0123456789", columns="{}")
