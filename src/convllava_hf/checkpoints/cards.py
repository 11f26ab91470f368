"""Model cards: the README.md of a checkpoint with the metadata that the Hub reads.

One template (`card_templates/card.md`) serves converted checkpoints, folders that are pushed without a card, and the
finished cards of the released models (`model_cards/` of the repository, written from `card_templates/families.yaml`).
"""

import json
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import LlavaConfig, PreTrainedConfig

from .. import __version__
from ..model.configuration_convllava import ConvLlavaConfig


TEMPLATES = Path(__file__).with_name("card_templates")
# Sides of squares that cards and `convllava info` list, in pixels.
COMMON_SIDES = (512, 768, 1024, 1536)
CELL = 64  # pixels per token and side of the released ConvLLaVA towers
CONFIG_CLASSES = {"convllava": ConvLlavaConfig, "llava": LlavaConfig}


def read_facts() -> dict[str, dict]:
    """What is known of each released model: name of its conversion -> facts, those of its family included."""
    content = yaml.safe_load((TEMPLATES / "families.yaml").read_text(encoding="utf-8"))
    facts = {}
    for name, model in content["models"].items():
        facts[name] = {**content["families"][model["family"]], **model}
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
                    source_url=f"https://arxiv.org/abs/{facts['arxiv']}",
                )
            )
    return results


def list_image_tokens(config: PreTrainedConfig) -> list[tuple[int, int, int]]:
    """Tokens that images of some sizes take.

    Args:
        config: of a ConvLLaVA or of transformers' `llava`.

    Returns:
        Height and width in pixels, number of tokens; one entry for a model that takes one size only.
    """
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
    sources = [source["name"] for source in content["sources"] if source["revision"]]
    # Published results are of exactly these parts.
    released = [facts for facts in read_facts().values() if facts["sources"]]
    facts = next((facts for facts in released if set(facts["sources"]) <= set(sources)), {})
    rows = "\n".join(
        f"| {source['role']} | {source['name']} | {source['revision'] or 'local folder'} | {file['name']} | "
        f"`{file['sha256']}` |"
        for source in content["sources"]
        for file in source["files"]
    )
    counts = ", ".join(f"{number} {action}" for action, number in content["counts"].items())
    provenance = (
        f"Made with convllava-hf {content['convllava_hf']}.\n\n"
        f"| part | source | revision | file | SHA-256 |\n|---|---|---|---|---|\n{rows}\n\n"
        f"Tensors: {counts}. `conversion_report.json` lists every one of them."
    )
    return _render(
        name,
        facts,
        description=f"A {content['kind']}.",
        sources=sources,
        license=content.get("license"),
        is_tower=content["kind"] == "vision tower",
        is_convllava=content.get("architecture") != "LlavaForConditionalGeneration",
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
    command = f"convllava convert {facts['sources'][0] if facts['sources'] else 'DIR'} --output {name}"
    if "apply-delta" in facts["about"]:
        delta = facts["sources"][0] if facts["sources"] else "DELTA"
        command = f"convllava apply-delta --base BASE --delta {delta} --output DIR\n{command.replace(delta, 'DIR')}"
    sources = [f"[{source}](https://huggingface.co/{source})" for source in facts["sources"]]
    sources = ", ".join(sources) or "the delta that the README there links"
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
        license=None,
        is_tower=False,
        is_convllava=is_convllava,
        image_tokens=tokens,
        provenance=provenance,
    )


def write_release_cards(folder: str | Path) -> None:
    """Writes the finished cards of all released models into a folder, by the names of their conversions."""
    for name in read_facts():
        (Path(folder) / f"{name}.md").write_text(build_release_card(name), encoding="utf-8")


def has_trainer_card(folder: Path) -> bool:
    """Whether the card of a folder is the one that a trainer of transformers or TRL writes."""
    file = folder / "README.md"
    if not file.is_file():
        return False
    return "generated_from_trainer" in (ModelCard.load(file, ignore_metadata_errors=True).data.tags or [])


def build_folder_card(folder: Path) -> str:
    """Writes a card for a checkpoint that has none of its own, from what its folder tells.

    The card of a training is TRL's, which knows of text only; what it says about the training is taken over.

    Args:
        folder: of the checkpoint.

    Returns:
        Markdown with the Hub's metadata in front.
    """
    report = folder / "conversion_report.json"
    if report.is_file():
        return build_model_card(folder.name, json.loads(report.read_text(encoding="utf-8")))
    trained = ModelCard.load(folder / "README.md") if has_trainer_card(folder) else None
    facts = {}
    if trained is not None:
        facts["training"] = trained.text.partition("## How it was trained")[2] or trained.text
        facts |= {key: trained.data[key] for key in ("license", "datasets") if trained.data.get(key)}
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    config = CONFIG_CLASSES[kind].from_pretrained(folder) if kind in CONFIG_CLASSES else None
    return _render(
        folder.name,
        facts,
        description=f"A model of type `{kind}`.",
        sources=(trained is not None and trained.data.base_model) or [],
        license=None,
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
    license: str | None,
    is_tower: bool,
    is_convllava: bool,
    image_tokens: list[tuple[int, int, int]] | None,
    provenance: str,
) -> str:
    results = facts.get("results", [])
    settings = {key: facts[key] for key in ("license_name", "license_link", "language", "datasets") if key in facts}
    default_tags = ["convnext"] if is_tower else [*(["convllava", "convnext"] if is_convllava else []), "llava"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction" if is_tower else "image-text-to-text",
        base_model=sources or None,
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
        results_source=f"https://arxiv.org/abs/{facts.get('arxiv')}",
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
