import dataclasses

import pytest

from sae.config import BatchTopKConfig, JumpReLUConfig, SAEConfig, TopKConfig, config_from_dict

CONFIGS = [
    TopKConfig(d_in=4, d_sae=8, k=2),
    BatchTopKConfig(d_in=4, d_sae=8, k=2),
    JumpReLUConfig(d_in=4, d_sae=8),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.architecture)
def test_config_round_trips_through_a_dict(config: SAEConfig) -> None:
    assert config_from_dict(dataclasses.asdict(config)) == config


@pytest.mark.parametrize("cls", [TopKConfig, BatchTopKConfig])
def test_config_refuses_k_above_d_sae(cls: type[TopKConfig | BatchTopKConfig]) -> None:
    with pytest.raises(ValueError, match=r"k must not exceed d_sae, got k=9 with d_sae=8"):
        cls(d_in=4, d_sae=8, k=9)


@pytest.mark.parametrize("width", [0, -1, True])
def test_config_refuses_a_width_that_is_no_count(width: int) -> None:
    with pytest.raises(ValueError, match=r"JumpReLUConfig\.d_sae must be a whole number of at least 1, got"):
        JumpReLUConfig(d_in=4, d_sae=width)


def test_config_from_dict_names_the_nearest_architecture() -> None:
    with pytest.raises(ValueError, match=r"got 'batch_topk'\. Did you mean `batchtopk`\?"):
        config_from_dict({"architecture": "batch_topk"})


def test_config_from_dict_names_the_nearest_key() -> None:
    with pytest.raises(ValueError, match=r"no key `d_sea`\. Did you mean `d_sae`\?"):
        config_from_dict({"architecture": "topk", "d_in": 4, "d_sea": 8, "k": 2})


def test_config_from_dict_lists_missing_keys() -> None:
    with pytest.raises(ValueError, match=r"missing: d_in, k\. Add them"):
        config_from_dict({"architecture": "topk", "d_sae": 8})
