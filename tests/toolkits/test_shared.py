"""What the toolkits' integrations have in common."""

import pytest
import torch
from peft import get_peft_model_state_dict

from helpers.tiny import tiny_model
from kappatune_plugin import KappaTuneError
from kappatune_plugin.toolkits.shared import new_adapter, trained_adapter


def test_pairs_on_linear_layers_are_a_plain_adapter_that_training_goes_on_with(tmp_path):
    given = {"adapter": "lora", "k": 3, "r": 2}
    tuned = new_adapter(tiny_model("llama"), given)
    assert tuned.peft_config["default"].peft_type.value == "LORA"
    tuned.save_pretrained(tmp_path)
    again = trained_adapter(tiny_model("llama"), str(tmp_path), given, trainable=True)
    expected, found = get_peft_model_state_dict(tuned), get_peft_model_state_dict(again)
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    with pytest.raises(KappaTuneError, match="r is 2 there, 4 here"):
        trained_adapter(tiny_model("llama"), str(tmp_path), {**given, "r": 4}, trainable=True)
    with pytest.raises(KappaTuneError, match="is an adapter of LORA, not of KappaTune"):
        trained_adapter(tiny_model("llama"), str(tmp_path), {"k": 3}, trainable=True)
