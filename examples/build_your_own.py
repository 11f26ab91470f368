"""Join a vision tower and a language model into a new ConvLLaVA model, ready for stage 1.

    python examples/build_your_own.py --output my-model     # two tiny random parts, made on the spot: no download

With real parts, for example a ConvNeXt of CLIP and any causal language model of transformers:

    convllava init --vision timm/convnext_large_mlp.clip_laion2b_ft_320 --text Qwen/Qwen3-1.7B \\
        --image-size 1536 --add-stage 6x3072 --output my-model

The tower's four stages and the language model keep their weights. The fifth stage, which divides the number of image
tokens by four, and the projector are new; stage 1 trains these two.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    ConvNextConfig,
    ConvNextModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from convllava_hf.conversion.init import init_model


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, required=True, help="folder to make")
parser.add_argument("--image-size", type=int, default=256, help="side of the square images in pixels")
parser.add_argument("--add-stage", default="2x96", metavar="BLOCKSxWIDTH", help="the tower's new last stage")
arguments = parser.parse_args()

parts = tempfile.TemporaryDirectory()
vision, text = Path(parts.name) / "vision", Path(parts.name) / "text"
torch.manual_seed(0)

# A tower: four stages, with the image processor that says how images are prepared for it.
tower = ConvNextModel(ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 48, 64]))
tower.save_pretrained(vision)
CLIPImageProcessor(size={"shortest_edge": 256}, crop_size=256).save_pretrained(vision)

# A language model with a tokenizer of its own, in the ChatML format.
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
bpe.train_from_iterator(["What is in the picture? A red square and a blue circle."] * 8, trainer)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>"]
)
tokenizer.save_pretrained(text)
config = Qwen3Config(
    vocab_size=len(tokenizer),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    bos_token_id=None,
    eos_token_id=tokenizer.eos_token_id,
)
Qwen3ForCausalLM(config).save_pretrained(text)

# Both become one model: names, vocabulary, processor, chat template and code files included.
report = init_model(
    vision, text, arguments.output, resolution=arguments.image_size, add_stage=arguments.add_stage, dtype="float32"
)
print(report.summary())

# The result loads like any model of transformers. It knows nothing yet: what it says is noise.
model = AutoModelForImageTextToText.from_pretrained(arguments.output)
processor = AutoProcessor.from_pretrained(arguments.output)
image = Image.new("RGB", (320, 200), "red")
chat = [
    {
        "role": "user",
        "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is in the picture?"}],
    }
]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
new = [name for name, _ in model.named_parameters() if name.startswith("model.multi_modal_projector.")]
print(f"\n{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters; the projector's tensors: {len(new)}")
print(
    f"image tokens: {(inputs['input_ids'] == processor.image_token_id).sum().item()} of {inputs['input_ids'].numel()}"
)
print(f"untrained answer: {processor.decode(answer[0, inputs['input_ids'].shape[1] :])!r}")
