"""The dictionary folder: a round trip for every architecture, each kind of damage, and SAELens reading it."""

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import ALL, batch, random_sae
from safetensors.torch import load_file, save_file

from sae import Dictionary, SAEConfig, TranscoderConfig

CONFIGS = [ALL["topk"], ALL["batchtopk"], ALL["jumprelu"]]
GOLDEN = Path(__file__).parent / "golden"
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where `pipelines.hub` is not imported; the test session may have done so."""
    monkeypatch.setattr(Dictionary, "_resolver", None)


def saved(folder: Path, config: SAEConfig = CONFIGS[1]) -> Path:
    dictionary = Dictionary(random_sae(config), hook_name="model.layers.8", metadata={"model_name": "tiny"})
    return dictionary.save(
        folder / "main", provenance={"run": "r1"}, metrics={"fvu": 0.25}, sparsity=torch.linspace(0, 1, 24)
    )


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_dictionary_round_trips(config: SAEConfig, tmp_path: Path) -> None:
    loaded = Dictionary.load(saved(tmp_path, config))
    sae = random_sae(config)
    (x,) = batch(config)[:1] if config.d_in == 6 else (torch.cat(batch(config), dim=1),)
    assert loaded.config == config
    assert int(loaded.encode(x).count_nonzero()) > 0
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert torch.equal(loaded.decode(loaded.encode(x)), sae.decode(sae.encode(x)))
    assert torch.equal(loaded.sae(x).x_hat, sae(x).x_hat)
    assert (loaded.hook_name, loaded.d_in, loaded.d_sae) == ("model.layers.8", config.d_in, 24)
    assert (loaded.provenance, loaded.metrics) == ({"run": "r1"}, {"fvu": 0.25})
    assert loaded.metadata["model_name"] == "tiny"
    assert torch.equal(loaded.W_dec, sae.W_dec)
    assert not loaded.encode(x).requires_grad
    assert loaded.features is None


def test_dictionary_saved_again_is_the_same_folder(tmp_path: Path) -> None:
    first = saved(tmp_path)
    again = Dictionary.load(first).save(tmp_path / "again")
    for name in ("cfg.json", "sae_weights.safetensors", "dictionary.json"):
        assert (again / name).read_bytes() == (first / name).read_bytes(), name


def test_dictionary_writes_the_layout_that_saelens_reads(tmp_path: Path) -> None:
    """Batchtopk appears as jumprelu with one threshold per latent; the version keeps SAELens from its old-file path."""
    folder = saved(tmp_path)
    cfg = json.loads((folder / "cfg.json").read_text())
    metadata = cfg.pop("metadata")
    assert cfg == {
        "architecture": "jumprelu",
        "d_in": 6,
        "d_sae": 24,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    assert metadata == {
        "sae_lens_version": "6.54.12",
        "training_architecture": "batchtopk",
        "model_name": "tiny",
        "hook_name": "blocks.8.hook_resid_post",
        "hf_hook_name": "model.layers.8",
    }
    tensors = load_file(folder / "sae_weights.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "W_enc": (6, 24),
        "b_enc": (24,),
        "W_dec": (24, 6),
        "b_dec": (6,),
        "threshold": (24,),
    }
    sparsity = load_file(folder / "sparsity.safetensors")["sparsity"]
    torch.testing.assert_close(sparsity, (torch.linspace(0, 1, 24) + 1e-10).log10())
    record = json.loads((folder / "dictionary.json").read_text())
    assert record["schema_version"] == 1
    assert record["config"] == {"architecture": "batchtopk", "d_in": 6, "d_sae": 24, "k": 3}
    assert record["sha256"]["cfg.json"] == hashlib.sha256((folder / "cfg.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_golden_folders_of_schema_1_still_load(architecture: str) -> None:
    expected = load_file(GOLDEN / "schema1.safetensors")
    dictionary = Dictionary.load(GOLDEN / f"schema1-{architecture}")
    assert dictionary.config.architecture == architecture
    torch.testing.assert_close(dictionary.encode(expected["x"]), expected[architecture])


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu"])
def test_folder_written_by_saelens_loads_and_encodes_as_there(architecture: str) -> None:
    folder = GOLDEN / f"saelens-{architecture}"
    expected = load_file(folder / "expected.safetensors")
    dictionary = Dictionary.load(folder)
    torch.testing.assert_close(dictionary.encode(expected["x"]), expected["latent_acts"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dictionary.decode(expected["latent_acts"]), expected["x_hat"], atol=1e-5, rtol=1e-5)
    assert dictionary.hook_name == "model.layers.8"


SAELENS_KNOWS = [
    name for name in ALL if not name.startswith("crosscoder") and name not in ("transcoder_topk", "matryoshka_sampled")
]
NORMALISED = {"topk_layer_norm": "layer_norm", "topk_constant_norm": "constant_norm_rescale"}
SAELENS_SCRIPT = """
import sys, torch
from pathlib import Path
from sae_lens import SAE
from safetensors.torch import load_file, save_file
x = load_file(Path(sys.argv[1]) / "x.safetensors")["x"]
for name in sys.argv[2:]:
    sae = SAE.load_from_disk(str(Path(sys.argv[1]) / name))
    tensors = {"f": sae.encode(x)}
    if "norm" not in name:  # there, decoding needs what the last encoding left behind
        tensors["x_hat"] = sae.decode(tensors["f"])
    tensors["output"] = sae(x)
    tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, Path(sys.argv[1]) / f"{name}.safetensors")
"""


def test_saelens_loads_the_folders_and_computes_the_same(tmp_path: Path) -> None:
    """One process for all, since importing SAELens takes longer than everything else."""
    python = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
    if not python.exists():
        pytest.skip("needs sae-lens in .venv-peers; `make peers` builds it")
    saes = {name: random_sae(ALL[name]) for name in SAELENS_KNOWS}
    for name, skip in (("transcoder_jumprelu", False), ("transcoder_jumprelu_skip", True)):
        saes[name] = random_sae(TranscoderConfig(d_in=6, d_out=5, d_sae=24, activation="jumprelu", skip=skip))
    for name, how in NORMALISED.items():
        saes[name] = random_sae(ALL["topk"])
        saes[name].token_norm = how
    for name, sae in saes.items():
        Dictionary(sae, hook_name="model.layers.8").save(tmp_path / name)
    save_file({"x": X}, tmp_path / "x.safetensors")
    command = [str(python), "-c", SAELENS_SCRIPT, str(tmp_path), *saes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, sae in saes.items():
        theirs = load_file(tmp_path / f"{name}.safetensors")
        with torch.no_grad():
            ours = {"f": sae.encode(X), "output": sae(X).x_hat}
            if name not in NORMALISED:
                ours["x_hat"] = sae.decode(ours["f"])
        assert theirs.keys() == ours.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(theirs[key], tensor, atol=1e-5, rtol=1e-5, msg=f"{name}: {key}")


# ---- what a reader does with foreign settings ----------------------------------------------------------------------


def foreign(folder: Path, change: Callable[[dict[str, object], dict[str, torch.Tensor]], None]) -> Path:
    """A folder without dictionary.json, as SAELens writes it, after `change` to its configuration and tensors."""
    path = saved(folder, CONFIGS[0])
    (path / "dictionary.json").unlink()
    cfg, tensors = json.loads((path / "cfg.json").read_text()), load_file(path / "sae_weights.safetensors")
    change(cfg, tensors)
    (path / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors, path / "sae_weights.safetensors")
    return path


def test_encoder_without_b_dec_is_folded(tmp_path: Path) -> None:
    path = foreign(tmp_path, lambda cfg, tensors: cfg.update(apply_b_dec_to_input=False))
    sae = random_sae(CONFIGS[0])
    with torch.no_grad():
        expected = sae.activate(X @ sae.W_enc + sae.b_enc)
    torch.testing.assert_close(Dictionary.load(path).encode(X), expected, atol=1e-5, rtol=1e-5)


def test_rescaling_by_decoder_norm_is_folded(tmp_path: Path) -> None:
    path = foreign(tmp_path, lambda cfg, tensors: cfg.update(rescale_acts_by_decoder_norm=True))
    sae = random_sae(CONFIGS[0])
    with torch.no_grad():
        norm = sae.W_dec.norm(dim=1)
        scaled = sae.activate(sae.pre_acts(X) * norm)
        expected = (scaled / norm) @ sae.W_dec + sae.b_dec
    loaded = Dictionary.load(path)
    torch.testing.assert_close(loaded.encode(X), scaled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.decode(scaled), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cfg, t: cfg.update(architecture="temporal"), r"`architecture` must be one of topk, .*got 'temporal'"),
        (
            lambda cfg, t: cfg.update(normalize_activations="covariance_whitening"),
            r"`normalize_activations` must be one",
        ),
        (lambda cfg, t: cfg.pop("k"), "keys k are missing"),
        (lambda cfg, t: t.pop("b_enc"), "tensor `b_enc` is missing"),
        (lambda cfg, t: t.update(extra=torch.zeros(1)), "tensor `extra` is not part of this kind"),
        (lambda cfg, t: t.update(W_enc=torch.zeros(24, 6)), r"`W_enc` must have shape \(6, 24\), got \(24, 6\)"),
        (lambda cfg, t: t["b_dec"].fill_(float("nan")), "tensor `b_dec` holds NaN or infinity"),
    ],
)
def test_load_names_the_files_and_the_key_that_is_wrong(
    change: Callable[[dict[str, object], dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    path = foreign(tmp_path, change)
    with pytest.raises(ValueError, match=rf"dictionary in .*main.*sae_weights\.safetensors.*{message}"):
        Dictionary.load(path)


def test_load_lists_all_wrong_tensors_at_once(tmp_path: Path) -> None:
    def change(cfg: dict[str, object], tensors: dict[str, torch.Tensor]) -> None:
        del tensors["b_enc"]
        tensors["b_dec"].fill_(float("inf"))

    with pytest.raises(ValueError, match=r"`b_dec` holds NaN or infinity; tensor `b_enc` is missing"):
        Dictionary.load(foreign(tmp_path, change))


# ---- damage --------------------------------------------------------------------------------------------------------


def test_load_refuses_an_edited_cfg(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "cfg.json").write_text((path / "cfg.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"cfg\.json is not the file that dictionary\.json records.*authoritative"):
        Dictionary.load(path)


def test_load_refuses_weights_with_a_flipped_bit_when_told_to_look(tmp_path: Path) -> None:
    path = saved(tmp_path)
    weights = bytearray((path / "sae_weights.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (path / "sae_weights.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors is not the file that dictionary\.json records"):
        Dictionary.load(path, verify=True)
    Dictionary.load(path)


def test_load_refuses_a_truncated_weights_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    weights = (path / "sae_weights.safetensors").read_bytes()
    (path / "sae_weights.safetensors").write_bytes(weights[:-7])
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors: tensor `threshold` .*its place in the file is"):
        Dictionary.load(path)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_load_refuses_a_folder_without_a_needed_file(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing"):
        Dictionary.load(path)


def test_load_refuses_another_schema_and_a_record_without_its_keys(tmp_path: Path) -> None:
    path = saved(tmp_path)
    record = json.loads((path / "dictionary.json").read_text())
    for change, message in (
        ({"schema_version": 2}, r"`schema_version` in .*dictionary\.json must be 1, got 2"),
        ({"sha256": {}}, r"dictionary\.json must hold `config` and `sha256`"),
        ({"config": {"architecture": "topkk"}}, r"`config` in .*dictionary\.json cannot be read.*Did you mean `topk`"),
    ):
        (path / "dictionary.json").write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=message):
            Dictionary.load(path)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_load_refuses_what_is_not_a_json_object(content: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "dictionary.json").write_text(content)
    with pytest.raises(ValueError, match=r"dictionary\.json must hold (JSON|a JSON object)"):
        Dictionary.load(path)


def test_load_refuses_a_batchtopk_with_several_thresholds(tmp_path: Path) -> None:
    path = saved(tmp_path)
    tensors = load_file(path / "sae_weights.safetensors")
    tensors["threshold"][3] += 1
    save_file(tensors, path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="`threshold` of a batchtopk must hold one value"):
        Dictionary.load(path)


# ---- folders, features, hooks --------------------------------------------------------------------------------------


def test_save_refuses_an_existing_folder_and_replaces_it_when_told(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "features.parquet").write_bytes(b"stale")
    with pytest.raises(FileExistsError, match="exists already"):
        saved(tmp_path)
    Dictionary(random_sae(CONFIGS[0])).save(path, overwrite=True)
    assert Dictionary.load(path).config == CONFIGS[0]
    assert not (path / "features.parquet").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["main"]


def test_save_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        Dictionary(random_sae(CONFIGS[0])).save(tmp_path / "main", metrics={"fvu": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_features_are_read_lazily_as_a_table(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"latent": list(range(24)), "label": ["x"] * 24})
    path = Dictionary(random_sae(CONFIGS[0])).save(tmp_path / "main", features=table)
    assert Dictionary.load(path).features.equals(table)


def test_log10_frequency_is_what_was_saved(tmp_path: Path) -> None:
    loaded = Dictionary.load(saved(tmp_path)).log10_frequency
    assert loaded is not None
    torch.testing.assert_close(loaded, (torch.linspace(0, 1, 24) + 1e-10).log10())


def test_load_asks_the_resolver_for_what_is_no_folder(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(FileNotFoundError, match="A dictionary is a folder, but user/repo is not one"):
        Dictionary.load("user/repo")
    asked = []

    class Here:
        def fetch(self, name: str, *, subfolder: str | None, revision: str | None, token: str | None) -> Path:
            asked.append((name, subfolder, revision, token))
            return path

        def list(self, name: str, *, revision: str | None, token: str | None) -> list[str]:
            return ["main"]

    Dictionary.register_resolver(Here())
    try:
        loaded = Dictionary.load("user/repo", subfolder="main", revision="v1", token="secret")
        assert loaded.config == CONFIGS[1]
        assert asked == [("user/repo", "main", "v1", "secret")]
        assert Dictionary.list("user/repo") == ["main"]
        assert "secret" not in repr(vars(loaded))
        assert Dictionary.load(path.parent, subfolder="main").config == CONFIGS[1]
        assert len(asked) == 1, "a folder needs no resolver"
    finally:
        Dictionary.register_resolver(None)


def test_attach_uses_the_hook_of_the_dictionary_and_refuses_without_one() -> None:
    model = torch.nn.Sequential(torch.nn.Identity())
    with Dictionary(random_sae(CONFIGS[0]), hook_name="0").attach(model, splice=True) as tap:
        spliced = model(X)
    torch.testing.assert_close(spliced, random_sae(CONFIGS[0])(X).x_hat)
    torch.testing.assert_close(tap.latents, random_sae(CONFIGS[0]).encode(X))
    with pytest.raises(ValueError, match="does not record its hook"):
        Dictionary(random_sae(CONFIGS[0])).attach(model)


def test_to_moves_the_weights(tmp_path: Path) -> None:
    dictionary = Dictionary.load(saved(tmp_path)).to(dtype=torch.bfloat16)
    assert dictionary.W_dec.dtype == torch.bfloat16
    assert dictionary.encode(X).dtype == torch.bfloat16
