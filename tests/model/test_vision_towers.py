"""Vision towers: derived sizes, activation checkpointing, no idle parameters, refusals."""

import copy

import pytest
import torch
from packaging.version import Version
from transformers import AutoConfig, LlamaConfig

from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration


NEWEST_COMPILER = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.15"), reason="torch 2.7 cannot trace a convolution over sizes without hints"
)


IMAGE = 5
FOUR = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 8, 16, 24]}
FIVE = {"depths": [1, 1, 2, 1, 1], "hidden_sizes": [8, 8, 16, 24, 40]}
SMALL_TIMM = {"depths": [1, 2, 1, 1], "dims": [8, 8, 16, 24]}
# Settings of the tower, pixels per token along a side, width of the map.
TOWERS = {
    "convnext, four stages": ({"model_type": "convnext", **FOUR}, 32, 24),
    "convnext, five stages": ({"model_type": "convnext", "num_stages": 5, **FIVE}, 64, 40),
    "convnext, patches of two pixels": ({"model_type": "convnext", "patch_size": 2, **FOUR}, 16, 24),
    "convnextv2, four stages": ({"model_type": "convnextv2", **FOUR}, 32, 24),
    "convnextv2, five stages": ({"model_type": "convnextv2", "num_stages": 5, **FIVE}, 64, 40),
    "dinov3_convnext, four stages": ({"model_type": "dinov3_convnext", **FOUR}, 32, 24),
    "dinov3_convnext, five stages": ({"model_type": "dinov3_convnext", **FIVE}, 64, 40),
    "timm convnext_atto": (
        {"model_type": "timm_wrapper", "architecture": "convnext_atto", "model_args": SMALL_TIMM},
        32,
        24,
    ),
    "timm convnextv2_atto": ({"model_type": "timm_wrapper", "architecture": "convnextv2_atto"}, 32, 320),
    "timm fastvit_t8": ({"model_type": "timm_wrapper", "architecture": "fastvit_t8"}, 32, 768),
}


def build_model(vision: dict) -> ConvLlavaForConditionalGeneration:
    vision = copy.deepcopy(vision)
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    torch.manual_seed(0)
    config = ConvLlavaConfig(
        vision_config=AutoConfig.for_model(vision.pop("model_type"), **vision), text_config=text, image_token_id=IMAGE
    )
    return ConvLlavaForConditionalGeneration(config)


@pytest.fixture(params=TOWERS)
def tower(request: pytest.FixtureRequest) -> tuple[dict, int, int]:
    return TOWERS[request.param]


@pytest.fixture
def model(tower: tuple[dict, int, int]) -> ConvLlavaForConditionalGeneration:
    return build_model(tower[0])


def train_step(model: ConvLlavaForConditionalGeneration) -> torch.Tensor:
    """One forward and backward pass in training mode over two rows with an image of two cells each; the loss."""
    factor = model.config.downsampling_factor
    input_ids = torch.tensor([[1, IMAGE, IMAGE, 7, 8, 9]] * 2)
    pixel_values = torch.randn(2, 3, factor, 2 * factor, generator=torch.Generator().manual_seed(0))
    model.train()
    loss = model(input_ids=input_ids, pixel_values=pixel_values, labels=input_ids).loss
    loss.backward()
    return loss.detach()


def enable_checkpointing(model: ConvLlavaForConditionalGeneration) -> None:
    """Activation checkpointing under the name that the installed transformers uses."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


def count_convolutions(model: ConvLlavaForConditionalGeneration) -> dict[str, int]:
    """How often each convolution of the tower runs from now on, by name."""
    counts = {}
    for name, module in model.model.vision_tower.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            counts[name] = 0
            module.register_forward_pre_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    return counts


@torch.no_grad()
def test_derived_sizes_are_those_of_the_tower(tower, model):
    _, factor, width = tower
    config = model.config
    assert (config.downsampling_factor, config.vision_feature_size) == (factor, width)
    features = model.eval().get_image_features(torch.randn(2, 3, 2 * factor, 3 * factor))
    assert features.last_hidden_state.shape == (2, config.num_image_tokens(2 * factor, 3 * factor), width)
    assert [embedding.shape for embedding in features.pooler_output] == [(6, 32)] * 2


def test_activation_checkpointing_recomputes_the_tower_and_changes_no_bit(tower, model):
    counts = count_convolutions(model)
    loss = train_step(model)
    assert set(counts.values()) == {1}

    checkpointed = build_model(tower[0])
    enable_checkpointing(checkpointed)
    counts = count_convolutions(checkpointed)
    assert torch.equal(train_step(checkpointed), loss)
    # All but the stem and the downsampling between stages, which transformers' towers keep.
    assert sum(count == 2 for count in counts.values()) >= sum(count == 1 for count in counts.values())
    assert set(counts.values()) <= {1, 2}
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in checkpointed.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_every_parameter_gets_a_gradient(model):
    train_step(model)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_the_pass_of_a_batch_without_images_joins_every_weight_and_changes_no_statistics(model):
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    _, zero = model.model._embed_images(None, None, None, vision_passes=1)
    zero.backward()
    assert zero == 0
    parts = (model.model.vision_tower, model.model.multi_modal_projector)
    assert all(parameter.grad is not None for part in parts for parameter in part.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    kept = {id(part) for norm in norms for part in norm.modules()}  # a tower keeps their statistics
    assert all(module.training != (id(module) in kept) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("marked", [False, pytest.param(True, marks=NEWEST_COMPILER)])
def test_a_compiled_tower_takes_every_size_with_one_graph(marked):
    """From two images of more than one cell a side on, where the first are no squares; whatever comes, if marked."""
    torch._dynamo.reset()
    tower, graphs = build_model({"model_type": "convnext", "num_stages": 5, **FIVE}).model.vision_tower.eval(), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(tower, backend=count, fullgraph=True, dynamic=True)
    sizes = [(2, 128, 192), (2, 192, 128), (3, 256, 320), (2, 192, 192)]
    for images, height, width in [(1, 64, 64), *sizes, (2, 64, 128)] if marked else sizes:
        pixel_values = torch.randn(images, 3, height, width)
        for dimension in (0, 2, 3) if marked else ():
            torch._dynamo.decorators.mark_unbacked(pixel_values, dimension)
        found = compiled(pixel_values).last_hidden_state
        torch.testing.assert_close(found, tower(pixel_values).last_hidden_state, rtol=0, atol=1e-5)
    assert len(graphs) == 1


def test_timm_is_not_asked_for_what_it_warns_of(monkeypatch):
    from transformers.models.timm_wrapper import modeling_timm_wrapper

    monkeypatch.setattr(modeling_timm_wrapper.logger, "warning_once", lambda text: pytest.fail(text))
    build_model({"model_type": "timm_wrapper", "architecture": "convnext_atto", "model_args": SMALL_TIMM})


def test_no_weights_of_what_comes_after_the_map(model):
    names = [name for name, _ in model.model.vision_tower.named_parameters()]
    assert [name for name in names if name.startswith(("layernorm.", "timm_model.head.", "timm_model.fc."))] == []


@pytest.mark.parametrize(
    "vision, name",
    [
        ({"model_type": "vit"}, "vision_config.model_type='vit'"),
        ({"model_type": "swin"}, "vision_config.model_type='swin'"),
        ({"model_type": "clip_vision_model"}, "vision_config.model_type='clip_vision_model'"),
        ({"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224"}, "architecture='vit_tiny_patch16_224'"),
        ({"model_type": "convnext", **FIVE, "num_stages": 4}, "num_stages=4, 5 depths and 5 hidden_sizes"),
        ({"model_type": "convnext", "depths": [1] * 3, "hidden_sizes": [8] * 3, "num_stages": 3}, "num_stages=3"),
    ],
)
def test_towers_without_a_map_are_refused_by_name(vision, name):
    with pytest.raises(ValueError, match=name):
        build_model(vision)
