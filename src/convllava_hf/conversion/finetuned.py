"""What finetuning with LLaVA's own code leaves: LoRA folders and projectors, which need the base they were trained on.

Notation: a layer's weight is `W + scale * B @ A`; `A` is `(r, in)`, `B` is `(out, r)`.

Sources: haotian-liu/LLaVA, `llava/train/train.py` (`get_peft_state_maybe_zero_3`, `safe_save_model_for_hf_trainer`:
what is saved) and `llava/model/builder.py` (how it is put on the base). There factors are merged in
float16, as PEFT does; here in float32, rounded once to the dtype of the base.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, read_adapter
from ..checkpoints.cards import build_folder_card
from ..checkpoints.reading import WEIGHT_FILES, CheckpointReader, StoredTensor, read_tensors
from ..checkpoints.staging import stage_output
from ..checkpoints.weight_maps import LLAVA, ConversionError
from .sources import Source


WHOLE_WEIGHTS = "non_lora_trainables.bin"
PROJECTOR_WEIGHTS = "mm_projector.bin"
FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
# Settings of LoRA that change the arithmetic, and what they are where it is the plain one.
PLAIN_LORA = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
}


@dataclass(frozen=True)
class Finetuning:
    """What was trained.

    Attributes:
        whole: name in the original layout -> tensor that takes the base's place, or that the base lacks.
        factors: name of a layer's weight -> `(A, B)`.
        scale: of the product of the factors.
        files: that hold them.
        adapter: where there are factors.
    """

    whole: dict[str, torch.Tensor]
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float
    files: list[Path]
    adapter: Adapter | None


def is_finetuning(folder: Path) -> bool:
    """Whether a folder holds what was trained on a base, without the base."""
    whole = any((folder / name).is_file() for name in WEIGHT_FILES)
    return not whole and any((folder / name).is_file() for name in (ADAPTER_CONFIG, PROJECTOR_WEIGHTS, WHOLE_WEIGHTS))


def read_finetuning(source: Source) -> Finetuning:
    """Reads a LoRA folder or a projector of LLaVA's code.

    Raises:
        ConversionError: settings of LoRA whose arithmetic is another, or files that are missing or damaged.
    """
    folder, factors, scale, adapter = source.folder, {}, 0.0, None
    files = [folder / name for name in (WHOLE_WEIGHTS, PROJECTOR_WEIGHTS) if (folder / name).is_file()]
    if (folder / ADAPTER_CONFIG).is_file():
        adapter = read_adapter(folder)
        for key, plain in PLAIN_LORA.items():
            if adapter.method != "LORA" or (adapter.settings.get(key) or plain) != plain:
                raise ConversionError(
                    f"{folder / ADAPTER_CONFIG} has {key} = {adapter.settings.get(key)!r} and peft_type = "
                    f"{adapter.method!r}; expected plain LoRA ({key} = {plain!r}), as LLaVA's code trains it."
                )
        factors, rank = _read_factors(adapter)
        alpha = adapter.settings.get("lora_alpha")
        if not isinstance(alpha, int | float) or adapter.settings.get("r") != rank:
            raise ConversionError(
                f"{folder / ADAPTER_CONFIG} has r = {adapter.settings.get('r')!r} and lora_alpha = {alpha!r}; expected "
                f"r = {rank}, that of the weights, and a number. Get both again."
            )
        scale = alpha / (rank**0.5 if adapter.settings.get("use_rslora") else rank)
        # Beside factors, a projector alone is an older copy of what is trained whole.
        files = [file for file in files if file.name == WHOLE_WEIGHTS] or files
        files.append(adapter.weights)
    whole = {}
    for file in files:
        if file.name in (WHOLE_WEIGHTS, PROJECTOR_WEIGHTS):
            stored = {name.removeprefix("base_model."): tensor for name, tensor in read_tensors(file).items()}
            whole |= {re.sub(r"^model\.(?=model\.)", "", name): tensor for name, tensor in stored.items()}
    return Finetuning(whole, factors, scale, files, adapter)


def _read_factors(adapter: Adapter) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], int]:
    halves = {"A": {}, "B": {}}
    for name, tensor in read_tensors(adapter.weights).items():
        match = FACTOR.fullmatch(name)
        if not match:
            raise ConversionError(
                f"{adapter.weights} holds {name!r}; expected factors of LoRA. Convert another folder."
            )
        halves[match[2]][f"{match[1]}.weight"] = tensor
    ranks = {tensor.shape[0] for tensor in halves["A"].values()} | {tensor.shape[-1] for tensor in halves["B"].values()}
    if halves["A"].keys() != halves["B"].keys() or len(ranks) != 1:
        raise ConversionError(f"{adapter.weights} holds factors that do not fit each other. Get it again.")
    return {name: (halves["A"][name], halves["B"][name]) for name in halves["A"]}, ranks.pop()


class FinetunedReader:
    """The tensors of a base with what was trained on it, read one at a time, as [`CheckpointReader`] does.

    Raises:
        ConversionError: a layer that the base lacks, or has in another shape.
    """

    def __init__(self, base: Source, finetuning: Finetuning):
        self.base, self.finetuning = base.reader, finetuning
        self.files = finetuning.files
        self.tensors = dict(base.tensors)
        for name, tensor in finetuning.whole.items():
            known = base.tensors.get(name)
            if known is not None and known.shape != tuple(tensor.shape):
                raise ConversionError(
                    f"{name!r} was trained in the shape {tuple(tensor.shape)}; the base {base.name} has {known.shape}. "
                    "Pass the right --base."
                )
            self.tensors[name] = StoredTensor(tuple(tensor.shape), tensor.dtype, finetuning.files[0].name)
        for name, (first, second) in finetuning.factors.items():
            shape = (second.shape[0], first.shape[1])
            if name not in base.tensors or base.tensors[name].shape != shape:
                found = base.tensors[name].shape if name in base.tensors else "no such weight"
                raise ConversionError(
                    f"{name!r} was trained as {shape}; the base {base.name} has {found}. Pass the right --base."
                )

    def read(self, name: str) -> torch.Tensor:
        if name in self.finetuning.whole:
            return self.finetuning.whole[name]
        tensor = self.base.read(name)
        if name in self.finetuning.factors:
            first, second = (factor.float() for factor in self.finetuning.factors[name])
            tensor = (tensor.float() + self.finetuning.scale * (second @ first)).to(tensor.dtype)
        return tensor

    def close(self):
        self.base.close()


def put_on_base(source: Source, base: Source):
    """Makes a finetuned folder a source of the whole model: its tensors are the base's with what was trained."""
    base.open()
    source.reader = FinetunedReader(base, read_finetuning(source))
    source.also = [base]
    if not any((source.folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json", "vocab.json")):
        source.tokenizer_folder = base.folder


def write_adapter(source: Source, base: str | Path, output: Path, force: bool) -> Path:
    """Writes a LoRA folder of LLaVA's code as a PEFT adapter of a converted base. Every number stays as it is.

    Args:
        source: the LoRA folder.
        base: folder of transformers' `llava`, which the adapter will name.
        output: folder to make.
        force: replace a folder that this package made.

    Raises:
        ConversionError: no factors, a base in another form, or layers that it lacks.
    """
    from peft import LoraConfig

    trained = read_finetuning(source)
    if trained.adapter is None:
        raise ConversionError(
            f"{source.name} holds no LoRA; expected {ADAPTER_CONFIG} with {' or '.join(ADAPTER_WEIGHTS)}."
        )
    reader = CheckpointReader(Path(base)) if Path(base).is_dir() else None
    if reader is None or "multi_modal_projector.linear_1.weight" not in reader.tensors:
        raise ConversionError(
            f"{base} is no converted checkpoint; with --keep-adapter, --base is a llava of transformers. Convert the "
            "base first, or leave --keep-adapter out, which merges."
        )
    tensors = {}
    for name, (first, second) in trained.factors.items():
        published = LLAVA.rename(name)
        if published not in reader.tensors or reader.tensors[published].shape != (second.shape[0], first.shape[1]):
            raise ConversionError(
                f"the base {base} has no {published!r} of the shape of the factors. Pass another --base."
            )
        layer = published.removesuffix(".weight").replace("language_model.model.", "model.language_model.", 1)
        tensors[f"base_model.model.{layer}.lora_A.weight"] = first
        tensors[f"base_model.model.{layer}.lora_B.weight"] = second
    layers = [
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name
    ]
    for name, tensor in trained.whole.items():
        published = LLAVA.rename(name)
        if not isinstance(published, str) or not published.startswith("multi_modal_projector."):
            raise ConversionError(
                f"{name!r} was trained whole, which an adapter does not carry here; leave --keep-adapter out: merge it."
            )
        tensors[f"base_model.model.model.{published}"] = tensor
    whole = any("multi_modal_projector" in name for name in tensors)
    if whole:  # PEFT saves a module or not; what was not trained of it is the base's
        for name in reader.tensors:
            if name.startswith("multi_modal_projector."):
                tensors.setdefault(f"base_model.model.model.{name}", reader.read(name).clone())
    settings = trained.adapter.settings
    config = LoraConfig(
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings.get("lora_dropout") or 0.0,
        use_rslora=bool(settings.get("use_rslora")),
        target_modules=_name_layers(layers),
        modules_to_save=["multi_modal_projector"] if whole else None,
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    with stage_output(output, sum(tensor.nbytes for tensor in tensors.values()), force) as staging:
        config.save_pretrained(staging)
        weights = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(weights, staging / ADAPTER_WEIGHTS[0], {"format": "pt"})
        (staging / "README.md").write_text(build_folder_card(staging, output.name), encoding="utf-8")
    return output


def _name_layers(layers: Sequence[str]) -> str | list[str]:
    """A pattern for layers that are the same in every block, else their names."""
    split = [re.fullmatch(r"(.+\.layers)\.(\d+)\.(.+)", layer) for layer in layers]
    if all(split):
        prefixes, numbers, leaves = ({match[group] for match in split} for group in (1, 2, 3))
        if len(prefixes) == 1 and len(layers) == len(numbers) * len(leaves):
            numbers = "|".join(sorted(numbers, key=int))
            return rf"{re.escape(prefixes.pop())}\.({numbers})\.({'|'.join(map(re.escape, sorted(leaves)))})"
    return sorted(layers)
