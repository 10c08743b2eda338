import pytest
import yaml

from pipelines.yamlfiles import load_yaml


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(yaml.YAMLError, match="the key 'train' stands twice"):
        load_yaml("train: {lr: 1}\nseed: 0\ntrain: {lr: 2}\n")


def test_a_python_object_is_refused() -> None:
    with pytest.raises(yaml.YAMLError):
        load_yaml("!!python/object/apply:os.getcwd []")


def test_ordinary_yaml_is_read() -> None:
    assert load_yaml("a: {b: [1, x], c: null}\n") == {"a": {"b": [1, "x"], "c": None}}
