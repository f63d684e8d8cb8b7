"""A value in a config.json that transformers does not take is one line, whatever transformers raises."""

import pytest
from support.tiny_config import CONFIG

from fourfold.launch.training.build import empty_model


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "nope"}, {"rms_norm_eps": "x"}, {"torch_dtype": "float99"}, {"rope_scaling": {"type": "x"}},
        {"pad_token_id": 99_999}, {"initializer_range": float("nan")}, {"head_dim": 7},
    ],
    ids=str,
)  # fmt: skip
def test_it_is_one_line(changes):
    with pytest.raises(ValueError, match=r"transformers takes no model of this config: .") as error:
        empty_model({**CONFIG, **changes})
    assert "\n" not in str(error.value)


def test_a_config_without_faults_is_a_model_without_storage():
    assert all(parameter.is_meta for parameter in empty_model(CONFIG).parameters())
