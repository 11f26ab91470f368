"""Model cards: the README.md of a checkpoint with the metadata that the Hub reads.

One template (`card_templates/card.md`) serves converted checkpoints, folders that are pushed without a card, and the
finished cards of the released models (`model_cards/` of the repository, written from `card_templates/families.yaml`).
"""

import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import CONFIG_MAPPING, AutoConfig, LlavaConfig, LlavaNextConfig, PreTrainedConfig

from .. import __version__
from ..model.configuration_convllava import ConvLlavaConfig
from .adapters import is_adapter, read_adapter
from .architecture import check_source
from .reading import read_json
from .weight_maps import ConversionError, describe_cause


TEMPLATES = Path(__file__).with_name("card_templates")
# Sides of squares that cards and `convllava info` list, in pixels.
COMMON_SIDES = (512, 768, 1024, 1536)
CELL = 64  # pixels per token and side of the released ConvLLaVA towers
CONFIG_CLASSES = {"convllava": ConvLlavaConfig, "llava": LlavaConfig, "llava_next": LlavaNextConfig}


def read_facts() -> dict[str, dict]:
    """What is known of each released model: name of its conversion -> facts, those of its family included."""
    content = yaml.safe_load((TEMPLATES / "families.yaml").read_text(encoding="utf-8"))
    facts = {}
    for name, model in content["models"].items():
        facts[name] = {**content["families"][model["family"]], **model}
        facts[name].setdefault("weights", facts[name]["sources"])
        facts[name].setdefault("results_source", f"https://arxiv.org/abs/{facts[name]['arxiv']}")
        facts[name]["results"] = _list_results(facts[name], content["benchmarks"])
    return facts


def _list_results(facts: dict, benchmarks: dict) -> list[EvalResult]:
    """The published numbers as the Hub's results, credited to the paper."""
    results = []
    for column, values in facts.get("results", {}).items():
        dataset, label, metric = benchmarks[column]
        for split, value in values.items() if isinstance(values, dict) else [(None, values)]:
            results.append(
                EvalResult(
                    task_type="image-text-to-text",
                    dataset_type=dataset,
                    dataset_name=label,
                    dataset_split=split,
                    metric_type=metric,
                    metric_value=value,
                    source_name=facts["paper"],
                    source_url=facts["results_source"],
                )
            )
    return results


def read_outline(source: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A checkpoint's configuration, in which a plain one with the same settings stands for the language model's.

    transformers' class for Llama imports torchvision, which takes longer than what `info` and `plan` do.

    Args:
        source: folder, or Hub id.
        trust_remote_code: for models that neither transformers nor this package has.

    Raises:
        ConversionError: settings that its class refuses.
    """
    settings, _ = PreTrainedConfig.get_config_dict(source)
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_CLASSES:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    text = settings.get("text_config")
    try:
        # Else the class's own defaults are needed, or its refusal.
        whole = isinstance(text, dict) and {"hidden_size", "vocab_size"} <= {*text}
        if whole and text.get("model_type") in CONFIG_MAPPING:
            # A plain configuration warns of rotary embeddings.
            plain = {key: text[key] for key in text if not key.startswith("rope_")}
            settings["text_config"] = PreTrainedConfig(**plain)
        return CONFIG_CLASSES[kind].from_dict(settings)
    except Exception as error:  # settings of wrong types fail in every class in its own way
        problem = f"the config.json of {source} cannot be read: {describe_cause(error)}. Get it again."
        raise ConversionError(problem) from error


def list_image_tokens(config: PreTrainedConfig) -> list[tuple[int, int, int]]:
    """Tokens that images of some sizes take.

    Args:
        config: of a ConvLLaVA or of transformers' `llava`.

    Returns:
        Height and width in pixels, number of tokens; one entry for a model that takes one size only, none for
        `llava_next`, whose tokens depend on the tiles that a picture is cut into.
    """
    if config.model_type == "llava_next":
        return []
    side = getattr(config.vision_config, "image_size", None)
    if config.model_type != "convllava":
        return [(side, side, config.image_seq_length)]
    sides = sorted({*COMMON_SIDES, *([side] if isinstance(side, int) else [])})
    factor = config.downsampling_factor
    return [(side, side, config.num_image_tokens(side, side)) for side in sides if side % factor == 0]


def build_model_card(name: str, content: dict) -> str:
    """Writes the card of a converted checkpoint: what it is, how to use it, where every file came from.

    Args:
        name: of the output.
        content: of the conversion report.

    Returns:
        Markdown with the Hub's metadata in front.
    """
    parts = read_sources(content)
    sources = [source["name"] for source in parts if source["revision"]]
    # Published results are of exactly these parts.
    released = [facts for facts in read_facts().values() if facts["weights"] and "training" not in content]
    facts = next((facts for facts in released if set(facts["weights"]) <= set(sources)), {})
    if content.get("training"):
        facts = {"training": content["training"]}
    rows = "\n".join(
        f"| {source['role']} | {source['name']} | {source['revision'] or 'local folder'} | {file['name']} | "
        f"`{file['sha256']}` |"
        for source in parts
        for file in source["files"]
    )
    counts = ", ".join(f"{number} {action}" for action, number in content["counts"].items())
    listed = " `conversion_report.json` lists every one of them." if "tensors" in content else ""
    provenance = (
        f"Made with convllava-hf {content['convllava_hf']}.\n\n"
        f"| part | source | revision | file | SHA-256 |\n|---|---|---|---|---|\n{rows}\n\n"
        f"Tensors: {counts}.{listed}"
    )
    return _render(
        name,
        facts,
        description=f"A {content['kind']}.",
        sources=sources,
        license=content.get("license"),
        is_tower=content["kind"] == "vision tower",
        is_convllava=content.get("architecture") == "ConvLlavaForConditionalGeneration",
        image_tokens=content.get("image_tokens"),
        provenance=provenance,
    )


def build_release_card(name: str) -> str:
    """Writes the finished card of the conversion of a released model.

    Args:
        name: one of [`read_facts`].

    Returns:
        Markdown with the Hub's metadata in front.
    """
    facts = read_facts()[name]
    is_convllava = facts["family"] == "convllava"
    side = facts["resolution"]
    sides = sorted({*COMMON_SIDES, side}) if is_convllava else [side]
    tokens = [(other, other, (other // CELL) ** 2 if is_convllava else facts["tokens"]) for other in sides]
    command = f"convllava convert {facts['weights'][0]} --output {name}"
    if "apply-delta" in facts["about"]:
        delta = facts["weights"][0]
        command = f"convllava apply-delta --base BASE --delta {delta} --output DIR\n{command.replace(delta, 'DIR')}"
    sources = ", ".join(f"[{source}](https://huggingface.co/{source})" for source in facts["sources"])
    provenance = (
        f"Original code: {facts['code']}. Original weights: {sources}.\n\n"
        "The conversion can be repeated; on small models of the same format it is tested to be exact:\n\n"
        f"```bash\n{command}\n```\n\n"
        "It writes a card like this one with the revision of every source and the SHA-256 of each of its files, which "
        "`conversion_report.json` beside the weights lists as well, tensor by tensor."
    )
    return _render(
        name,
        facts,
        description=facts["about"],
        sources=facts["sources"],
        is_convllava=is_convllava,
        image_tokens=tokens,
        provenance=provenance,
    )


def write_release_cards(folder: str | Path) -> None:
    """Writes the finished cards of all released models into a folder, by the names of their conversions."""
    for name in read_facts():
        (Path(folder) / f"{name}.md").write_text(build_release_card(name), encoding="utf-8")


def read_trainer_card(folder: Path) -> ModelCard | None:
    """The card of a folder, if it is the one that a trainer of transformers or TRL writes."""
    file = folder / "README.md"
    card = ModelCard.load(file, ignore_metadata_errors=True) if file.is_file() else None
    return card if card and "generated_from_trainer" in (card.data.tags or []) else None


def read_sources(report: dict) -> list[dict]:
    """The sources that a conversion report names, without entries that are not what we write."""
    sources = report.get("sources")
    whole = []
    for source in sources if isinstance(sources, list) else []:
        if isinstance(source, dict) and isinstance(source.get("role"), str) and isinstance(source.get("name"), str):
            files = source.get("files") if isinstance(source.get("files"), list) else []
            revision = source.get("revision") if isinstance(source.get("revision"), str) else None
            files = [file for file in files if isinstance(file, dict) and {"name", "sha256"} <= file.keys()]
            whole.append({"role": source["role"], "name": source["name"], "revision": revision, "files": files})
    return whole


def get_training(card: ModelCard) -> str:
    """What the card of a trained model or adapter says about its training."""
    return card.text.partition("## How it was trained")[2] or card.text


def split_links(names, folder: Path) -> tuple[list[str], list[str]]:
    """Tells ids of the Hub from names of files and folders of the machine that a model was trained on.

    Args:
        names: what a trainer's card names as a data set or base model: a name, or a list of them.
        folder: of the model; a name that leads somewhere from there, or from here, is no id.

    Returns:
        What can be linked, and the last parts of the others.
    """
    linked, local = [], []
    for name in [names] if isinstance(names, str) else names or []:
        places = [Path(), folder, *folder.parents]
        is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(name))
        if is_id and not any((place / name).exists() for place in places):
            linked.append(name)
        else:
            local.append(Path(str(name)).name)
    return linked, local


def build_folder_card(folder: Path, name: str | None = None) -> str:
    """Writes a card for a checkpoint or an adapter that has none of its own, from what its folder tells.

    The card of a training is TRL's, which knows of text only; what it says about the training is taken over. Data sets
    and base models that are local are described, not linked.

    Args:
        folder: of the checkpoint or of the PEFT adapter.
        name: of the model. Default: the folder's.

    Returns:
        Markdown with the Hub's metadata in front.
    """
    report, name = folder / "conversion_report.json", name or folder.name
    if report.is_file():
        try:
            return build_model_card(name, read_json(report))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            problem = f"{report} is not what convllava-hf writes ({error!r}); delete it, or write a README.md."
            raise ConversionError(problem) from error
    facts, bases = {}, []
    if trained := read_trainer_card(folder):
        data, local = split_links(trained.data.get("datasets"), folder)
        bases, base = split_links(trained.data.get("base_model"), folder)
        facts["training"] = get_training(trained)
        facts |= {"datasets": data} if data else {}
        facts |= {"license": trained.data["license"]} if trained.data.get("license") else {}
        if notes := [f"the data `{name}`" for name in local] + [f"the model `{name}`" for name in base]:
            facts["training"] += f"\n\nLocal, so not linked here: {', '.join(notes)}.\n"
    if is_adapter(folder):
        adapter = read_adapter(folder)
        linked, named = split_links(adapter.base, folder)
        base = (linked or named or ["BASE"])[0]
        return _render(
            name,
            facts,
            description=f"A PEFT adapter ({adapter.describe()}) of `{base}`.",
            sources=linked,
            is_convllava=adapter.is_convllava,
            provenance=f"Pushed with convllava-hf {__version__}.",
            base=base,
            processor=None if (folder / "tokenizer_config.json").is_file() else base,
        )
    kind = read_json(folder / "config.json").get("model_type")
    check_source(folder)
    config = CONFIG_CLASSES[kind].from_pretrained(folder) if kind in CONFIG_CLASSES else None
    return _render(
        name,
        facts,
        description=f"A model of type `{kind}`.",
        sources=bases,
        is_tower=kind == "convnext",
        is_convllava=kind == "convllava",
        image_tokens=config and list_image_tokens(config),
        provenance=f"Pushed with convllava-hf {__version__}. Its folder does not tell where the weights come from.",
    )


def _render(
    name: str,
    facts: dict,
    *,
    description: str,
    sources: list[str],
    provenance: str,
    is_convllava: bool,
    is_tower: bool = False,
    license: str | None = None,
    image_tokens: list[tuple[int, int, int]] | None = None,
    base: str | None = None,
    processor: str | None = None,
) -> str:
    results = facts.get("results", [])
    settings = {key: facts[key] for key in ("license_name", "license_link", "language", "datasets") if key in facts}
    default_tags = ["convnext"] if is_tower else [*(["convllava", "convnext"] if is_convllava else []), "llava"]
    data = ModelCardData(
        library_name="peft" if base else "transformers",
        pipeline_tag="image-feature-extraction" if is_tower else "image-text-to-text",
        base_model=sources or None,
        **({"base_model_relation": "adapter"} if base and sources else {}),
        license=facts.get("license") or license,
        tags=[*facts.get("tags", default_tags), *([] if is_tower else ["multimodal"])],
        model_name=name if results else None,
        eval_results=results or None,
        **settings,
    )
    if "about" in facts:
        description = f"{facts['about']} {facts['architecture']}\n\nPaper: [{facts['paper']}](https://arxiv.org/abs/"
        description += f"{facts['arxiv']}). This is a conversion to transformers by convllava-hf, not by the authors."
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "card.md"),
        name=name,
        model_id=name,
        description=description,
        base=base,
        processor=processor,
        uses="limits" in facts and f"For research on models of images and text.\n\n{facts['limits']}",
        is_tower=is_tower,
        is_convllava=is_convllava,
        trust=", trust_remote_code=True" if is_convllava else "",
        usage_note=facts.get("usage_note"),
        image_tokens=image_tokens,
        resolution=facts.get("resolution"),
        training=facts.get("training", "").strip(),
        results=results,
        paper=facts.get("paper"),
        results_source=facts.get("results_source"),
        provenance=provenance,
        citation=facts.get("citation", "").strip(),
    )
    return str(card).strip() + "\n"


def fill_repo_id(card: str, repo_id: str) -> str:
    """Writes where a model can be loaded from into the commands and snippets of a card of ours; others stay as is."""
    if "pip install convllava-hf" not in card:
        return card
    # Cards of ours name no owner; other lines of that form are the user's.
    card = re.sub(r'^(model_id = )"[^"/]*"$', rf'\g<1>"{repo_id}"', card, flags=re.MULTILINE)
    card = re.sub(r"^(vllm serve )\S+", rf"\g<1>{repo_id}", card, flags=re.MULTILINE)
    return re.sub(r"^(convllava ask .* --model )\S+$", rf"\g<1>{repo_id}", card, flags=re.MULTILINE)
