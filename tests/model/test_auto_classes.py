"""The checkpoint as people use it: Auto classes, pipelines and remote code, each in a process of its own."""

import filecmp
import json
import subprocess
import sys
import textwrap
from importlib.resources import files

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ConvNextConfig, LlamaConfig, PreTrainedTokenizerFast

from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration, ConvLlavaImageProcessor, ConvLlavaProcessor
from convllava_hf.checkpoints.code_files import HUB_FILES


IMPORTS = {
    "package": "import convllava_hf; options = {}",
    # Python's own way to make an import fail, as in an environment without the package.
    "remote code": "import sys; sys.modules['convllava_hf'] = None; options = {'trust_remote_code': True}",
}
PREAMBLE = """
import torch
from PIL import Image
red, tall = Image.new("RGB", (300, 200), "red"), Image.new("RGB", (90, 220), "green")
def chat(image):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]}]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random model with a byte-level tokenizer, saved with everything that belongs to it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    specials = ["<pad>", "<image>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<image>", "<|im_start|>"],
        padding_side="left",
    )
    torch.manual_seed(0)
    config = ConvLlavaConfig(
        vision_config=ConvNextConfig(num_stages=5, depths=[1] * 5, hidden_sizes=[8, 8, 16, 16, 24]),
        text_config=LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            eos_token_id=3,
            bos_token_id=None,
            initializer_range=0.2,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vocab_padding=320 - len(tokenizer),
    )
    ConvLlavaForConditionalGeneration(config).save_pretrained(folder)
    template = files("convllava_hf").joinpath("chat_templates/chatml.jinja").read_text(encoding="utf-8")
    image_processor = ConvLlavaImageProcessor(size={"height": 128, "width": 128})
    ConvLlavaProcessor(image_processor, tokenizer, chat_template=template).save_pretrained(folder)
    return folder


def run(code, checkpoint, importing):
    """Runs Python code in a new process; returns what it printed as JSON on its last line."""
    source = IMPORTS[importing] + PREAMBLE + f"\nfolder = {str(checkpoint)!r}\n" + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("importing", IMPORTS)
def test_every_auto_class_loads(checkpoint, importing):
    names = run(
        """
        import json
        from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText,
                                  AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer)
        classes = [AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
                   AutoImageProcessor]
        names = [type(cls.from_pretrained(folder, **options)).__name__ for cls in classes]
        names.append(type(AutoImageProcessor.from_pretrained(folder, backend="pil", **options)).__name__)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        names += [tokenizer.convert_ids_to_tokens(1), tokenizer.padding_side]
        print(json.dumps(names))
        """,
        checkpoint,
        importing,
    )
    assert names == [
        "ConvLlavaConfig",
        "ConvLlavaModel",
        "ConvLlavaForConditionalGeneration",
        "ConvLlavaForConditionalGeneration",
        "ConvLlavaProcessor",
        "ConvLlavaImageProcessor",
        "ConvLlavaImageProcessorPil",
        "<image>",
        "left",
    ]


@pytest.mark.parametrize("importing", IMPORTS)
def test_pipelines_answer_singly_and_in_batches_of_different_sizes(checkpoint, importing):
    results = run(
        """
        import json
        from transformers import pipeline
        results = []
        for task in ("image-text-to-text", "any-to-any"):
            pipe = pipeline(task, model=folder, **options)
            arguments = dict(max_new_tokens=6, return_full_text=False)
            single = [pipe(text=chat(image), **arguments)[0]["generated_text"] for image in (red, tall)]
            batched = pipe(text=[chat(red), chat(tall)], batch_size=2, **arguments)
            results.append([single, [row[0]["generated_text"] for row in batched]])
        print(json.dumps(results))
        """,
        checkpoint,
        importing,
    )
    assert len(results) == 2
    for single, batched in results:
        assert single == batched and single[0] != single[1]


@pytest.mark.parametrize("importing", IMPORTS)
def test_saving_what_was_loaded_gives_the_same_bytes(checkpoint, tmp_path, importing):
    run(
        f"""
        from transformers import AutoModelForImageTextToText, AutoProcessor
        for cls in (AutoModelForImageTextToText, AutoProcessor):
            cls.from_pretrained(folder, **options).save_pretrained({str(tmp_path)!r})
        print(1)
        """,
        checkpoint,
        importing,
    )
    names = sorted(path.name for path in checkpoint.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    _, different, errors = filecmp.cmpfiles(checkpoint, tmp_path, names, shallow=False)
    assert (different, errors) == ([], [])
    assert set(HUB_FILES) <= set(names)


def test_code_files_of_a_checkpoint_are_those_of_the_package(checkpoint):
    package = files("convllava_hf").joinpath("model")
    assert filecmp.cmpfiles(str(package), checkpoint, HUB_FILES, shallow=False) == (list(HUB_FILES), [], [])


def test_the_installed_code_wins_and_stock_tools_find_it_by_name(checkpoint):
    modules, name = run(
        """
        import json, transformers
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
        classes = AutoImageProcessor, AutoProcessor, AutoModelForImageTextToText
        loaded = [cls.from_pretrained(folder, trust_remote_code=True) for cls in classes]
        modules = [type(part).__module__ for part in (*loaded, loaded[1].image_processor)]
        # `transformers serve` looks the architecture up on the module.
        architecture = AutoConfig.from_pretrained(folder).architectures[0]
        print(json.dumps([modules, getattr(transformers, architecture).__name__]))
        """,
        checkpoint,
        "package",
    )
    files = ("image_processing_convllava", "processing_convllava", "modeling_convllava", "image_processing_convllava")
    assert modules == [f"convllava_hf.model.{file}" for file in files]
    assert name == "ConvLlavaForConditionalGeneration"


def test_peft_adapts_the_language_model_by_default(checkpoint):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(ConvLlavaForConditionalGeneration.from_pretrained(checkpoint), LoraConfig())
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 8  # two matrices each for queries and values of two layers
    assert all("language_model" in name and ("q_proj" in name or "v_proj" in name) for name in trained)
