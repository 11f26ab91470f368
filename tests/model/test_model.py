"""The model's own contract: mixed sizes, text-only rows, padding, caches, beams, training with frozen or idle parts."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CompileConfig, ConvNextConfig, LlamaConfig

from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration, ConvLlavaModel
from convllava_hf.model.modeling_convllava import count_vision_passes


IMAGE, PAD, EOS = 98, 97, 96


def make_config(**kwargs):
    vision = ConvNextConfig(
        num_stages=5, depths=[1, 1, 2, 1, 1], hidden_sizes=[8, 16, 24, 32, 40], layer_scale_init_value=1.0
    )
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=1,
        initializer_range=0.2,
    )
    return ConvLlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, **kwargs)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ConvLlavaForConditionalGeneration(make_config()).eval()


def batch_images(*sizes):
    """Random images of the given sizes in one zero-padded batch, and their sizes."""
    generator = torch.Generator().manual_seed(len(sizes))
    pixel_values = torch.zeros(len(sizes), 3, max(h for h, _ in sizes), max(w for _, w in sizes))
    for index, (height, width) in enumerate(sizes):
        pixel_values[index, :, :height, :width] = torch.randn(3, height, width, generator=generator)
    return pixel_values, torch.tensor(sizes)


def batch_rows(*rows):
    """Token ids and attention mask of rows of unequal length, padded on the left."""
    length = max(map(len, rows))
    input_ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": input_ids, "attention_mask": attention_mask}


class TowerCalls:
    """Counts the images that the vision tower sees, by size."""

    def __init__(self, model):
        self.shapes = []
        model.model.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs: self.shapes.append(tuple(args[0].shape)), with_kwargs=True
        )


# ---- images


@torch.no_grad()
def test_features_of_a_mixed_batch_equal_those_of_each_image_alone(model):
    sizes = [(64, 128), (128, 64), (64, 128), (192, 192)]
    pixel_values, image_sizes = batch_images(*sizes)
    calls = TowerCalls(model)
    together = model.get_image_features(pixel_values, image_sizes).pooler_output
    assert sorted(calls.shapes) == [(1, 3, 128, 64), (1, 3, 192, 192), (2, 3, 64, 128)]
    for image, (height, width), features in zip(pixel_values, sizes, together, strict=True):
        alone = model.get_image_features(image[None, :, :height, :width]).pooler_output[0]
        assert features.shape == (height * width // 64**2, 32)
        torch.testing.assert_close(features, alone, rtol=0, atol=1e-6)


@torch.no_grad()
def test_padding_of_the_batch_is_never_read(model):
    pixel_values, image_sizes = batch_images((64, 128), (128, 64))
    clean = model.get_image_features(pixel_values, image_sizes).pooler_output
    pixel_values[0, :, 64:] = float("nan")
    pixel_values[1, :, :, 64:] = float("nan")
    dirty = model.get_image_features(pixel_values, image_sizes).pooler_output
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_features_are_row_major(model):
    pixel_values, _ = batch_images((64, 128))
    features = model.get_image_features(pixel_values).last_hidden_state  # (1, 2, C): left cell, right cell
    moved = pixel_values.clone()
    moved[..., 96:] += 5
    change = (model.get_image_features(moved).last_hidden_state - features).abs().sum(-1)[0]
    assert change[1] > change[0]


@pytest.mark.parametrize(
    "sizes, message",
    [
        (torch.tensor([[64, 100]]), "64x100.*64"),
        (torch.tensor([[64, 256]]), "64x256.*64x128"),
        (torch.tensor([[64, 64], [64, 64]]), "2 entries for 1 images"),
        (torch.zeros(0, 2, dtype=torch.long), "0 entries for 1 images"),
    ],
)
def test_wrong_image_sizes_are_refused(model, sizes, message):
    with pytest.raises(ValueError, match=message):
        model.get_image_features(torch.zeros(1, 3, 64, 128), sizes)


def test_a_wrong_number_of_placeholders_is_refused_with_both_numbers(model):
    with pytest.raises(ValueError, match="3 placeholders.*2 features"):
        model(input_ids=torch.tensor([[1, IMAGE, IMAGE, IMAGE, 5]]), pixel_values=torch.zeros(1, 3, 64, 128))


def test_passes_of_the_tower_are_counted(model):
    pixel_values, image_sizes = batch_images((64, 128), (128, 64), (64, 128))
    assert count_vision_passes({"input_ids": None}) == 0
    assert count_vision_passes({"vision_features": torch.zeros(2, 40), "image_sizes": image_sizes}) == 0
    assert count_vision_passes({"pixel_values": pixel_values}) == 1
    assert count_vision_passes({"pixel_values": pixel_values, "image_sizes": image_sizes}) == 2


@pytest.mark.parametrize("kind", ["mixed sizes", "one size", "text", "features"])
def test_missing_passes_run_idle_and_change_nothing(model, kind):
    """The tower runs as often as asked for and the projector once, so processes that share weights stay in step."""
    batch = batch_rows([1, IMAGE, IMAGE, 5, IMAGE, IMAGE, 6])
    pixel_values, image_sizes = batch_images((64, 128), (128, 64) if kind == "mixed sizes" else (64, 128))
    if kind == "text":
        batch = batch_rows([1, 5, 6])
    elif kind == "features":
        features = model.get_image_features(pixel_values).last_hidden_state.flatten(0, 1).detach()
        batch["vision_features"] = features
    else:
        batch |= {"pixel_values": pixel_values, "image_sizes": image_sizes}
    expected = model(**batch).logits
    calls, projected = TowerCalls(model), []
    model.model.multi_modal_projector.register_forward_hook(lambda *args: projected.append(1))
    logits = model(**batch, vision_passes=3).logits
    assert len(calls.shapes) == 3 and len(projected) == 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    model(**batch, labels=batch["input_ids"], vision_passes=3).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    if kind == "mixed sizes":
        with pytest.raises(ValueError, match="vision_passes=1|vision_passes=0"):
            model(**batch, vision_passes=0)


def test_one_pass_does_not_read_the_sizes(model):
    pixel_values, image_sizes = batch_images((64, 128))
    rows = batch_rows([1, IMAGE, IMAGE, 5])
    expected = model(**rows, pixel_values=pixel_values, image_sizes=image_sizes).logits
    unreadable = torch.empty_like(image_sizes, device="meta")
    assert torch.equal(
        model(**rows, pixel_values=pixel_values, image_sizes=unreadable, vision_passes=1).logits, expected
    )


# ---- text


@torch.no_grad()
def test_text_only_rows_and_batches_leave_the_tower_alone(model):
    calls = TowerCalls(model)
    rows = batch_rows([1, 5, 6, 7], [1, IMAGE, IMAGE, 9, 4, 5])
    alone = model(input_ids=torch.tensor([[1, 5, 6, 7]])).logits
    assert calls.shapes == []
    pixel_values, _ = batch_images((64, 128))
    mixed = model(**rows, pixel_values=pixel_values).logits
    assert calls.shapes == [(1, 3, 64, 128)]
    torch.testing.assert_close(mixed[0, -4:], alone[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_inputs_embeds_give_the_same_as_input_ids(model):
    pixel_values, _ = batch_images((64, 128))
    input_ids = torch.tensor([[1, 7, IMAGE, IMAGE, 9]])
    by_ids = model(input_ids=input_ids, pixel_values=pixel_values).logits
    embeds = model.get_input_embeddings()(input_ids)
    torch.testing.assert_close(model(inputs_embeds=embeds, pixel_values=pixel_values).logits, by_ids)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(input_ids=input_ids, inputs_embeds=embeds)


def test_scores_of_vocabulary_padding_take_no_probability():
    torch.manual_seed(0)
    padded = ConvLlavaForConditionalGeneration(make_config(vocab_padding=29)).eval()
    logits = padded(input_ids=torch.tensor([[1, 5, 6]])).logits
    assert logits.softmax(-1)[..., 99:].sum() == 0
    loss = padded(input_ids=torch.tensor([[1, 5, 6]]), labels=torch.tensor([[1, 5, 6]])).loss
    expected = torch.nn.functional.cross_entropy(logits[0, :-1, :99], torch.tensor([5, 6]))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert padded.lm_head.weight.grad[99:].abs().sum() == 0
    # Averages over the vocabulary and divisions of the scores stay finite.
    smoothed = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor([5, 6]), label_smoothing=0.1)
    log_probabilities = (logits / 0.7).log_softmax(-1)
    assert smoothed.isfinite() and (log_probabilities.exp() * log_probabilities).sum().isfinite()
    padded.resize_token_embeddings(192)
    assert padded.config.vocab_padding == 0


# ---- generation


def prompts(model):
    """Three rows: two images, one image, none; and what generates from them."""
    pixel_values, image_sizes = batch_images((64, 64), (64, 128), (128, 64))
    rows = [[1, IMAGE, 5, IMAGE, IMAGE, 6], [1, 4, 4, 9, IMAGE, IMAGE, 8, 7, 7], [1, 12, 13]]
    singles = [
        {"input_ids": torch.tensor([rows[0]]), "pixel_values": pixel_values[:2], "image_sizes": image_sizes[:2]},
        {"input_ids": torch.tensor([rows[1]]), "pixel_values": pixel_values[2:], "image_sizes": image_sizes[2:]},
        {"input_ids": torch.tensor([rows[2]])},
    ]
    return {**batch_rows(*rows), "pixel_values": pixel_values, "image_sizes": image_sizes}, singles


OPTIONS = {
    "greedy": {"do_sample": False},
    "without cache": {"do_sample": False, "use_cache": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_batched_generation_equals_row_by_row(model, options):
    batch, singles = prompts(model)
    length = batch["input_ids"].shape[1]
    together = model.generate(**batch, **options, max_new_tokens=8, min_new_tokens=8)[:, length:]
    greedy = OPTIONS["beams"] if "num_beams" in options else OPTIONS["greedy"]
    for row, single in zip(together, singles, strict=True):
        alone = model.generate(**single, **greedy, max_new_tokens=8, min_new_tokens=8)[0]
        assert row.tolist() == alone[single["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["cache", "without cache", "beams"],
)
def test_generation_encodes_images_once(model, options):
    batch, _ = prompts(model)
    calls = TowerCalls(model)
    model.generate(**batch, **options, do_sample=False, max_new_tokens=5, min_new_tokens=5)
    assert sum(shape[0] for shape in calls.shapes) == 3


def test_a_prompt_read_in_chunks_answers_the_same(model):
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("the oldest versions of transformers do not divide encoded images among chunks")
    inputs = prompts(model)[1][0]
    settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    assert torch.equal(model.generate(**inputs, **settings, prefill_chunk_size=3), model.generate(**inputs, **settings))


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}])
def test_beams_and_samples_of_inputs_embeds_see_the_images_of_their_row(model, options):
    batch, _ = prompts(model)
    settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, **options}
    expected = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(model.generate(**batch, inputs_embeds=embeds, **settings), expected)


def test_placeholders_are_never_generated_whatever_the_checkpoint_says(model):
    inputs = {"input_ids": torch.tensor([[1, 5, 6]])}
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[IMAGE] = model.model(**inputs).last_hidden_state[0, -1]  # the likeliest by far
    assert model.generation_config.suppress_tokens is None
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=4, suppress_tokens=[7])
    assert not {IMAGE, 7} & set(tokens[0, 3:].tolist())
    assert model.generation_config.suppress_tokens is None


def test_prompt_lookup_proposes_no_placeholders(model):
    inputs = prompts(model)[1][0]
    settings = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, prompt_lookup_num_tokens=3), expected)


@torch.no_grad()
def test_positions_to_score_in_every_form_of_transformers(model):
    input_ids = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 4]])
    full = model(input_ids=input_ids).logits
    places = torch.tensor([[0, 2], [1, 3]])
    mask = torch.zeros(2, 4, dtype=torch.bool).scatter(1, places, True)
    for kept, expected in (
        (2, full[:, -2:]),
        (torch.tensor([1, 3]), full[:, [1, 3]]),
        (places, torch.stack([full[0, [0, 2]], full[1, [1, 3]]])),
        (mask, torch.cat([full[0, [0, 2]], full[1, [1, 3]]])),
    ):
        torch.testing.assert_close(model(input_ids=input_ids, logits_to_keep=kept).logits, expected)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.8"), reason="the compiler of torch 2.7 stops at configurations"
)
def test_the_forward_with_image_sizes_is_one_graph(model):
    torch._dynamo.reset()
    pixel_values, image_sizes = batch_images((64, 128), (64, 128))
    inputs = {"input_ids": torch.tensor([[1, IMAGE, IMAGE, 5]] * 2), "pixel_values": pixel_values}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        logits = compiled(**inputs, image_sizes=image_sizes).logits
        torch.testing.assert_close(logits, model(**inputs).logits)


@torch.no_grad()
def test_the_model_exports_with_dynamic_images(model):
    """Batch, height and width; images of one size, of two cells or more a side: export takes one for a constant."""

    def make(batch, height, width):
        tokens = height * width // 64**2
        pixel_values, image_sizes = batch_images(*[(height, width)] * batch)
        input_ids = torch.tensor([[1, *[IMAGE] * tokens, 5, 6]] * batch)
        return {"input_ids": input_ids, "pixel_values": pixel_values, "image_sizes": image_sizes}

    class Forward(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, pixel_values, image_sizes):
            outputs = self.model(
                input_ids=input_ids, pixel_values=pixel_values, image_sizes=image_sizes, use_cache=False
            )
            return outputs.logits

    auto = torch.export.Dim.AUTO
    dynamic = {"input_ids": {0: auto, 1: auto}, "pixel_values": {0: auto, 2: auto, 3: auto}, "image_sizes": {0: auto}}
    program = torch.export.export(Forward(), (), make(2, 128, 192), dynamic_shapes=dynamic, strict=False).module()
    for inputs in (make(3, 256, 128), make(2, 192, 256)):
        torch.testing.assert_close(program(**inputs), model(**inputs).logits, rtol=0, atol=1e-5)


# ---- generation with other inputs


def test_samples_of_one_row_see_the_images_of_that_row(model):
    batch, singles = prompts(model)
    torch.manual_seed(0)
    several = model.generate(
        **batch, do_sample=True, top_k=1, num_return_sequences=2, max_new_tokens=6, min_new_tokens=6
    )
    length = batch["input_ids"].shape[1]
    for row, tokens in enumerate(several[:, length:]):
        single = singles[row // 2]
        alone = model.generate(**single, do_sample=False, max_new_tokens=6, min_new_tokens=6)
        assert tokens.tolist() == alone[0, single["input_ids"].shape[1] :].tolist()


def test_generation_continues_from_inputs_embeds(model):
    input_ids = torch.tensor([[1, 5, 6, 7]])
    by_ids = model.generate(input_ids=input_ids, do_sample=False, max_new_tokens=5, min_new_tokens=5)[0, 4:]
    embeds = model.get_input_embeddings()(input_ids)
    by_embeds = model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones(1, 4), do_sample=False, max_new_tokens=5, min_new_tokens=5
    )[0]
    assert by_ids.tolist() == by_embeds[-5:].tolist()


@torch.no_grad()
def test_the_decode_step_compiles_as_one_graph(model):
    torch._dynamo.reset()
    try:
        torch.compile(model.model.language_model, backend="eager", fullgraph=True)(torch.tensor([[1, 5]]))
    except torch._dynamo.exc.Unsupported:
        pytest.skip(f"torch {torch.__version__} does not compile transformers' own Llama as one graph")
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    input_ids = torch.tensor([[1, 5, 6, 7]])
    cached = model(input_ids=input_ids, use_cache=True)
    step = {"input_ids": torch.tensor([[8]]), "past_key_values": cached.past_key_values}
    compiled = torch.compile(model, backend=count, fullgraph=True)
    logits = compiled(**step).logits
    assert len(graphs) == 1
    expected = model(input_ids=torch.tensor([[1, 5, 6, 7, 8]])).logits[:, -1:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_generation_with_a_static_cache_compiles_and_answers_the_same(model):
    """Inductor, as `generate` uses it on a GPU by itself: one graph for all decode steps."""
    inputs, _ = prompts(model)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}
    expected = model.generate(**inputs, **settings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = CompileConfig(fullgraph=True, mode="default")
    compiled._compile_all_devices = True  # a CPU too
    found = model.generate(**inputs, **settings, cache_implementation="static", compile_config=compiled)
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---- training


def training_batch():
    pixel_values, image_sizes = batch_images((64, 128), (128, 64))
    rows = batch_rows([1, IMAGE, IMAGE, 5, 6, 7], [1, 4, IMAGE, IMAGE, 8])
    labels = rows["input_ids"].masked_fill((rows["input_ids"] == IMAGE) | (rows["input_ids"] == PAD), -100)
    return {**rows, "labels": labels, "pixel_values": pixel_values, "image_sizes": image_sizes}


def enable_checkpointing(model):
    """Activation checkpointing under the name that the installed transformers uses."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


def test_every_parameter_gets_a_gradient(model):
    model.train()
    model(**training_batch()).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert not any("vision_tower.layernorm" in name for name in model.state_dict())


def test_activation_checkpointing_recomputes_vision_blocks_with_identical_gradients(model):
    model.train()
    plain = model(**training_batch()).loss
    plain.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    enable_checkpointing(model)
    runs = []
    blocks = [module for module in model.modules() if type(module).__name__ == "ConvNextLayer"]
    for block in blocks:
        block.dwconv.register_forward_hook(lambda *args: runs.append(1))
    loss = model(**training_batch()).loss
    forward_runs = len(runs)
    loss.backward()
    assert len(blocks) == 6 and len(runs) == 2 * forward_runs  # each block ran again in the backward pass
    assert torch.equal(loss, plain)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


def test_frozen_early_stages_keep_no_graph(model):
    model.train()
    tower = model.model.vision_tower
    for part in (tower.embeddings, *tower.encoder.stages[:2]):
        part.requires_grad_(False)
    outputs = []
    tower.encoder.stages[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    model(**training_batch()).loss.backward()
    assert outputs and not any(output.requires_grad for output in outputs)
    assert tower.encoder.stages[2].layers[0].dwconv.weight.grad is not None


def test_the_headless_model_loads_from_a_full_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    headless, report = ConvLlavaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    input_ids = torch.tensor([[1, 5, 6]])
    torch.testing.assert_close(headless(input_ids).last_hidden_state, model.model(input_ids).last_hidden_state)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_implementation_passes_through(model, tmp_path, attention):
    model.save_pretrained(tmp_path)
    loaded = ConvLlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)
    assert loaded.model.language_model.config._attn_implementation == attention
    batch, _ = prompts(model)
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(loaded(**batch).logits[kept], model(**batch).logits[kept], rtol=0, atol=1e-5)
