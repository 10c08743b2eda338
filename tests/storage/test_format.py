"""FORMAT.md and the code say the same."""

import hashlib
import json
import math
import re
from pathlib import Path

import example_store
import numpy as np
import pytest

import storage
from storage import LatentWriter, StoreSpec
from storage.spec import FORMAT_VERSION, canonical_json

TEXT = (Path(storage.__file__).parent / "FORMAT.md").read_text()
NAMES = {
    "<hook>": r"[A-Za-z0-9_.\-]+(@input)?",
    "<quantised hook>": r"[A-Za-z0-9_.\-]+(@input)?",
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


def assert_files_are_those_of_the_table(path: Path, heading: str, without: str = "nothing") -> None:
    patterns = {row[0]: pattern(row[0]) for row in rows(heading) if without not in row[0]}
    keys = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
    matches = {key: [name for name, expression in patterns.items() if expression.fullmatch(key)] for key in keys}
    assert all(len(names) == 1 for names in matches.values()), matches
    assert {names[0] for names in matches.values()} == set(patterns)


def test_text_is_of_the_version_that_is_written() -> None:
    assert TEXT.startswith(f"# Activation and latent stores, format version {FORMAT_VERSION}\n")


def test_files_of_a_store_are_those_of_the_table(built: Path, coded: Path) -> None:
    assert_files_are_those_of_the_table(built, "Files of an activation store", without="<quantised hook>")
    assert_files_are_those_of_the_table(coded, "Files of an activation store")


def test_files_of_a_latent_store_are_those_of_the_table(tmp_path: Path) -> None:
    writer = LatentWriter.create(tmp_path, {"d_sae": 2, "n_shards": 1, "n_rows": 1, "fingerprint": "x"})
    writer.write_shard(0, np.array([0]), np.array([1]), np.array([1.0]))
    writer.seal()
    assert_files_are_those_of_the_table(tmp_path, "Latent stores")
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert all(f"`{key}`" in TEXT for key in meta)
    for name, keys in (("commits/000000.json", {"first_row", "stop_row", "n_entries"}), ("seal.json", {"n_entries"})):
        assert set(json.loads((tmp_path / name).read_text())["payload"]) == keys


def test_arrays_have_the_shapes_types_and_codecs_of_the_table(built: Path, coded: Path) -> None:
    assert check_arrays(built, example_store.spec()) == 5 + 2 * 2
    assert check_arrays(coded, example_store.coded_spec()) == 5 + 3 * 2 + 2


def check_arrays(store: Path, spec: StoreSpec) -> int:
    """Holds the metadata of every array of a store against the table; their number."""
    table_rows = max(1, min(spec.n_contexts, 2**20 // (4 * spec.context_length)))
    shard_rows = spec.contexts_per_shard * spec.context_length
    described = rows("Arrays")
    (extra,) = [row for row in described if row[0] == "<extra>"]
    tables = [[table.name, extra[1], table.dtype, *extra[3:]] for table in spec.tables]
    quantised = [hook for hook in spec.hooks if hook.quantisation == "int8"]
    checked = 0
    for name, shape, dtype, fill, per_file, codecs in [row for row in described if row is not extra] + tables:
        concerned = quantised if "<quantised" in name else spec.hooks if "<hook>" in name else spec.hooks[:1]
        for hook in concerned:
            zarr_name = storage.zarr_name(hook.name)
            path = name.replace("<hook>", zarr_name).replace("<quantised hook>", zarr_name)
            metadata = json.loads((store / "data.zarr" / path / "zarr.json").read_text())
            sizes = {"n_contexts": spec.n_contexts, "context_length": spec.context_length, "d_in": hook.d_in}
            stored = "int8" if hook in quantised else {"bfloat16": "uint16"}.get(hook.dtype, hook.dtype)
            expected_shape = [math.prod(sizes[size] for size in axis.split(" * ")) for axis in shape[1:-1].split(", ")]
            assert metadata["shape"] == expected_shape
            assert metadata["data_type"] == (stored if dtype == "stored" else dtype)
            expected_fill = {
                "nan": {"uint16": 32704, "int8": -128}.get(stored, "NaN"),
                "NaN": "NaN",
                "-1": -1,
                "none": {"uint8": 255, "int16": -1}.get(dtype),
            }[fill]
            assert metadata["fill_value"] == expected_fill
            expected_rows = {"table": table_rows, "shard": shard_rows}[per_file]
            assert metadata["chunk_grid"]["configuration"]["chunk_shape"][0] == expected_rows
            assert metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
            written, expected_codecs = metadata["codecs"], ["bytes", "crc32c"]
            if codecs.startswith("sharding_indexed"):
                assert codecs == "sharding_indexed(bytes, blosc if compressed, crc32c)"
                (sharding,) = written
                assert sharding["name"] == "sharding_indexed"
                assert sharding["configuration"]["index_location"] == "end"
                assert [codec["name"] for codec in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
                attributes = {"hook_name": hook.name, "logical_dtype": hook.dtype}
                if hook in quantised:
                    attributes |= {"quantisation": "int8", "scales": "../scales"}
                assert metadata["attributes"] == attributes
                written = sharding["configuration"]["codecs"]
                if hook.compression == "blosc":
                    expected_codecs = ["bytes", "blosc", "crc32c"]
                    settings = written[1]["configuration"]
                    assert settings.pop("typesize") == np.dtype(stored).itemsize
                    assert all(f"`{key}` {value}" in TEXT for key, value in settings.items())
            else:
                assert codecs == "bytes, crc32c"
            assert [codec["name"] for codec in written] == expected_codecs
            checked += 1
    return checked


@pytest.mark.parametrize("kind", ["built", "coded"])
def test_json_files_have_exactly_the_documented_keys(kind: str, request: pytest.FixtureRequest) -> None:
    built: Path = request.getfixturevalue(kind)
    documented: dict[str, set[str]] = {}
    for file, key, _ in rows("Keys of the JSON files"):
        documented.setdefault(file, set()).add(key)
    objects = {name: json.loads((built / name).read_text()) for name in ("spec.json", "tables.json", "seal.json")}
    objects["commits/<iiiiii>.json"] = json.loads((built / "commits/000002.json").read_text())
    objects["statistics"] = objects["seal.json"]["payload"]["statistics"][example_store.WIDE]
    assert {name: set(value) for name, value in objects.items()} == documented
    assert set(objects["commits/<iiiiii>.json"]["payload"]) == {"contexts", "statistics", "info"}
    for key in ("hooks", "tables"):
        (meaning,) = [row[2] for row in rows("Keys of the JSON files") if row[:2] == ["spec.json", key]]
        for item in objects["spec.json"][key]:
            assert set(item) <= set(re.findall(r"`(\w+)`", meaning))


@pytest.mark.parametrize("name", ["tables.json", "seal.json", "commits/000000.json"])
def test_protocol_files_hold_the_digest_of_the_rest(built: Path, name: str) -> None:
    value = json.loads((built / name).read_text())
    digest = value.pop("sha256")
    assert hashlib.sha256(canonical_json(value)).hexdigest() == digest


def test_tables_with_a_meaning_have_the_type_of_the_table(built: Path) -> None:
    described = {name: dtype for name, dtype, _ in rows("Extra tables with a meaning")}
    assert set(described) == {"flags", "source", "role", "turn"}
    for table in example_store.spec().tables:
        assert table.dtype == described[table.name]
    bits = next(meaning for name, _, meaning in rows("Extra tables with a meaning") if name == "flags")
    assert "bit 0: first token of a text (BOS), bit 1: padding, bit 2: other special token" in bits
    assert (storage.BOS, storage.PADDING, storage.SPECIAL) == (1, 2, 4)


@pytest.mark.parametrize("name", ["spec.json", "tables.json", "seal.json", "commits/000000.json"])
def test_protocol_files_are_canonical_json(built: Path, name: str) -> None:
    data = (built / name).read_bytes()
    assert canonical_json(json.loads(data)) == data
