"""Chat templates: the prompts of the original code, the marks around answers, and refusals by name."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template


TEMPLATES = {
    path.name.removesuffix(".jinja"): path.read_text(encoding="utf-8")
    for path in files("convllava_hf").joinpath("chat_templates").iterdir()
    if path.name.endswith(".jinja")
}
# Format of the originals (name in conversation_templates.json) -> template.
FORMATS = {
    **{name: name for name in ("llava_v0", "v0_mmtag", "llava_v1", "v1_mmtag", "vicuna_v1", "phi", "tiny_llama")},
    **{name: name for name in ("llama_2", "llava_llama_2", "mistral_instruct", "mpt", "chatml_direct")},
    **{"v0": "llava_v0", "default": "llava_v0", "v1": "vicuna_v1", "mistral_direct": "chatml_direct"},
    "LLaVAR/llava_v1": "llavar",
    "LLaVAR/v1": "llava_v0",
    "LLaVAR/vicuna_v1_1": "vicuna_v1",
}
# Formats of the early code that no released checkpoint uses.
UNUSED = {"simple", "simple_legacy", "multimodal", "mpt_multimodal", "mpt_text", "LLaVAR/mpt", "bair_v1"}
# Of the language models that new models are built from; `test_own_parts` holds them against the models' own.
FAMILIES = {"chatml", "llama_3", "phi_3", "gemma", "mistral_v3"}
WITH_SYSTEM = sorted({*FORMATS.values(), *FAMILIES})
IMAGE, QUESTION = {"type": "image"}, {"type": "text", "text": "What is it?"}


def render(name, messages, **kwargs):
    """The rendered text and the texts of its marked spans."""
    texts, spans = render_jinja_template(
        conversations=[messages], chat_template=TEMPLATES[name], return_assistant_tokens_mask=True, **kwargs
    )
    return texts[0], [texts[0][start:end] for start, end in spans[0]]


def test_the_templates_that_the_package_ships():
    assert sorted(TEMPLATES) == sorted({*FORMATS.values(), *FAMILIES, "plain"}) and len(TEMPLATES) == 19


def test_readme_shows_every_template_as_it_renders():
    readme = files("convllava_hf").joinpath("chat_templates/README.md").read_text(encoding="utf-8")
    chat = [
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is written on the sign?"}]},
        {"role": "assistant", "content": 'The sign says "OPEN".'},
        {"role": "user", "content": "Is the door open?"},
    ]
    for name in WITH_SYSTEM:
        assert render(name, chat, add_generation_prompt=True)[0].strip() in readme
    caption = [
        {"role": "user", "content": "<image>"},
        {"role": "assistant", "content": "A checker board of colored squares."},
    ]
    assert render("plain", caption)[0].strip() in readme


def test_vicuna_renders_every_reference_prompt(reference):
    cases = json.loads((reference / "convllava" / "expected.json").read_text())["cases"]
    rendered = 0
    for name, case in cases.items():
        if case["conv_mode"] != "v1":
            continue
        messages = []
        for question, answer in case["turns"]:
            messages.append({"role": "user", "content": question})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        assert render("vicuna_v1", messages, add_generation_prompt=True)[0] == case["prompt"], name
        rendered += 1
    assert rendered == 7


def test_every_format_of_the_originals(reference):
    """Prompts with and without the example conversation of a format, with and without the last answer."""
    recorded = json.loads((reference / "conversation_templates.json").read_text())
    rendered = set()
    texts = recorded["_messages"]
    chat = [
        {"role": "user", "content": texts["user1"]},
        {"role": "assistant", "content": texts["assistant1"]},
        {"role": "user", "content": texts["user2"]},
        {"role": "assistant", "content": texts["assistant2"]},
    ]
    for repository in ("LLaVA", "LLaVAR", "TinyLLaVA"):
        for name, expected in recorded[repository].items():
            template = FORMATS.get(f"{repository}/{name}", FORMATS.get(name))
            if template is None or f"{repository}/{name}" in UNUSED:
                assert name in UNUSED or expected["sep_style"] == "PLAIN" or f"{repository}/{name}" in UNUSED
                continue
            roles = ("user", "assistant")
            examples = [
                {"role": roles[number % 2], "content": text}
                for number, (_, text) in enumerate(expected["example_messages"])
            ]
            for messages, key in (
                (chat, "prompt_complete"),
                (chat[:3], "prompt"),
                (examples + chat[:3], "prompt_with_examples"),
                (examples + chat[:1], "prompt_single_turn"),
            ):
                asks = messages[-1]["role"] == "user"
                assert render(template, messages, add_generation_prompt=asks)[0] == expected[key], (repository, name)
            rendered.add(template)
    assert rendered == set(FORMATS.values())


def test_plain_renders_the_reference_prompt(reference):
    case = json.loads((reference / "convllava" / "expected.json").read_text())["cases"]["plain_prompt"]
    assert render("plain", [{"role": "user", "content": [IMAGE]}], add_generation_prompt=True)[0] == case["prompt"]


ENDS = {
    **dict.fromkeys(["vicuna_v1", "llava_v1", "llavar", "v1_mmtag", "tiny_llama"], "</s>"),
    **dict.fromkeys(["llama_2", "llava_llama_2", "mistral_instruct"], " </s>"),
    **dict.fromkeys(["chatml", "mpt", "chatml_direct"], "<|im_end|>"),
    **dict.fromkeys(["llava_v0", "v0_mmtag"], "###"),
    **{"phi": "<|endoftext|>", "plain": "\n", "llama_3": "<|eot_id|>", "phi_3": "<|end|>"},
    **{"gemma": "<end_of_turn>", "mistral_v3": "</s>"},
}


@pytest.mark.parametrize(("name", "end"), ENDS.items(), ids=list(ENDS))
def test_marks_cover_answers_and_the_end_of_the_turn(name, end):
    turns = [("<image>\nFirst?", "One."), ("Second?", "Two lines.\nHere.")]
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text, marked = render(name, messages)
    assert [span.lstrip(" ") for span in marked] == [answer + end for _, answer in turns]
    assert ("First?" in text) == (name != "plain")


@pytest.mark.parametrize("name", sorted({*ENDS} - {"plain"}))
def test_an_answer_after_its_prompt_ends_with_its_turn(name):
    """Prompt and completion, as preference data holds them: nothing behind the end is trained, and the chat begins with
    its prompt."""
    question, answer = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}
    prompt, _ = render(name, [question], add_generation_prompt=True)
    whole, _ = render(name, [question, answer])
    assert whole.startswith(prompt)
    assert whole.removeprefix(prompt).strip(" ") == f"This.{ENDS[name]}"


def test_an_image_tag_stands_for_every_image():
    tag = "<im_start><im_patch><im_end>"
    text = TEMPLATES["llavar"]
    for content in ([IMAGE, QUESTION], "<image>\nWhat is it?"):
        messages = [{"role": "user", "content": content}]
        with_tag, _ = render_jinja_template(
            conversations=[messages], chat_template="{%- set image_tag = '" + tag + "' -%}\n" + text
        )
        assert f"USER: {tag}\nWhat is it? " in with_tag[0]
        assert "USER: <image>\nWhat is it? " in render("llavar", messages)[0]
    tagged = render("v1_mmtag", [{"role": "user", "content": [IMAGE, QUESTION]}])[0]
    assert "USER: <Image><image></Image>\nWhat is it? " in tagged


@pytest.mark.parametrize("name", [name for name in WITH_SYSTEM if "mmtag" not in name])
def test_image_parts_stand_where_they_are(name):
    as_list = [{"role": "user", "content": [IMAGE, IMAGE, QUESTION]}]
    as_text = [{"role": "user", "content": "<image>\n<image>\nWhat is it?"}]
    assert render(name, as_list) == render(name, as_text)
    between = [{"role": "user", "content": [{"type": "text", "text": "Is "}, IMAGE, {"type": "text", "text": " red?"}]}]
    assert "Is <image> red?" in render(name, between)[0]


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_a_system_message_is_used(name):
    text, _ = render(name, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert "Be brief." in text and "curious user" not in text


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_unknown_roles_and_parts_are_refused_by_name(name):
    with pytest.raises(TemplateError, match="robot"):
        render(name, [{"role": "robot", "content": "Hi"}])
    with pytest.raises(TemplateError, match="video"):
        render(name, [{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize("text", ["Complete this. ASSISTANT: Sure", "Is </s> a tag?"])
def test_original_masks_give_up_where_a_message_holds_a_separator(text):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "Done."}]
    plain_text, marked = render("vicuna_v1", messages)
    assert marked == [" Done.</s>"]
    assert render("vicuna_v1", messages, original_masks=True) == (plain_text, [])


def test_every_template_names_its_source():
    for name, template in TEMPLATES.items():
        assert template.startswith("{#-"), name
        assert name in Path(__file__).parent.parent.joinpath("src/convllava_hf/chat_templates/README.md").read_text()
