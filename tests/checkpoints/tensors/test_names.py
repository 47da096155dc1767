"""Names of tensors: as the model's, twice, and by their quantizer."""

from qwen_vram.checkpoints.files.safetensors_header import Tensor
from qwen_vram.checkpoints.tensors.names import by_model_name
from qwen_vram.checkpoints.tensors.quantized_names import _ENDS, _PLAIN
from qwen_vram.spec.catalog import find


def named(*names):
    return {name: Tensor("BF16", (2,), 4, "model.safetensors", 4 * place, name) for place, name in enumerate(names)}


def test_the_last_of_two_tensors_with_one_name_stays_and_both_are_told():
    tensors = named("model.norm.weight", "layers.0.mlp.up_proj.weight", "norm.weight", "lm_head.weight")
    found, twice = by_model_name(tensors)
    assert twice == ["model.norm.weight"]
    assert list(found) == ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    assert found["model.norm.weight"].name == "norm.weight"


def test_names_without_a_double_are_all_kept():
    tensors = named("norm.weight", "model.lm_head.weight")
    assert by_model_name(tensors) == (dict(zip(("model.norm.weight", "lm_head.weight"), tensors.values())), [])


def test_no_quantizer_hides_behind_a_plain_name():
    assert not any(end.endswith(plain) or plain.endswith(end) for end, _ in _ENDS for plain in _PLAIN)


def test_the_shapes_of_a_model_are_those_of_its_weights():
    for name in ("Qwen2.5-0.5B", "Qwen3-8B"):
        architecture = find(name)
        assert architecture.shapes() == {weight.name: weight.shape for weight in architecture.weights()}
