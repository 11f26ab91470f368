"""Deltas: bit-identical merging of both references, the way back, wrong bases, interruptions, and the commands."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from convllava_hf.checkpoints import writing
from convllava_hf.checkpoints.staging import MANIFEST
from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.cli.app import app
from convllava_hf.conversion import deltas
from convllava_hf.conversion.deltas import apply_delta, make_delta


REFERENCE = Path(__file__).parents[1] / "reference"
FAMILIES = ["llava_v0_delta", "llavar"]


def read_weights(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def hash_weights(folder):
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in read_weights(folder).items()}


def list_expected(family):
    """Hashes of what the original writes, but for the buffers, which newer versions compute."""
    expected = json.loads((REFERENCE / family / "expected.json").read_text())["target_sha256"]
    return {name: digest for name, digest in expected.items() if "inv_freq" not in name}


@pytest.fixture
def parts(tmp_path):
    """A copy of the smaller reference, to damage: `base` and `delta`."""
    for part in ("base", "delta"):
        shutil.copytree(REFERENCE / "llavar" / part, tmp_path / part)
    return tmp_path


def edit_weights(folder, edit):
    """Edits the tensor or the dictionary of each shard that `edit` wants."""
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    for path in sorted(folder.glob("*.bin")):
        weights = torch.load(path, weights_only=True)
        edit(weights)
        torch.save(weights, path)
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != path.name}
        index["weight_map"] |= dict.fromkeys(weights, path.name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "block"), [("5GB", 2**25), ("100KB", 1000)], ids=["one file", "shards and blocks"])
def test_merging_gives_the_bits_of_the_original(family, size, block, tmp_path, monkeypatch):
    monkeypatch.setattr(deltas, "BLOCK_BYTES", block)
    folder = REFERENCE / family
    report = apply_delta(folder / "base", folder / "delta", tmp_path / "merged", max_shard_size=size)
    assert hash_weights(tmp_path / "merged") == list_expected(family)
    expected = load_file(folder / "expected_target.safetensors")
    assert set(expected) - set(list_expected(family)) == {name for name in expected if "inv_freq" in name}
    assert report.content["counts"] == {"summed": 21, "copied": 2, "left out": 2}
    for name in ("config.json", "tokenizer.model", "added_tokens.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (folder / "delta" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_delta_of_ours_brings_the_checkpoint_back(family, tmp_path):
    base, merged = REFERENCE / family / "base", tmp_path / "merged"
    apply_delta(base, REFERENCE / family / "delta", merged)
    report = make_delta(base, merged, tmp_path / "delta")
    assert report.content["not_restored"] == 0
    apply_delta(base, tmp_path / "delta", tmp_path / "again")
    assert hash_weights(tmp_path / "again") == list_expected(family)


def test_values_that_float16_cannot_bring_back_are_counted(parts):
    apply_delta(parts / "base", parts / "delta", parts / "merged")
    weights = read_weights(parts / "merged")
    weights["model.norm.weight"][:3] = 1e-6  # far finer than the steps of the base's values, which are near 1
    save_file(weights, parts / "merged" / "model.safetensors", {"format": "pt"})
    assert 1 <= make_delta(parts / "base", parts / "merged", parts / "made").content["not_restored"] <= 3


def another_base(parts):
    edit_weights(parts / "base", lambda weights: [tensor.mul_(2) for tensor in weights.values()])


def fewer_words(parts):
    def cut(weights):
        for name in deltas.VOCABULARY_TABLES:
            if name in weights:
                weights[name] = weights[name][:900].clone()

    edit_weights(parts / "base", cut)


def more_words(parts):
    def add(weights):
        for name in deltas.VOCABULARY_TABLES:
            if name in weights:
                weights[name] = torch.cat([weights[name], weights[name][:100]])

    edit_weights(parts / "base", add)


def another_width(parts):
    def cut(weights):
        if "model.norm.weight" in weights:
            weights["model.norm.weight"] = weights["model.norm.weight"][:60].clone()

    edit_weights(parts / "base", cut)


def fewer_layers(parts):
    def drop(weights):
        for name in [name for name in weights if ".layers.1." in name]:
            del weights[name]

    edit_weights(parts / "base", drop)


def more_layers(parts):
    def copy(weights):
        for name in [name for name in weights if ".layers.1." in name]:
            weights[name.replace(".layers.1.", ".layers.2.")] = weights[name].clone()

    edit_weights(parts / "base", copy)


def another_tokenizer(parts):
    shutil.copy(REFERENCE / "llava_v0_delta" / "base" / "tokenizer.model", parts / "base")


def swapped(parts):
    (parts / "base").rename(parts / "x")
    (parts / "delta").rename(parts / "base")
    (parts / "x").rename(parts / "delta")


def merged_as_base(parts):
    apply_delta(parts / "base", parts / "delta", parts / "merged")
    shutil.rmtree(parts / "base")
    (parts / "merged").rename(parts / "base")


def truncated(parts):
    path = parts / "delta" / "pytorch_model-00001-of-00003.bin"
    path.write_bytes(path.read_bytes()[:100_000])


WRONG = [
    (fewer_words, r"'model\.embed_tokens\.weight' has 900 rows in it; expected 968, as 3 of the 971 rows"),
    (more_words, r"'model\.embed_tokens\.weight' has shape \(1068, 64\) in it; expected \(971, 64\)"),
    (another_width, r"'model\.norm\.weight' has shape \(60,\) in it; expected \(64,\)"),
    (fewer_layers, r"it lacks 'model\.layers\.1\."),
    (more_layers, r"it has 'model\.layers\.2\.\S+', which the delta lacks"),
    (another_tokenizer, "tokenizer.model"),
    (swapped, r"the base base .*'\S+inv_freq'"),
    (merged_as_base, r"'model\.mm_projector\.bias'"),
    (truncated, r"pytorch_model-00001-of-00003\.bin \(100000 bytes\) cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), WRONG, ids=[damage.__name__ for damage, _ in WRONG])
def test_a_wrong_base_is_named_before_anything_is_written(parts, damage, message):
    damage(parts)
    before = sorted(path.name for path in parts.iterdir())
    with pytest.raises(ConversionError, match=message) as raised:
        apply_delta(parts / "base", parts / "delta", parts / "output")
    assert sorted(path.name for path in parts.iterdir()) == before
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


def test_a_delta_of_ours_knows_its_base_by_hash(parts):
    apply_delta(parts / "base", parts / "delta", parts / "merged")
    make_delta(parts / "base", parts / "merged", parts / "ours")
    another_base(parts)  # same shapes, other values
    with pytest.raises(ConversionError, match=r"'\S+' .*[0-9a-f]{64}.*[0-9a-f]{64}"):
        apply_delta(parts / "base", parts / "ours", parts / "output")
    assert not (parts / "output").exists()


@pytest.mark.parametrize("where", ["base", "delta", "base/inside", "."])
@pytest.mark.parametrize("force", [False, True])
def test_inputs_are_never_overwritten(parts, where, force):
    before = {path: path.read_bytes() for path in parts.rglob("*") if path.is_file()}
    with pytest.raises(ConversionError, match="--output"):
        apply_delta(parts / "base", parts / "delta", parts / where, force=force)
    assert {path: path.read_bytes() for path in parts.rglob("*") if path.is_file()} == before


def test_existing_output_is_kept_without_force(parts):
    apply_delta(parts / "base", parts / "delta", parts / "output")
    with pytest.raises(ConversionError, match="output .*--force"):
        apply_delta(parts / "base", parts / "delta", parts / "output")
    apply_delta(parts / "base", parts / "delta", parts / "output", force=True)
    assert hash_weights(parts / "output") == list_expected("llavar")


def test_an_interrupted_run_is_continued(parts, monkeypatch):
    arguments = (parts / "base", parts / "delta", parts / "output")
    write, calls = writing._write_safetensors, []

    def stop_at_third(path, *rest):
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(path, *rest)

    monkeypatch.setattr(writing, "_write_safetensors", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        apply_delta(*arguments, max_shard_size="100KB")
    (partial,) = parts.glob(".output.incomplete-*")
    assert not (parts / "output").exists() and len(list(partial.glob("*.safetensors"))) == 2
    apply_delta(*arguments, max_shard_size="100KB")
    assert calls[2:] == [calls[2], *calls[2:3], "model-00004-of-00004.safetensors"]  # the first two are kept
    assert hash_weights(parts / "output") == list_expected("llavar") and not partial.exists()


def test_what_is_damaged_between_two_runs_is_written_anew(parts, monkeypatch):
    """As by a faulty disk: the first run stops at what it reads back, the second one mends it."""
    arguments = (parts / "base", parts / "delta", parts / "output")

    def damage(*arguments):
        written = write_checkpoint(*arguments)
        path = arguments[0] / written[0].name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return written

    write_checkpoint = deltas.write_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(deltas, "write_checkpoint", damage)
        with pytest.raises(ConversionError, match="model-00001-of-00004.safetensors"):
            apply_delta(*arguments, max_shard_size="100KB")
    apply_delta(*arguments, max_shard_size="100KB")
    assert hash_weights(parts / "output") == list_expected("llavar")
    assert [path.name for path in (parts / "output").glob(".*")] == [MANIFEST]


def test_models_and_deltas_are_told_apart_without_buffers(parts):
    apply_delta(parts / "base", parts / "delta", parts / "merged")
    with pytest.raises(ConversionError, match="delta merged .*'model.norm.weight'"):
        apply_delta(parts / "base", parts / "merged", parts / "twice")
    make_delta(parts / "base", parts / "merged", parts / "back")
    with pytest.raises(ConversionError, match="target back .*'model.norm.weight'"):
        make_delta(parts / "base", parts / "back", parts / "twice")


def test_tokens_that_the_base_has_too_are_not_of_the_delta(parts):
    added = json.loads((parts / "delta" / "added_tokens.json").read_text())
    assert added
    (parts / "delta" / "added_tokens.json").write_text(json.dumps({**added, "[OLD]": 5}))
    (parts / "base" / "added_tokens.json").write_text(json.dumps({"[OLD]": 5}))
    apply_delta(parts / "base", parts / "delta", parts / "output")
    assert hash_weights(parts / "output") == list_expected("llavar")


def test_other_inputs_do_not_continue_it(parts, monkeypatch):
    def stop(*rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_write_safetensors", stop)
        with pytest.raises(KeyboardInterrupt):
            apply_delta(parts / "base", parts / "delta", parts / "output")
    (partial,) = parts.glob(".output.incomplete-*")
    (partial / "model.safetensors").write_bytes(b"of another delta")
    edit_weights(parts / "delta", lambda weights: None)  # the same weights in new files
    apply_delta(parts / "base", parts / "delta", parts / "output")
    assert hash_weights(parts / "output") == list_expected("llavar")


def test_commands(tmp_path):
    folder = REFERENCE / "llavar"

    def run(*command):
        return CliRunner().invoke(app, [str(part) for part in command])

    arguments = ["--base", folder / "base", "--output", tmp_path / "merged"]
    result = run("apply-delta", *arguments, "--delta", folder / "delta")
    assert result.exit_code == 0, result.output
    assert "21 summed, 2 copied, 2 left out" in result.stdout
    assert hash_weights(tmp_path / "merged") == list_expected("llavar")
    arguments = ["--base", folder / "base", "--target", tmp_path / "merged", "--output"]
    result = run("make-delta", *arguments, tmp_path / "delta")
    assert result.exit_code == 0 and "all but 0 values" in result.stdout, result.output
    for command, source, key in (("apply-delta", "--delta", "delta"), ("make-delta", "--target", "merged")):
        output = tmp_path / f"{command}-json"
        result = run(command, "--base", folder / "base", source, tmp_path / key, "--output", output, "--json")
        assert json.loads(result.stdout)["output"] == str(output), result.output
    wrong = run("make-delta", *arguments, folder / "base")
    assert wrong.exit_code == 3 and wrong.stderr.count("\n") == 1 and "overlap" in wrong.stderr
