"""Model cards: the finished ones are what the template gives, the Hub takes their metadata, their snippets run."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from hub_server import validate_card
from huggingface_hub import ModelCard
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint

from convllava_hf import ConvLlavaConfig
from convllava_hf.checkpoints.cards import (
    build_folder_card,
    build_release_card,
    fill_repo_id,
    list_image_tokens,
    read_facts,
    read_trainer_card,
)
from convllava_hf.conversion.convert import convert_checkpoint


CARDS = sorted(path for path in (Path(__file__).parents[2] / "model_cards").glob("*.md") if path.name != "README.md")
SECTIONS = [
    "Intended use and limits",
    "How to use",
    "Tokens per image",
    "Training",
    "Results",
    "Provenance",
    "Citation",
]


def list_snippets(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)


def test_every_release_has_a_card():
    assert len(CARDS) == 14
    assert {path.stem for path in CARDS} == set(read_facts())


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_finished_cards(path):
    card = path.read_text(encoding="utf-8")
    assert card == build_release_card(path.stem), "see model_cards/README.md"
    assert validate_card(card) == ([], [])
    facts, data = read_facts()[path.stem], ModelCard(card).data
    assert data.library_name == "transformers" and data.pipeline_tag == "image-text-to-text"
    assert data.license and data.datasets and data.tags
    assert data.base_model == facts["sources"] and set(facts["weights"]) <= set(facts["sources"])
    assert "conv" in path.stem.lower() or len(facts["sources"]) == 2, "language model or delta, and tower"
    sections = re.findall(r"^## (.*)$", card, re.MULTILINE)
    assert sections == [name for name in SECTIONS if name != "Results" or facts["results"]]
    for result in data.eval_results or []:
        assert (
            result.source_url == facts["results_source"]
            and facts["results_source"] in card
            and result.source_name == facts["paper"]
        )
    assert bool(data.eval_results) == ("sft" in path.stem or "Tiny" in path.stem or "v1.5" in path.stem)


def test_results_are_those_of_the_papers_tables():
    """A few numbers, typed from the original READMEs once more."""
    for name, label, split, value in (
        ("ConvLLaVA-sft-768-hf", "MME (perception)", None, 1541),
        ("ConvLLaVA-sft-1024-hf", "DocVQA", None, 48.5),
        ("ConvLLaVA-sft-1536-hf", "TextVQA", None, 65.8),
        ("ConvLLaVA-sft-1536-hf", "RefCOCO+", "test-B", 71.5),
        ("ConvLLaVA-sft-1024-hf", "RefCOCOg", "test", 81.2),
        ("TinyLLaVA-3.1B-hf", "VQAv2", None, 79.9),
        ("TinyLLaVA-1.5B-hf", "LLaVA-Bench (in the wild)", None, 60.8),
        ("llava-v1.5-7b-hf", "MME (perception)", None, 1510.7),
        ("llava-v1.5-13b-hf", "VizWiz", None, 53.6),
    ):
        found = {
            (result.dataset_name, result.dataset_split): result.metric_value for result in read_facts()[name]["results"]
        }
        assert found[label, split] == value
        assert len(found) == (17 if "Conv" in name else 12 if "v1.5" in name else 8)


def test_tokens_of_the_cards_are_those_of_the_model():
    config = ConvLlavaConfig()
    config.vision_config.num_stages, config.vision_config.depths = 5, [3, 3, 27, 3, 6]
    config.vision_config.hidden_sizes, config.vision_config.image_size = [192, 384, 768, 1536, 3072], 768
    expected = [(512, 512, 64), (768, 768, 144), (1024, 1024, 256), (1536, 1536, 576)]
    assert list_image_tokens(config) == expected
    card = build_release_card("ConvLLaVA-sft-768-hf")
    rows = re.findall(r"^\| (\d+) x (\d+)(?: \(as trained\))? \| (\d+) \|$", card, re.MULTILINE)
    assert [tuple(map(int, row)) for row in rows] == expected
    assert "| 768 x 768 (as trained) | 144 |" in card


@pytest.fixture(scope="module")
def converted_llava(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava") / "tiny-llava"
    tower = reference / "llava_v1_5" / "clip-vit-tiny-patch14-56"
    convert_checkpoint(reference / "llava_v1_5" / "model", folder, vision_tower=tower)
    return folder


def test_snippets_run(tmp_path, converted_llava, monkeypatch, capsys):
    """Every Python block of every card, once per text, with the name replaced by a tiny checkpoint of the same kind."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (90, 60), "teal").save("photo.jpg")
    tiny = {"convllava": save_tiny_checkpoint(tmp_path / "tiny"), "llava": converted_llava}
    sources = set()
    for path in CARDS:
        kind = "convllava" if path.stem.startswith("Conv") else "llava"
        snippets = list_snippets(path.read_text(encoding="utf-8"))
        assert len(snippets) == 2 and all(f'model_id = "{path.stem}"' in snippet for snippet in snippets)
        sources |= {snippet.replace(f'"{path.stem}"', repr(str(tiny[kind]))) for snippet in snippets}
    assert len(sources) == 4, "one text per kind of model and per way to use it"
    for source in sorted(sources):
        exec(compile(source.replace("max_new_tokens=128", "max_new_tokens=3"), "snippet", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 4


def test_commands_of_the_cards_exist():
    from typer.main import get_command

    from convllava_hf.cli.app import app

    commands = get_command(app).commands
    for path in CARDS:
        blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
        assert {line[0] for line in lines} == {"convllava", "vllm"}
        for line in lines:
            if line[0] == "convllava":
                options = {name for option in commands[line[1]].params for name in option.opts}
                assert {word for word in line if word.startswith("--")} <= options, line
        for recipe in re.findall(r"`(?:convllava train )?(\w+_(?:stage\d|pretrain|finetune))`", path.read_text()):
            from convllava_hf.shipped import find_file

            assert find_file("recipe", recipe).is_file()


def test_converted_checkpoints_tell_where_every_file_came_from(converted_llava, reference):
    card = (converted_llava / "README.md").read_text(encoding="utf-8")
    assert validate_card(card) == ([], [])
    import hashlib

    for file in (reference / "llava_v1_5" / "model").glob("*.bin"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in card
    assert "| 56 x 56 | 16 |" in card
    assert "trust_remote_code" not in card


def test_a_folder_without_a_card_gets_one(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "tiny")
    card = build_folder_card(folder)
    assert validate_card(card) == ([], [])
    assert (
        "| 768 x 768 | 144 |" in card and yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "image-text-to-text"
    )
    filled = fill_repo_id(card, "someone/tiny")
    assert filled.count('model_id = "someone/tiny"') == 2
    assert "vllm serve someone/tiny --model-impl" in filled and "--model someone/tiny\n" in filled
    assert fill_repo_id(filled, "someone/tiny") == filled


@pytest.mark.parametrize(
    "metadata",
    ["license: nonsense", "license: other", "datasets: [a b]", "pipeline_tag: nonsense", "model-index: [{name: a}]"],
)
def test_the_validation_finds_mistakes(metadata):
    errors, _ = validate_card(f"---\n{metadata}\n---\n")
    assert errors


def test_the_card_of_a_trainer_gives_way_but_for_what_it_says_about_the_training(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "tiny")
    trained = "## How it was trained\n\n| | |\n|---|---|\n| recipe | convllava_stage3 |\n"
    metadata = "tags: [generated_from_trainer, trl]\nlicence: license\ndatasets: me/mine\nbase_model: me/base"
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# Model Card\n\nOther.\n\n{trained}")
    assert read_trainer_card(folder)
    card = build_folder_card(folder)
    assert validate_card(card) == ([], [])
    data = ModelCard(card).data
    assert data.pipeline_tag == "image-text-to-text" and data.datasets == ["me/mine"] and data.base_model == ["me/base"]
    assert "| recipe | convllava_stage3 |" in card and "## Training" in card and "Other." not in card
    (folder / "README.md").write_text('# Mine\n\nmodel_id = "a"\n')
    assert read_trainer_card(folder) is None
    assert fill_repo_id((folder / "README.md").read_text(), "someone/tiny") == '# Mine\n\nmodel_id = "a"\n'
