"""The trainer on several processes: every rank runs the tower equally often, and learns what one process learns."""

import json

import pytest
import torch
from ranks import train, train_on_ranks
from safetensors.torch import load_file
from tiny_checkpoint import save_tiny_checkpoint
from tiny_data import make_rows, save_tiny_llava

from convllava_hf.training.sample_answers import PAGE, RECORD


WITH_IMAGE, WITHOUT = 0, 4  # places in `make_rows` of rows with an image and without


def needs(kind: str) -> None:
    if kind == "fsdp2" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"torch {torch.__version__} has no FSDP2 on CPUs")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"convllava": save_tiny_checkpoint(folder / "convllava"), "llava": save_tiny_llava(folder / "llava")}


@pytest.fixture(scope="module")
def save_mixed(tmp_path_factory):
    """Saves rows so that rank 0 gets images, and rank 1 only text; every third step has no image at all."""

    def save(world: int, steps: int = 6):
        rows, order = make_rows(90), []
        images = iter([place for place in range(90) if place % 5 != WITHOUT])
        texts = iter([place for place in range(90) if place % 5 == WITHOUT])
        for step in range(steps):
            order += [next(images) if rank == 0 and step % 3 != 2 else next(texts) for rank in range(world)]
        path = tmp_path_factory.mktemp("rows") / "mixed"
        rows.select(order).save_to_disk(path)
        return path

    return save


def compare(one, many) -> None:
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, many))
    assert set(expected) == set(found)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=0, msg=name)


def run(kind, world, checkpoint, rows, tmp_path, **settings):
    """The same training in one process and in several; the weights must be equal."""
    needs(kind)
    train(checkpoint, rows, tmp_path / "one", per_device_train_batch_size=world, **settings)
    before = load_file(checkpoint / "model.safetensors")
    after = load_file(tmp_path / "one" / "model.safetensors")
    assert any((after[name] - before[name]).abs().max() > 1e-3 for name in before if "multi_modal_projector" in name)
    ranks = train_on_ranks(world, kind, checkpoint, rows, tmp_path / "many", per_device_train_batch_size=1, **settings)
    assert len({passes for passes, _, _ in ranks}) == 1
    assert all(is_sharded == (kind == "fsdp2") for _, is_sharded, _ in ranks)
    compare(tmp_path / "one", tmp_path / "many")
    return ranks


def test_ranks_without_images(models, save_mixed, tmp_path):
    """LLaVA of transformers, sharded: one rank has images and the other text, then neither has."""
    run("fsdp2", 2, models["llava"], save_mixed(2, 3), tmp_path)


def test_llava_resumes_from_its_own_weights(models, save_mixed, tmp_path):
    """They are saved under the names of the released checkpoints, which `Trainer` does not look for."""
    settings = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    rows = save_mixed(2, 3)
    train(models["llava"], rows, tmp_path / "whole", **settings)
    train(models["llava"], rows, tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"), **settings)
    compare(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.slow  # processes that import torch and TRL
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("family", ["llava", "convllava"])
class TestEveryKind:
    def test_accumulation_and_evaluation(self, family, kind, world, models, save_mixed, tmp_path):
        settings = {"gradient_accumulation_steps": 2, "evaluate": True, "per_device_eval_batch_size": 1}
        rows = save_mixed(world)
        ranks = run(kind, world, models[family], rows, tmp_path, **settings)
        losses = [[entry["eval_loss"] for entry in log if "eval_loss" in entry] for _, _, log in ranks]
        assert len(losses[0]) == 3 and all(loss == losses[0] for loss in losses)

    def test_resuming(self, family, kind, world, models, save_mixed, tmp_path):
        needs(kind)
        settings = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1}
        # FSDP2 resumes no parameter that never gets a gradient, and a ViT's last layer is not used.
        settings["trainable"] = ["multi_modal_projector", "language_model"]
        rows = save_mixed(world)
        train_on_ranks(world, kind, models[family], rows, tmp_path / "whole", **settings)
        resume = str(tmp_path / "whole" / "checkpoint-4")
        train_on_ranks(world, kind, models[family], rows, tmp_path / "resumed", resume=resume, **settings)
        compare(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.slow  # processes that import torch and TRL
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("images", ["native", "cached"])
def test_ranks_with_other_numbers_of_sizes(images, kind, world, models, save_mixed, tmp_path):
    """Images in their own shapes: a rank with one size beside one with several; or features instead of images."""
    settings = {"native": True} if images == "native" else {"trainable": ["multi_modal_projector", "language_model"]}
    if images == "cached":
        settings["vision_cache"] = str(tmp_path / "features")
        rows = save_mixed(world)
    else:
        rows = tmp_path / "rows"
        make_rows(12 * world).save_to_disk(rows)
    run(kind, world, models["convllava"], rows, tmp_path, **settings)


@pytest.mark.slow  # processes that import torch and TRL
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("family", ["llava", "convllava"])
def test_ranks_answer_the_same_questions_as_one_process(family, kind, models, save_mixed, tmp_path):
    """`eval_generate`: every rank logs the same share, one of them writes the page."""
    settings = {"evaluate": True, "eval_generate": 4, "per_device_eval_batch_size": 1}
    ranks = run(kind, 2, models[family], save_mixed(2, 3), tmp_path, **settings)
    shares = [[entry["eval_exact_match"] for entry in log if "eval_exact_match" in entry] for _, _, log in ranks]
    assert len(shares[0]) == 3 and shares[0] == shares[1]
    one, many = (json.loads((tmp_path / name / RECORD).read_text()) for name in ("one", "many"))
    assert one == many and list(one["answers"]) == ["1", "2", "3"]
    assert (tmp_path / "many" / PAGE).read_text() == (tmp_path / "one" / PAGE).read_text()
