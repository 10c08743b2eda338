"""Foreign files that are hostile, damaged or ambiguous: refused with the file and the key, and nothing is run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae import (
    Dictionary,
    TopKConfig,
)
from tests.sae.foreign import (
    GOLDEN,
    changed,
    copied,
)

pytestmark = pytest.mark.usefixtures("no_resolver")


class Malicious:
    """Unpickled, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.write_text, (self.target, "written by a pickle"))


@pytest.mark.parametrize("name", ["ae.pt", "6.pt", "cc_weights.pt", "sae.pt"])
def test_a_malicious_pickle_is_refused_and_does_nothing(name: str, tmp_path: Path) -> None:
    folder, target = tmp_path / "dictionary", tmp_path / "written"
    folder.mkdir()
    with (folder / name).open("wb") as stream:
        if name == "sae.pt":
            stream.write(b'{"schema": 2, "cfg": {}}\n')
        names = dict.fromkeys(("pre_bias", "latent_bias", "W_enc"), torch.zeros(2, 2))
        torch.save(names | {"payload": Malicious(target)}, stream)
    (folder / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    (folder / "cfg.json").write_text("{}")
    if name != "sae.pt":  # whose first line torch.load does not skip
        torch.load(folder / name, weights_only=False)
        assert target.exists(), "the pickle must be able to do harm"
        target.unlink()
    with pytest.raises(ValueError, match=rf"{name} must hold tensors and plain values only.*Nothing was run"):
        Dictionary.load(folder)
    assert not target.exists()


def test_an_npz_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    import numpy as np

    objects = np.array([Malicious(tmp_path / "written")], dtype=object)
    np.savez(tmp_path / "params.npz", W_enc=objects)
    with pytest.raises(ValueError, match=r"params\.npz: array `W_enc` must hold plain numbers"):
        Dictionary.load(tmp_path)
    assert not (tmp_path / "written").exists()


def test_a_folder_of_two_formats_is_refused_naming_both(tmp_path: Path) -> None:
    for source in ("sparsify-topk/layers.10", "dictionary_learning-AutoEncoderTopK", "sae_lens-gated"):
        for file in (GOLDEN / source).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").unlink()
    message = r"of 3: SAELens \(.*sae_weights\.safetensors\); dictionary_learning \(ae\.pt\); sparsify \(sae\.safe"
    with pytest.raises(ValueError, match=message):
        Dictionary.load(tmp_path)


def test_our_own_record_is_authoritative_over_foreign_files_beside_it(tmp_path: Path) -> None:
    ours = Dictionary.load(GOLDEN / "sae_lens-gated")
    folder = ours.save(tmp_path / "ours")
    (folder / "ae.pt").write_bytes((GOLDEN / "dictionary_learning-AutoEncoderTopK" / "ae.pt").read_bytes())
    assert Dictionary.load(folder).config == ours.config


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("sparsify-topk", "sae.safetensors", lambda t: t.pop("W_dec"), r"sae\.safetensors.*tensor `W_dec` is missing"),
        ("sparsify-topk", "sae.safetensors", lambda t: t.update(more=torch.zeros(1)), r"tensor `more` is not part"),
        (
            "sparsify-topk",
            "sae.safetensors",
            lambda t: t.update(W_dec=t["W_dec"].t().contiguous()),
            r"tensor `W_dec` must have shape \(24, 6\), got \(6, 24\)",
        ),
        (
            "sparsify-topk",
            "sae.safetensors",
            lambda t: t["encoder.bias"].fill_(float("nan")),
            r"tensor `encoder\.bias` holds NaN or infinity",
        ),
        (
            "sparsify-topk",
            "sae.safetensors",
            lambda t: t.update({"encoder.bias": torch.zeros(24, dtype=torch.int32)}),
            r"tensor `encoder\.bias` must hold floating-point numbers, got I32",
        ),
        ("sparsify-topk", "cfg.json", lambda c: c.pop("k"), r"cfg\.json.*`k` must be a whole number"),
        ("sparsify-topk", "cfg.json", lambda c: c.update(d_in=7), r"tensor `b_dec` must have shape \(7,\), got \(6,\)"),
        ("sparsify-topk", "cfg.json", lambda c: c.update(activation="groupmax"), r"`activation` must be 'topk'"),
        ("sparsify-topk", "cfg.json", lambda c: c.update(num_latents=10**12), r"must have shape \(1000000000000, 6\)"),
        (
            "dictionary_learning-AutoEncoderTopK",
            "config.json",
            lambda c: c["trainer"].update(dict_class="IdentityDict"),
            r"config\.json.*`trainer\.dict_class` must be one of AutoEncoder, .*got 'IdentityDict'",
        ),
        (
            "dictionary_learning-AutoEncoderTopK",
            "ae.pt",
            lambda t: t.update({"b_dec": "zero"}),
            r"ae\.pt.*tensor `b_dec` must hold floating-point numbers, got str",
        ),
        (
            "dictionary_learning-AutoEncoderTopK",
            "ae.pt",
            lambda t: t.pop("encoder.weight"),
            r"tensor `encoder\.weight` must be a matrix, got nothing",
        ),
        (
            "sae_lens-gated",
            "cfg.json",
            lambda c: c.update(architecture="temporal"),
            r"`architecture` must be one of .*",
        ),
        ("sae_lens-gated", "cfg.json", lambda c: c.update(architecture="abstopk"), r"got 'abstopk'"),
        ("sae_lens-gated", "cfg.json", lambda c: c.update(d_sae="24"), r"`d_sae` must be a whole number"),
        (
            "sae_lens-gated",
            "cfg.json",
            lambda c: c.update(dtype="bfloat16"),
            r"`dtype` is 'bfloat16', but tensor `W_dec` holds float32",
        ),
        ("llama_scope", "hyperparams.json", lambda c: c.update(act_fn="batchtopk"), r"`act_fn` must be relu, jumprelu"),
    ],
)
def test_a_wrong_file_is_refused_naming_the_file_and_the_key(
    name: str, file: str, change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    folder = copied(name, tmp_path / "dictionary")
    if name == "llama_scope":
        (folder / "checkpoints").mkdir()
        (folder / "final.safetensors").rename(folder / "checkpoints" / "final.safetensors")
    with pytest.raises(ValueError, match=message):
        Dictionary.load(changed(folder, file, change))


def header(folder: Path, content: bytes, length: int | None = None) -> Path:
    """A sparsify folder whose weights begin with this header."""
    copied("sparsify-topk", folder)
    n = len(content) if length is None else length
    (folder / "sae.safetensors").write_bytes(n.to_bytes(8, "little") + content + bytes(96))
    return folder


def test_a_safetensors_header_that_lies_is_refused_before_it_is_believed(tmp_path: Path) -> None:
    for length in (2**62, 10**9, 0, 5000):
        with pytest.raises(
            ValueError, match=rf"sae\.safetensors must be a safetensors file.*header of {length:,} bytes"
        ):
            Dictionary.load(header(tmp_path, b"{}", length))
    record = {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}
    for change, message in (
        (
            {"dtype": "F64"},
            r"`b_dec` of dtype F64 and shape \(6,\) needs 48 bytes, but its place in the file is 0 to 24",
        ),
        ({"data_offsets": [80, 104]}, r"its place in the file is 80 to 104 of 96"),
        ({"data_offsets": [-24, 0]}, r"its place in the file is -24 to 0"),
        ({"dtype": "F128"}, r"tensor `b_dec` must have one of the dtypes F64, F32, F16, BF16, got F128"),
        ({"shape": "6x"}, r"record of tensor `b_dec` cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            Dictionary.load(header(tmp_path, json.dumps({"b_dec": record | change}).encode()))


def test_a_link_out_of_the_folder_is_refused_unless_it_is_the_hub_cache_s_own(tmp_path: Path) -> None:
    outside = copied("sparsify-topk", tmp_path / "outside")
    folder = tmp_path / "dictionary"
    folder.mkdir()
    for file in outside.iterdir():
        (folder / file.name).symlink_to(file)
    with pytest.raises(ValueError, match=r"must lie in its folder, but .*cfg\.json leads to .*outside"):
        Dictionary.load(folder)
    snapshot, blobs = (
        tmp_path / "models--a--b" / "snapshots" / "1234" / "layers.10",
        tmp_path / "models--a--b" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in outside.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / file.name)
    assert Dictionary.load(snapshot).config == TopKConfig(d_in=6, d_sae=24, k=3)
    with pytest.raises(ValueError, match=r"`subfolder` must lie inside"):
        Dictionary.load(snapshot, subfolder="../../../outside")
