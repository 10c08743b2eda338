"""FORMAT.md and the code say the same."""

import json
import math
import re
from pathlib import Path

import example_store
import numpy as np
import pytest

import storage
from storage import LatentWriter
from storage.spec import FORMAT_VERSION, canonical_json

TEXT = (Path(storage.__file__).parent / "FORMAT.md").read_text()
NAMES = {
    "<hook>": r"[A-Za-z0-9_.\-]+(@input)?",
    "<table>": r"(tokens|document|position|flags|source)",
    "<iiiiii>": r"\d{6,}",
    "<i>": r"\d+",
    "<sidecar>": r"(?!spec\.json|tables\.json|seal\.json)[^/]+",
}


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without its header."""
    section = re.split(r"^## ", TEXT, flags=re.MULTILINE)
    (body,) = [part for part in section if part.startswith(heading + "\n")]
    lines = [line for line in body.splitlines() if line.startswith("|")]
    assert len(lines) > 2
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def pattern(path: str) -> re.Pattern[str]:
    escaped = re.escape(path)
    for name, expression in NAMES.items():
        escaped = escaped.replace(re.escape(name), expression)
    return re.compile(escaped)


def assert_files_are_those_of_the_table(path: Path, heading: str) -> None:
    patterns = {row[0]: pattern(row[0]) for row in rows(heading)}
    keys = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
    matches = {key: [name for name, expression in patterns.items() if expression.fullmatch(key)] for key in keys}
    assert all(len(names) == 1 for names in matches.values()), matches
    assert {names[0] for names in matches.values()} == set(patterns)


def test_text_is_of_the_version_that_is_written() -> None:
    assert TEXT.startswith(f"# Activation and latent stores, format version {FORMAT_VERSION}\n")


def test_files_of_a_store_are_those_of_the_table(built: Path) -> None:
    assert_files_are_those_of_the_table(built, "Files of an activation store")


def test_files_of_a_latent_store_are_those_of_the_table(tmp_path: Path) -> None:
    writer = LatentWriter.create(tmp_path, {"d_sae": 2, "n_shards": 1, "n_rows": 1, "fingerprint": "x"})
    writer.write_shard(0, np.array([0]), np.array([1]), np.array([1.0]))
    writer.seal()
    assert_files_are_those_of_the_table(tmp_path, "Latent stores")
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert all(f"`{key}`" in TEXT for key in meta)
    for name, keys in (("commits/000000.json", {"first_row", "stop_row", "n_entries"}), ("seal.json", {"n_entries"})):
        assert set(json.loads((tmp_path / name).read_text())["payload"]) == keys


def test_arrays_have_the_shapes_types_and_codecs_of_the_table(built: Path) -> None:
    spec = example_store.spec()
    table_rows = max(1, min(spec.n_contexts, 2**20 // (4 * spec.context_length)))
    shard_rows = spec.contexts_per_shard * spec.context_length
    checked = 0
    described = rows("Arrays")
    (extra,) = [row for row in described if row[0] == "<extra>"]
    tables = [[table.name, extra[1], table.dtype, *extra[3:]] for table in spec.tables]
    for name, shape, dtype, fill, per_file, codecs in [row for row in described if row is not extra] + tables:
        for hook in spec.hooks if "<hook>" in name else spec.hooks[:1]:
            path = built / "data.zarr" / name.replace("<hook>", storage.zarr_name(hook.name)) / "zarr.json"
            metadata = json.loads(path.read_text())
            sizes = {"n_contexts": spec.n_contexts, "context_length": spec.context_length, "d_in": hook.d_in}
            stored = {"bfloat16": "uint16"}.get(hook.dtype, hook.dtype)
            expected_shape = [math.prod(sizes[size] for size in axis.split(" * ")) for axis in shape[1:-1].split(", ")]
            assert metadata["shape"] == expected_shape
            assert metadata["data_type"] == (stored if dtype == "stored" else dtype)
            expected_fill = {
                "nan": 32704 if stored == "uint16" else "NaN",
                "NaN": "NaN",
                "-1": -1,
                "none": {"uint8": 255, "int16": -1}.get(dtype),
            }[fill]
            assert metadata["fill_value"] == expected_fill
            expected_rows = {"table": table_rows, "shard": shard_rows}[per_file]
            assert metadata["chunk_grid"]["configuration"]["chunk_shape"][0] == expected_rows
            assert metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
            written = metadata["codecs"]
            if codecs.startswith("sharding_indexed"):
                (sharding,) = written
                assert sharding["name"] == "sharding_indexed"
                assert sharding["configuration"]["index_location"] == "end"
                assert metadata["attributes"] == {"hook_name": hook.name, "logical_dtype": hook.dtype}
                written = sharding["configuration"]["codecs"]
            assert [codec["name"] for codec in written] == ["bytes", "crc32c"]
            checked += 1
    assert checked == 3 + 2 + 2 * 2


def test_json_files_have_exactly_the_documented_keys(built: Path) -> None:
    documented: dict[str, set[str]] = {}
    for file, key, _ in rows("Keys of the JSON files"):
        documented.setdefault(file, set()).add(key)
    objects = {name: json.loads((built / name).read_text()) for name in ("spec.json", "tables.json", "seal.json")}
    objects["commits/<iiiiii>.json"] = json.loads((built / "commits/000002.json").read_text())
    objects["statistics"] = objects["seal.json"]["payload"]["statistics"][example_store.WIDE]
    assert {name: set(value) for name, value in objects.items()} == documented
    assert set(objects["commits/<iiiiii>.json"]["payload"]) == {"contexts", "statistics", "info"}


@pytest.mark.parametrize("name", ["spec.json", "tables.json", "seal.json", "commits/000000.json"])
def test_protocol_files_are_canonical_json(built: Path, name: str) -> None:
    data = (built / name).read_bytes()
    assert canonical_json(json.loads(data)) == data
