"""New models from anyone's parts: language models in the layouts of their families, joined with towers of every kind.

Each goes the whole way: init, plan, two steps of each stage by the shipped recipes, saving, loading, an answer, and the
end of an answer.
"""

import json
import re

import pytest
import timm
import torch
from tiny_data import save_rows
from tiny_parts import build_family_tokenizer, save_language_model, save_tower
from tiny_sources import edit_json
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, LogitsProcessor
from typer.testing import CliRunner

import convllava_hf
from convllava_hf.checkpoints.turn_ends import find_turn_problem, read_end_ids
from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.cli.app import app
from convllava_hf.conversion.init import init_model
from convllava_hf.hub.doctor import check_checkpoint
from convllava_hf.model.modeling_convllava import set_trainable
from convllava_hf.shipped import build_chat_template, find_file
from convllava_hf.training.plans import describe_plan, get_trainable
from convllava_hf.training.run import run_recipe


# Language model, tower, fifth stage; pixels per token; template; end of an answer.
MATRIX = [
    ("qwen3", "convnextv2_atto", None, 32, "chatml", "<|im_end|>"),
    ("smollm2", "convnext", "1x24", 64, "chatml", "<|im_end|>"),
    ("llama_3", "convnextv2", "1x24", 64, "llama_3", "<|eot_id|>"),
    ("phi_3", "dinov3_convnext", "1x32", 64, "phi_3", "<|end|>"),
    ("gemma", "fastvit_t8", None, 32, "gemma", "<end_of_turn>"),
    ("mistral", "convnext_atto_ols", None, 32, "mistral_v3", "</s>"),
]
# The other pairs of these families and the four kinds of towers.
KINDS = [
    ("convnext", "1x24", 64),
    ("convnextv2", "1x24", 64),
    ("dinov3_convnext", "1x32", 64),
    ("convnextv2_atto", None, 32),
]
MATRIX += [
    (family, *kind, template, end)
    for family, tower, _, _, template, end in MATRIX
    for kind in KINDS
    if kind[0] != tower
]
# What the language models' own templates make of a question, an answer and a question, as far as they agree with ours.
CHAT = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]
RENDERED = {
    "qwen3": "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nWhy?"
    "<|im_end|>\n<|im_start|>assistant\n",
    "llama_3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\nYes.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>"
    "assistant<|end_header_id|>\n\n",
    "phi_3": "<|user|>\nHi?<|end|>\n<|assistant|>\nYes.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n",
    "gemma": "<bos><start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n<start_of_turn>"
    "user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
    "mistral": "<s>[INST] Hi?[/INST] Yes.</s>[INST] Why?[/INST]",
}
TRAINING = "--learning_rate 0.01 --warmup_steps 0 --save_strategy no --report_to none --per_device_train_batch_size 2"


class Write(LogitsProcessor):
    """Makes a model write given tokens."""

    def __init__(self, tokens: list[int]):
        self.tokens = iter(tokens)

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -1e9)
        scores[:, next(self.tokens)] = 0
        return scores


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """Which take as long as a stage, and have tests of their own."""
    monkeypatch.setattr("convllava_hf.training.callbacks.draw_curves", lambda *arguments: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_rows(tmp_path_factory.mktemp("data") / "rows", 4)


@pytest.mark.parametrize(("family", "tower", "add_stage", "factor", "template", "end"), MATRIX, ids=lambda value: value)
def test_the_whole_way(family, tower, add_stage, factor, template, end, data, tmp_path, photo, recwarn):
    text, vision = save_language_model(family, tmp_path / "text"), save_tower(tower, tmp_path / "vision")
    model_path = init_model(vision, text, tmp_path / "model", resolution=128, add_stage=add_stage).output
    wrong = [check for check in check_checkpoint(model_path) if check.problem]
    assert not wrong
    processor = AutoProcessor.from_pretrained(model_path)
    tokenizer, end_id = processor.tokenizer, processor.tokenizer.convert_tokens_to_ids(end)
    assert processor.chat_template == build_chat_template(tokenizer, template)
    assert end_id in read_end_ids(model_path)

    # The last token of each answer that is trained is its end, and nothing behind it.
    chat = [*CHAT, {"role": "assistant", "content": "So."}]
    rows = tokenizer.apply_chat_template(
        chat, chat_template=processor.chat_template, return_dict=True, return_assistant_tokens_mask=True
    )
    last = [i for i, mask in enumerate(rows["assistant_masks"]) if mask and not (rows["assistant_masks"] + [0])[i + 1]]
    assert [rows["input_ids"][i] for i in last] == [end_id] * 2

    for stage in (1, 2, 3):
        arguments = ["--model_name_or_path", str(model_path), "--dataset_name", str(data), *TRAINING.split()]
        before = AutoModelForImageTextToText.from_pretrained(model_path)
        set_trainable(before, get_trainable(before.config, stage))
        planned = CliRunner().invoke(app, ["plan", str(model_path), "--stage", str(stage), "--json"])
        assert planned.exit_code == 0, planned.output
        parts = {part["part"]: (part["trainable"], part["frozen"]) for part in json.loads(planned.stdout)["parts"]}
        assert parts == {part.part: (part.trainable, part.frozen) for part in describe_plan(before)}
        run_recipe(f"tiny_cpu_stage{stage}", [*arguments, "--output_dir", str(tmp_path / f"stage{stage}")])
        model_path = tmp_path / f"stage{stage}"
        after = AutoModelForImageTextToText.from_pretrained(model_path).state_dict()
        moved = {name for name, value in before.state_dict().items() if not torch.equal(value, after[name])}
        planned = {name for name, parameter in before.named_parameters() if parameter.requires_grad}
        tied = {"lm_head.weight"} if before.config.tie_word_embeddings and stage > 1 else set()
        assert moved <= planned | tied
        for part in ("multi_modal_projector", *(("language_model",) if stage > 1 else ())):
            assert any(part in name for name in moved)
        assert any("vision_tower" in name for name in moved) == any("vision_tower" in name for name in planned)

    model, processor = convllava_hf.load(model_path, device="cpu")
    word = tokenizer("A", add_special_tokens=False)["input_ids"][-1]
    stream = convllava_hf.answer(
        model, processor, "What?", photo, stream=True, logits_processor=[Write([word, end_id, word])]
    )
    assert "".join(stream) == "A"
    assert (stream.stats.finish_reason, stream.stats.new_tokens) == ("stop", 2)
    assert stream.stats.image_tokens == (128 // factor) ** 2
    assert convllava_hf.answer(model, processor, "What?", photo, max_new_tokens=2) is not None
    assert not [str(warning.message) for warning in recwarn if warning.category is FutureWarning]


@pytest.mark.parametrize("family", RENDERED)
def test_templates_are_the_language_models_own(family, tmp_path):
    """The text, and the ids that the tokenizer gives to it as a server or a trainer tokenises it."""
    tokenizer = build_family_tokenizer(family)
    name = next(template for other, _, _, _, template, _ in MATRIX if other == family)
    template = build_chat_template(tokenizer, name)
    text = tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert text == RENDERED[family]
    ids = tokenizer.apply_chat_template(CHAT, chat_template=template, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer(RENDERED[family], add_special_tokens=False)["input_ids"]


def test_a_tokenizer_without_a_format_gets_the_tokens_of_one(tmp_path):
    text, vision = save_language_model("other", tmp_path / "text"), save_tower("convnext", tmp_path / "vision")
    report = init_model(vision, text, tmp_path / "model", resolution=128)
    assert set(report.content["vocabulary"]["added"]) == {"<|im_start|>", "<|im_end|>", "<image>", "<pad>"}
    processor = AutoProcessor.from_pretrained(report.output)
    ends = GenerationConfig.from_pretrained(report.output).eos_token_id
    assert processor.tokenizer.convert_ids_to_tokens(ends) == ["<|stop|>", "<|im_end|>"]
    assert len(processor.tokenizer("<|im_start|>")["input_ids"]) == 1
    assert not [check for check in check_checkpoint(report.output) if check.problem]
    assert "<|im_end|> = " in report.summary()


def test_a_base_model_that_ends_texts_gets_the_template_that_ends_alike(tmp_path):
    text, vision = save_language_model("gpt2", tmp_path / "text"), save_tower("convnext", tmp_path / "vision")
    report = init_model(vision, text, tmp_path / "model", resolution=128)
    assert "<|endoftext|>" in AutoProcessor.from_pretrained(report.output).chat_template
    assert set(report.content["vocabulary"]["added"]) == {"<image>", "<pad>"}


@pytest.mark.parametrize(("family", "template"), [("qwen3", "vicuna_v1"), ("gemma", "llama_3"), ("mistral", "phi_3")])
def test_a_template_whose_end_is_no_token_is_refused(family, template, tmp_path):
    text, vision = save_language_model(family, tmp_path / "text"), save_tower("convnext", tmp_path / "vision")
    with pytest.raises(ConversionError, match="--chat-template .*chatml") as refused:
        init_model(vision, text, tmp_path / "model", resolution=128, chat_template=template)
    assert template in str(refused.value)
    assert not (tmp_path / "model").exists()


def test_doctor_names_an_end_where_nothing_stops(converted):
    tokenizer = AutoProcessor.from_pretrained(converted).tokenizer
    end = tokenizer.eos_token_id
    vicuna, chatml = (build_chat_template(tokenizer, name) for name in ("vicuna_v1", "chatml"))
    assert find_turn_problem(tokenizer, vicuna, [end]) is None
    assert "eos_token_id in generation_config.json" in find_turn_problem(tokenizer, vicuna, [end + 1])
    assert re.search(r"'<\|im_end\|>'.*\d+ piece", find_turn_problem(tokenizer, chatml, [end]))
    assert find_turn_problem(tokenizer, build_chat_template(tokenizer, "llava_v0"), [end]) is None  # ends in text
    with pytest.raises(ValueError, match="{% generation %}"):
        find_turn_problem(tokenizer, "{{ messages[0].content }}", [end])


def test_patterns_that_a_tied_model_lacks_are_no_error(tmp_path):
    text, vision = save_language_model("smollm2", tmp_path / "text"), save_tower("convnext", tmp_path / "vision")
    model = AutoModelForImageTextToText.from_pretrained(
        init_model(vision, text, tmp_path / "model", resolution=128).output
    )
    set_trainable(model, ["multi_modal_projector", "language_model", "lm_head"])
    assert model.get_input_embeddings().weight.requires_grad
    set_trainable(model, ["lm_head"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["model.language_model.embed_tokens.weight"]
    with pytest.raises(ValueError, match="lm_tail"):
        set_trainable(model, ["lm_tail"])


def test_batch_norms_of_a_tower_keep_their_statistics(tmp_path):
    text, vision = save_language_model("qwen3", tmp_path / "text"), save_tower("fastvit_t8", tmp_path / "vision")
    model = AutoModelForImageTextToText.from_pretrained(
        init_model(vision, text, tmp_path / "model", resolution=128).output
    ).train()
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    images = torch.randn(2, 3, 64, 64)
    both = model.get_image_features(images).pooler_output
    torch.testing.assert_close(both[0], model.get_image_features(images[:1]).pooler_output[0], rtol=0, atol=1e-5)
    assert before and all(torch.equal(value, dict(model.named_buffers())[name]) for name, value in before.items())


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_init_makes_a_llava_of_a_vit(tower, tmp_path, photo):
    text, vision = save_language_model("mistral", tmp_path / "text"), save_tower(tower, tmp_path / "vision")
    report = init_model(vision, text, tmp_path / "model")
    model, processor = convllava_hf.load(report.output, device="cpu")
    assert model.config.model_type == "llava"
    fresh = {record["target"] for record in report.content["tensors"] if record["action"] == "initialised"}
    assert fresh == {f"multi_modal_projector.linear_{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias")}
    assert not [check for check in check_checkpoint(report.output) if check.problem]
    stream = convllava_hf.answer(model, processor, "What?", photo, stream=True, max_new_tokens=2)
    assert (list(stream), stream.stats.image_tokens)[1] == 4
    with pytest.raises(ConversionError, match=r"resolution=56\b.*\b28\b"):
        init_model(vision, text, tmp_path / "other", resolution=56)
    with pytest.raises(ConversionError, match="--add-stage"):
        init_model(vision, text, tmp_path / "other", add_stage="1x8")


def test_llava_pretraining_starts_from_init_without_a_warning(data, tmp_path, recwarn):
    text, vision = save_language_model("qwen3", tmp_path / "text"), save_tower("clip", tmp_path / "vision")
    path = init_model(vision, text, tmp_path / "model").output
    arguments = ["--model_name_or_path", str(path), "--dataset_name", str(data), *TRAINING.split()]
    arguments += "--gradient_accumulation_steps 1 --max_steps 1 --bf16 false --use_cpu true".split()
    arguments += ["--dataloader_num_workers", "0", "--output_dir", str(tmp_path / "stage1")]
    trainer = run_recipe("llava_pretrain", arguments)
    assert trainer.state.global_step == 1
    assert not [str(warning.message) for warning in recwarn if warning.category is FutureWarning]


@pytest.mark.parametrize(
    ("tower", "settings", "message"),
    [
        ("fastvit_t8", {"add_stage": "1x8"}, "--add-stage.*timm_wrapper"),
        ("resnet18", {}, "'resnet18'.*ConvNeXt V2 or FastViT"),
        ("convnext_atto", {"architecture": "unireplknet_a"}, "'unireplknet_a'.*timm_wrapper"),
    ],
)
def test_towers_that_cannot_be_used_are_refused_with_the_list(tower, settings, message, tmp_path):
    text, vision = save_language_model("qwen3", tmp_path / "text"), save_tower(tower, tmp_path / "vision")
    if "architecture" in settings:
        edit_json(vision / "config.json", architecture=settings.pop("architecture"), model_args={"act_layer": "relu"})
    with pytest.raises(ConversionError, match=message):
        init_model(vision, text, tmp_path / "model", resolution=128, **settings)


def test_a_timm_tower_gives_timms_own_map(tmp_path):
    """ConvNeXt V2 and an overlapping stem, through init, against timm."""
    text = save_language_model("qwen3", tmp_path / "text")
    for name in ("convnextv2_atto", "convnext_atto_ols"):
        vision = save_tower(name, tmp_path / name)
        report = init_model(vision, text, tmp_path / f"{name}-model", resolution=128)
        model = AutoModelForImageTextToText.from_pretrained(report.output).eval()
        original = timm.create_model(name, num_classes=3, depths=(1, 1, 2, 1), dims=(8, 8, 16, 24)).eval()
        original.load_state_dict(torch.load(vision / "pytorch_model.bin", weights_only=True))
        pixels = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            found = model.get_image_features(pixels).last_hidden_state
            expected = original.forward_features(pixels).flatten(2).transpose(1, 2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_recipes_name_no_part_on_its_own_that_a_model_may_lack():
    text = find_file("recipe", "tiny_cpu_stage1").read_text()
    assert "multi_modal_projector|vision_tower" in text
