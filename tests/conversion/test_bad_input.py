"""Sources that are damaged, hostile or of another kind."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_sources import edit_json, edit_weights, list_hidden

from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.conversion.convert import convert_checkpoint


class Payload:
    """Unpickled without care, this runs a command that creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def add_adapter(broken):
    edit_weights(broken / "llm/pytorch_model-00002-of-00002.bin", lambda w: w.update({"model.lora_A": torch.ones(2)}))


def remove_tensor(broken):
    edit_weights(broken / "vision/pytorch_model.bin", lambda w: w.pop("encoder.stages.2.layers.1.dwconv.bias"))


def remove_indexed(broken):
    edit_weights(broken / "llm/pytorch_model-00002-of-00002.bin", lambda w: w.pop("model.norm.weight"))


def repeat_tensor(broken):
    edit_weights(
        broken / "llm/pytorch_model-00002-of-00002.bin",
        lambda w: w.update({"model.embed_tokens.weight": torch.ones(2)}),
    )


def repeat_target(broken):
    edit_weights(
        broken / "llm/pytorch_model-00002-of-00002.bin", lambda w: w.update({"model.mm_projector.bias": torch.ones(64)})
    )


def reshape_tensor(broken):
    edit_weights(
        broken / "llm/pytorch_model-00002-of-00002.bin", lambda w: w.update({"model.norm.weight": torch.ones(63)})
    )


def shorten_vocabulary(broken):
    def cut(weights):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in weights:
                weights[name] = weights[name][:900].clone()

    for path in (broken / "llm").glob("*.bin"):
        edit_weights(path, cut)


def add_layer(broken):
    edit_json(broken / "llm/config.json", num_hidden_layers=1)


def truncate_shard(broken):
    path = broken / "llm/pytorch_model-00001-of-00002.bin"
    path.write_bytes(path.read_bytes()[:200_000])


def empty_shard(broken):
    (broken / "vision/pytorch_model.bin").write_bytes(b"")


def truncate_safetensors(broken):
    path = broken / "vision/pytorch_model.bin"
    save_file(torch.load(path, weights_only=True), path.with_name("model.safetensors"))
    data = path.with_name("model.safetensors").read_bytes()
    path.with_name("model.safetensors").write_bytes(data[:-100])


def quantise(broken):
    weights = {"embeddings.patch_embeddings.weight": torch.ones(8).to(torch.float8_e4m3fn)}
    save_file(weights, broken / "vision/model.safetensors")


def remove_shard(broken):
    (broken / "llm/pytorch_model-00001-of-00002.bin").unlink()


def remove_weights(broken):
    (broken / "vision/pytorch_model.bin").unlink()


def hide_code(broken):
    edit_weights(broken / "vision/pytorch_model.bin", lambda w: w.update({"x": Payload(broken / "ran")}))


def hide_code_in_old_format(broken):
    (broken / "vision/pytorch_model.bin").write_bytes(pickle.dumps({"x": Payload(broken / "ran")}))


def save_whole_module(broken):
    torch.save(torch.nn.Linear(2, 2), broken / "vision/pytorch_model.bin")


def save_training_state(broken):
    torch.save({"state_dict": {"x": torch.ones(2)}, "epoch": 3}, broken / "vision/pytorch_model.bin")


def save_list(broken):
    torch.save([torch.ones(2)], broken / "vision/pytorch_model.bin")


def lead_elsewhere(broken):
    (broken / "llm/pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "../vision/pytorch_model.bin"}}')


def empty_index(broken):
    (broken / "llm/pytorch_model.bin.index.json").write_text("{}")


def damage_config(broken):
    (broken / "llm/config.json").write_text('{"architectures": [')


def list_in_config(broken):
    (broken / "vision/config.json").write_text("[]")


def remove_tower_config(broken):
    (broken / "vision/config.json").unlink()


def remove_preprocessor(broken):
    (broken / "vision/preprocessor_config.json").unlink()


def crop_images(broken):
    edit_json(broken / "vision/preprocessor_config.json", size={"shortest_edge": 150})


def remove_statistics(broken):
    edit_json(broken / "vision/preprocessor_config.json", image_mean=None)


def other_architecture(broken):
    edit_json(broken / "llm/config.json", architectures=["LlavaMptForCausalLM"])


def other_feature_layer(broken):
    edit_json(broken / "llm/config.json", mm_vision_select_layer=-2)


def other_aspect_ratio(broken):
    edit_json(broken / "llm/config.json", image_aspect_ratio="anyres")


def start_and_end_tokens(broken):
    edit_json(broken / "llm/config.json", mm_use_im_start_end=True)


def other_projector(broken):
    edit_json(broken / "llm/config.json", mm_projector_type="identity")


def other_projector_depth(broken):
    edit_json(broken / "llm/config.json", mm_projector_type="mlp3x_gelu")


def other_tower_width(broken):
    edit_json(broken / "llm/config.json", mm_hidden_size=3072)


def remove_tokenizer(broken):
    for path in (broken / "llm").glob("*token*"):
        path.unlink()


def damage_tokenizer(broken):
    (broken / "llm/tokenizer.model").write_bytes(b"\x00\x01\x02")


def clip_tower(broken):
    weights = {"vision_model.embeddings.class_embedding": torch.ones(4)}
    torch.save(weights, broken / "vision/pytorch_model.bin")


BAD_INPUT = [
    (add_adapter, r"unknown weight 'model\.lora_A'"),
    (
        remove_tensor,
        r"1 tensors are in no source, the first of them 'model\.vision_tower\.encoder\.stages\.2\.layers\.1",
    ),
    (remove_indexed, r"does not hold 'model\.norm\.weight', which the index lists"),
    (repeat_tensor, r"'model\.embed_tokens\.weight' is in both"),
    (repeat_target, r"both become 'model\.multi_modal_projector\.linear_1\.bias'"),
    (reshape_tensor, r"'model\.norm\.weight'.*has shape \(63,\); expected \(64,\)"),
    (shorten_vocabulary, "tokenizer of llm has 1000 ids and its embeddings .* have 900 rows"),
    (add_layer, r"'model\.layers\.1\.\S+', for which the model of its config.json has no place"),
    (truncate_shard, r"pytorch_model-00001-of-00002\.bin \(200000 bytes\) cannot be read.*truncated or damaged"),
    (empty_shard, r"\(0 bytes\) is not in the zip format"),
    (truncate_safetensors, "cannot be read as safetensors.*truncated or damaged"),
    (quantise, "as F8_E4M3; expected one of F64, F32.*not quantised"),
    (remove_shard, r"pytorch_model-00001-of-00002\.bin is missing; pytorch_model\.bin\.index\.json lists it"),
    (remove_weights, "has no weights; expected one of model.safetensors"),
    (hide_code, r"asks for '(posix|nt)\.system' when it is unpickled.*nothing in it ran"),
    (hide_code_in_old_format, "not in the zip format.*nothing in it ran"),
    (save_whole_module, r"asks for 'torch\.nn\.modules\.linear\.Linear'"),
    (save_training_state, "holds 'state_dict': dict; expected tensors by name"),
    (save_list, "holds a list; expected a dictionary"),
    (lead_elsewhere, r"pytorch_model\.bin\.index\.json lists '\.\./vision/pytorch_model\.bin' for 'x'"),
    (empty_index, "has no 'weight_map'"),
    (damage_config, "config.json is not valid JSON"),
    (list_in_config, "holds a list; expected a JSON object"),
    (remove_tower_config, "config.json is missing"),
    (remove_preprocessor, "preprocessor_config.json is missing"),
    (crop_images, "expected the same side in both"),
    (remove_statistics, "no image_mean and image_std"),
    (other_architecture, r"architectures = \['LlavaMptForCausalLM'\]; expected \['LlavaLlamaForCausalLM'\]"),
    (other_feature_layer, "mm_vision_select_layer = -2; expected -1"),
    (other_aspect_ratio, "image_aspect_ratio = 'anyres'; expected 'pad'"),
    (start_and_end_tokens, "mm_use_im_start_end = True; expected False"),
    (other_projector, "projector_type='identity'"),
    (other_projector_depth, r"2 tensors are in no source, the first of them 'model\.multi_modal_projector\.linear_3"),
    (other_tower_width, "features of width 40.*mm_hidden_size = 3072"),
    (remove_tokenizer, "tokenizer of llm cannot be loaded"),
    (damage_tokenizer, "tokenizer of llm cannot be loaded"),
    (clip_tower, "vision is no ConvNeXt"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_INPUT, ids=[damage.__name__ for damage, _ in BAD_INPUT])
def test_bad_input_is_one_clear_error_and_leaves_nothing(broken, damage, message):
    damage(broken)
    before = sorted(path.name for path in broken.iterdir())
    with pytest.raises(ConversionError, match=message) as raised:
        convert_checkpoint(broken / "llm", broken / "output", vision_tower=broken / "vision")
    assert sorted(path.name for path in broken.iterdir()) == before
    text = str(raised.value)
    assert "\n" not in text and text.endswith("."), "one line, in sentences: what is wrong, what was expected, the fix"
    assert "weights_only" not in text, "never suggest to load it without care"


def test_values_too_large_for_float16(broken):
    edit_weights(broken / "vision/pytorch_model.bin", lambda w: w["embeddings.layernorm.bias"].fill_(2.0**20))
    with pytest.raises(ConversionError, match=r"values up to 1\.05e\+06; expected at most 65504.*bfloat16"):
        convert_checkpoint(broken / "llm", broken / "output", vision_tower=broken / "vision", dtype="float16")
    assert list_hidden(broken) == [] and not (broken / "output").exists()
