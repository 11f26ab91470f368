"""A tiny ConvLLaVA and its training: stage 0 in place of pretrained parts, then the three stages with TRL.

Shapes: `B` pages in a batch, `S` tokens in a row of text, `C` width of the fourth vision stage.
"""

import json
import math
import random
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from pages import COLOURS, IMAGE_TASKS, SHAPES, Page, ask, ask_in_words, caption
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm.auto import tqdm
from transformers import ConvNextConfig, LlamaConfig, PreTrainedTokenizerFast

from convllava_hf import (
    ConvLlavaConfig,
    ConvLlavaForConditionalGeneration,
    ConvLlavaImageProcessor,
    ConvLlavaProcessor,
)
from convllava_hf.data.build import build_dataset
from convllava_hf.training.run import run_recipe


NAMES = (*"0123456789", *SHAPES, "nothing")  # what the classifier of stage 0 tells apart
TINTS = ("none", *COLOURS)
LANGUAGE = ("model.language_model.", "lm_head.")


@dataclass(frozen=True)
class Stage:
    """How one stage is trained; its recipe says what is trained.

    Args:
        title: heading on the screen and in the report.
        recipe: of the package; here with other rates and more rows.
        rows: number of training conversations.
        learning_rate: peak of AdamW's learning rate.
    """

    title: str
    recipe: str
    rows: int
    learning_rate: float


STAGES = (
    Stage("stage 1: projector initialisation", "tiny_cpu_stage1", rows=3200, learning_rate=4e-3),
    Stage("stage 2: vision-language pretraining", "tiny_cpu_stage2", rows=8000, learning_rate=3e-3),
    Stage("stage 3: instruction tuning", "tiny_cpu_stage3", rows=4800, learning_rate=1.5e-3),
)
BATCH_SIZE = 16


def build_processor(texts: list[str]) -> ConvLlavaProcessor:
    """A processor with a byte-level tokenizer that was trained on `texts`; every figure is a token of its own."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=500,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<pad>", "<image>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    return ConvLlavaProcessor(
        ConvLlavaImageProcessor(size={"height": 128, "width": 128}, image_aspect_ratio="squash"),
        tokenizer,
        chat_template=files("convllava_hf").joinpath("chat_templates/chatml.jinja").read_text(),
    )


def build_model(processor: ConvLlavaProcessor) -> ConvLlavaForConditionalGeneration:
    """A ConvLLaVA with random weights: five vision stages (maps 64 times smaller), a projector and a language model."""
    tokenizer = processor.tokenizer
    model = ConvLlavaForConditionalGeneration(
        ConvLlavaConfig(
            vision_config=ConvNextConfig(
                num_stages=5,
                depths=[1, 1, 1, 1, 1],
                hidden_sizes=[16, 32, 64, 96, 128],
                layer_scale_init_value=1.0,
                image_size=128,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=2,
                num_attention_heads=8,
                max_position_embeddings=512,
                initializer_range=0.06,  # 0.02, the default for wide models, learns far worse at this width
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
            ),
            image_token_id=processor.image_token_id,
        )
    )
    for module in (*model.model.vision_tower.modules(), *model.model.multi_modal_projector.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model


def fit(parameters, loss_of, rows: list, batch_size: int, learning_rate: float, seed: int) -> list[tuple[int, float]]:
    """The training loop of stage 0: AdamW with warm-up and cosine decay, one pass over `rows`.

    Args:
        parameters: what is trained.
        loss_of: maps a list of rows to a loss.
        rows: training rows of any kind; the loop shuffles a copy.
        batch_size: rows per step.
        learning_rate: peak learning rate.
        seed: order of the rows.

    Returns:
        Pairs of step and loss.
    """
    rows = random.Random(seed).sample(rows, len(rows))
    parameters = list(parameters)
    steps = len(rows) // batch_size
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
    )
    losses = []
    with tqdm(range(steps), unit="step") as bar:
        for step in bar:
            loss = loss_of(rows[step * batch_size : (step + 1) * batch_size])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append((step + 1, loss.item()))
            bar.set_postfix(loss=f"{losses[-1][1]:.3f}", refresh=False)
    return losses


def learn_to_read(model, processor, pages: list[Page], rows: int, seed: int) -> list[tuple[int, float]]:
    """Stage 0a, the language model: describes pages that are written out in words, and answers questions about them."""
    rng = random.Random(f"reading {seed}")
    chats = []
    for index in range(rows):
        page = pages[index % len(pages)]
        turns = talk(page, rng, 2)
        if not turns or rng.random() < 0.5:
            turns = [
                {"role": "user", "content": "Describe the page."},
                {"role": "assistant", "content": caption(page)},
                *turns,
            ]
        turns[0]["content"] = f"{page.words}. {turns[0]['content']}"
        chats.append(turns)
    batch = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, processor_kwargs={"padding": False}
    )
    tokens = [
        (torch.tensor(i), torch.tensor([t if k else -100 for t, k in zip(i, m, strict=True)]))
        for i, m in zip(batch["input_ids"], batch["assistant_masks"], strict=True)
    ]

    def loss_of(rows) -> torch.Tensor:
        ids = nn.utils.rnn.pad_sequence(
            [i for i, _ in rows], batch_first=True, padding_value=processor.tokenizer.pad_token_id
        )
        labels = nn.utils.rnn.pad_sequence([label for _, label in rows], batch_first=True, padding_value=-100)
        return model(input_ids=ids, attention_mask=ids.ne(processor.tokenizer.pad_token_id).long(), labels=labels).loss

    parameters = [p for name, p in model.named_parameters() if name.startswith(LANGUAGE)]
    return fit(parameters, loss_of, tokens, batch_size=32, learning_rate=3e-3, seed=seed)


def learn_to_see(model, processor, pages: list[Page], seed: int) -> list[tuple[int, float]]:
    """Stage 0b, the first four vision stages: say for each cell of a page what it holds, with a throw-away head."""
    tower = model.model.vision_tower
    width = model.config.vision_config.hidden_sizes[3]
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(NAMES) + len(TINTS)))

    def loss_of(pages: list[Page]) -> torch.Tensor:
        images = processor.image_processor([page.image for page in pages], return_tensors="pt")["pixel_values"]
        maps = tower.embeddings(images)
        for stage in tower.encoder.stages[:4]:
            maps = stage(maps)  # at last (B, C, 4, 4)
        features = nn.functional.avg_pool2d(maps, 2).flatten(2).transpose(1, 2)  # (B, 4, C), one per cell
        names, tints = head(features).flatten(0, 1).split((len(NAMES), len(TINTS)), dim=-1)
        things = [thing for page in pages for thing in page.things]
        name = torch.tensor([NAMES.index(thing.name if thing else "nothing") for thing in things])
        tint = torch.tensor([TINTS.index(thing.colour or "none" if thing else "none") for thing in things])
        return nn.functional.cross_entropy(names, name) + 0.5 * nn.functional.cross_entropy(tints, tint)

    parameters = [*tower.embeddings.parameters(), *tower.encoder.stages[:4].parameters(), *head.parameters()]
    return fit(parameters, loss_of, pages, batch_size=16, learning_rate=1e-2, seed=seed)


def talk(page: Page, rng: random.Random, turns: int) -> list[dict]:
    """A conversation of up to `turns` different questions about one page, of tasks drawn at random."""
    pairs = {}
    for task in rng.sample(IMAGE_TASKS, len(IMAGE_TASKS)):
        pair = ask(page, task, rng)
        if pair:
            pairs.setdefault(*pair)
        if len(pairs) == turns:
            break
    return [
        {"role": role, "content": content}
        for pair in pairs.items()
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def build_rows(stage: int, pages: list[Page], count: int, seed: int, folder: Path) -> Path:
    """Training conversations of a stage: pictures and a JSON file as LLaVA's, made into a dataset.

    Args:
        stage: 1 (captions), 2 (a caption, then questions) or 3 (questions, 15% of the rows without a picture).
        pages: training pages, used in turn.
        count: number of conversations.
        seed: of the questions.
        folder: where pictures, JSON and dataset go; pictures that are there are not drawn again.

    Returns:
        The folder of the dataset.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"stage {stage} {seed}")
    rows = []
    for index in range(count):
        page = pages[index % len(pages)]
        describe = [{"role": "user", "content": "Describe the page."}, {"role": "assistant", "content": caption(page)}]
        questions = talk(page, rng, 3)
        picture = f"{index % len(pages)}.jpg"
        if stage == 1:
            turns = describe
        elif stage == 2:
            turns = describe + questions
        elif questions and rng.random() < 0.15:
            question, answer = ask_in_words(page, rng)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            picture = None
        else:
            turns = questions or describe
        row = {"id": str(index), "conversations": []}
        for turn in turns:
            speaker = "human" if turn["role"] == "user" else "gpt"
            row["conversations"].append({"from": speaker, "value": turn["content"]})
        if picture:
            row["image"] = picture
            row["conversations"][0]["value"] = f"<image>\n{turns[0]['content']}"
            if not (folder / "images" / picture).exists():
                (folder / "images" / picture).write_bytes(page.jpeg)
        rows.append(row)
    file = folder / f"stage{stage}.json"
    file.write_text(json.dumps(rows))
    build_dataset([(file, folder / "images")], folder / f"stage{stage}", verify="header", show_progress=False)
    return folder / f"stage{stage}"


def train_stage(stage: Stage, model: Path, data: Path, output: Path, seed: int) -> list[tuple[int, float]]:
    """One of the three stages by its recipe, from one checkpoint to the next."""
    settings = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": output,
        "per_device_train_batch_size": BATCH_SIZE,
        "max_steps": -1,
        "num_train_epochs": 1,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": json.dumps({"min_lr_rate": 0.05}),
        "warmup_steps": 0.05,
        "adam_beta2": 0.98,
        "max_length": 512,
        "gradient_checkpointing": False,
        "group_by_modality_length": False,  # rows are short here: batches that mix tasks teach more than padding costs
        "dataloader_num_workers": 1,  # the second core prepares the next batch
        "logging_steps": 5,
        "logging_first_step": True,
        "save_strategy": "no",
        "seed": seed,
    }
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    trainer = run_recipe(stage.recipe, arguments)
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
