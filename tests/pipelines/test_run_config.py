from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.config import RunConfig
from pipelines.configio import differing_keys, dump_config, load_config
from pipelines.errors import UsageError
from tests.tiny import tiny_config


@pytest.fixture
def raw() -> dict[str, Any]:
    return tiny_config(Path("model"), Path("texts.jsonl"))


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Write a config as YAML and load it."""

    def write_and_load(raw: Any, *overrides: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False))
        return load_config(path, overrides)

    return write_and_load


# -- files -------------------------------------------------------------------------------------------------------------


def test_load_config_says_how_to_get_a_config_when_there_is_none(tmp_path):
    with pytest.raises(
        UsageError, match=r"config .*nowhere.yaml does not exist: give a YAML file .*or a run directory"
    ):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["name: [", "name: '"])
def test_load_config_rejects_broken_yaml_with_the_file(load, text):
    with pytest.raises(UsageError, match=r"config .*run\.yaml is not valid YAML"):
        load(text)


def test_load_config_rejects_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"name: \xff")
    with pytest.raises(UsageError, match=r"config .*run\.yaml is not valid YAML"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "list"), ("", "NoneType"), ("word", "str")])
def test_load_config_rejects_yaml_that_is_no_mapping(load, text, kind):
    with pytest.raises(UsageError, match=rf"run\.yaml must be a mapping of keys to values, not {kind}"):
        load(text)


def test_dump_and_load_round_trip_writes_every_default(load, raw):
    config = load(raw)
    dumped = dump_config(config)
    assert load(dumped) == config
    assert load(dump_config(load(dumped))) == config
    assert yaml.safe_load(dumped)["train"]["lr"] is None
    assert yaml.safe_load(dumped)["collect"]["isolate_documents"] is True


def test_config_is_frozen(load, raw):
    with pytest.raises(ValueError, match="frozen"):
        load(raw).train.lr = 1.0


# -- unknown keys and bad values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "where", "near"),
    [
        ("colect.n_tokens=5", "colect", "collect"),
        ("collect.n_token=5", "collect.n_token", "n_tokens"),
        ("train.learning_rate=1", "train.learning_rate", "warmup_fraction|decay_fraction|batch_size|lr"),
        ("text.0.txt_field=body", "text.0.txt_field", "text_field"),
        ("saes.main.expansion=4", "saes.main.expansion", "expansion_factor"),
        ("ray.num_cpu=2", "ray.num_cpu", "num_cpus"),
    ],
)
def test_unknown_key_names_itself_its_file_and_the_nearest_valid_key(load, raw, override, where, near):
    with pytest.raises(
        UsageError, match=rf"config .*run\.yaml: unknown key `{where}`; the nearest valid key is `({near})`"
    ):
        load(raw, override)


def test_all_problems_are_reported_at_once(load, raw):
    del raw["model"]
    raw["sed"] = 3
    raw["collect"]["heldout_fraction"] = 2
    raw["saes"]["main"]["architecture"] = "vanilla"
    with pytest.raises(UsageError) as caught:
        load(raw)
    message = str(caught.value)
    assert "`model` is missing" in message
    assert "unknown key `sed`; the nearest valid key is `seed`" in message
    assert "`collect.heldout_fraction`: Input should be less than 1 (got 2)" in message
    assert "`saes.main.architecture`: Input should be 'standard'," in message
    assert "'transcoder' or 'crosscoder' (got 'vanilla')" in message


def test_train_and_dictionary_exclude_each_other(load, raw):
    with pytest.raises(UsageError, match="give exactly one of `train:` and `dictionary:`"):
        load(raw | {"dictionary": {"path": "somewhere"}})
    del raw["train"]
    with pytest.raises(UsageError, match="give exactly one of `train:` and `dictionary:`"):
        load(raw)
    assert load(raw | {"dictionary": {"path": "somewhere"}}).train is None


def test_dictionary_run_has_one_sae(load, raw):
    del raw["train"]
    raw |= {"dictionary": {"path": "somewhere"}, "saes": {"a": {}, "b": {}}}
    with pytest.raises(UsageError, match="a run that starts from a dictionary has exactly one entry under `saes:`"):
        load(raw)


def test_sae_on_a_hook_that_is_not_collected_is_refused(load, raw):
    raw["saes"]["main"]["hook"] = "model.layers.2"
    with pytest.raises(
        UsageError, match=r"saes\.main\.hook is 'model\.layers\.2', which is not in `hooks`: \['model\.layers\.1'\]"
    ):
        load(raw)


def test_hook_listed_twice_is_refused(load, raw):
    with pytest.raises(UsageError, match=r"`hooks` lists a hook twice: \['a', 'a'\]"):
        load(raw | {"hooks": ["a", "a"]})


def test_hook_of_is_the_first_unless_the_sae_names_one(load, raw):
    raw["hooks"] = ["model.layers.0", "model.layers.1"]
    raw["saes"]["late"] = {"hook": "model.layers.1"}
    config = load(raw)
    assert config.hook_of("main") == "model.layers.0"
    assert config.hook_of("late") == "model.layers.1"


@pytest.mark.parametrize("name", ["../up", "a/b", "", "a b"])
def test_sae_names_must_be_safe_as_folders(load, raw, name):
    with pytest.raises(UsageError, match=r"becomes a folder: use letters, digits, '-' and '_' only"):
        load(raw | {"saes": {name: {}}})


@pytest.mark.parametrize("name", ["../up", ".hidden", "a/b", ""])
def test_run_name_must_be_safe_as_a_folder(load, raw, name):
    with pytest.raises(UsageError, match="`name`: String should match pattern"):
        load(raw | {"name": name})


@pytest.mark.parametrize("source", [{}, {"path": "a.txt", "dataset": "b"}])
def test_text_source_needs_exactly_one_origin(load, raw, source):
    with pytest.raises(UsageError, match=r"`text\.0`: a text source needs exactly one of `path` and `dataset`"):
        load(raw | {"text": [source]})


# -- --set -------------------------------------------------------------------------------------------------------------


def test_set_reads_floats_without_a_dot(load, raw):
    assert load(raw, "train.lr=5e-4").train.lr == 5e-4
    assert load(raw, "collect.n_tokens=1e6").collect.n_tokens == 1_000_000


def test_floats_without_a_dot_are_read_from_the_file_too(load, raw):
    raw["train"]["lr"] = "5e-4"  # what YAML 1.1 makes of a bare 5e-4
    assert load(raw).train.lr == 5e-4


def test_set_reaches_lists_mappings_and_missing_sections(load, raw):
    config = load(
        raw,
        "text.0.weight=2",
        "hooks=[model.layers.0, model.layers.2]",
        "hooks.1=model.layers.1",
        "saes.wide.d_sae=256",
        "sinks.multiple=4.5",
        "evaluate.n_ce_tokens=64",
    )
    assert config.text[0].weight == 2
    assert config.hooks == ("model.layers.0", "model.layers.1")
    assert config.saes["wide"].d_sae == 256
    assert config.sinks.multiple == 4.5
    assert config.evaluate.n_ce_tokens == 64


def test_set_to_nothing_or_null_clears_a_key(load, raw):
    config = load(raw, "train=null", "dictionary.path=somewhere", "saes.main.d_sae=")
    assert config.train is None
    assert config.saes["main"].d_sae is None


def test_set_keeps_text_that_holds_an_equals_sign(load, raw):
    assert load(raw, "model.source=a=b").model.source == "a=b"


@pytest.mark.parametrize("override", ["train.lr", "=3", ""])
def test_set_without_key_or_value_is_refused(load, raw, override):
    with pytest.raises(UsageError, match=r"--set takes key=value, not .*; for example --set train\.lr=5e-4"):
        load(raw, override)


@pytest.mark.parametrize("position", ["1", "-1", "x"])
def test_set_outside_a_list_says_how_long_it_is(load, raw, position):
    with pytest.raises(UsageError, match=rf"--set hooks\.{position}=a: '{position}' must be a position in a list of 1"):
        load(raw, f"hooks.{position}=a")


@pytest.mark.parametrize("override", ["hooks.0.name=a", "hooks.0.name.more=a"])
def test_set_below_a_list_item_that_is_no_mapping_is_refused(load, raw, override):
    with pytest.raises(UsageError, match=rf"--set {override}: `hooks\.0` is 'model\.layers\.1', which has no keys"):
        load(raw, override)


def test_set_with_a_value_that_is_not_yaml_is_refused(load, raw):
    with pytest.raises(UsageError, match=r"--set hooks=\[a: the value is not valid YAML"):
        load(raw, "hooks=[a")


def test_set_to_a_wrong_value_names_key_and_value(load, raw):
    with pytest.raises(UsageError, match=r"`train\.lr`: .*greater than 0 \(got -1\)"):
        load(raw, "train.lr=-1")


def test_differing_keys_are_dotted_and_sorted():
    a = {"x": 1, "train": {"lr": 1.0, "k": 2}, "hooks": ["a"]}
    b = {"x": 1, "train": {"lr": 2.0, "k": 2}, "hooks": ["b"], "new": 0}
    assert list(differing_keys(a, b)) == ["hooks", "new", "train.lr"]
    assert list(differing_keys(a, a)) == []


def test_whole_numbers_in_exponent_form_are_read_from_files_too_and_text_stays_text(raw, load):
    raw["collect"]["n_tokens"] = "1e6"
    raw["model"]["revision"] = "12e5"
    config = load(raw)
    assert config.collect.n_tokens == 1_000_000
    assert config.model.revision == "12e5"
    assert load(raw, "model.revision=123e456").model.revision == "123e456"
