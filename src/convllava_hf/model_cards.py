"""Model cards."""

import re
from pathlib import Path


def build_folder_card(folder: Path) -> str:
    return f"---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n# {folder.name}\n"


def fill_repo_id(card: str, repo_id: str) -> str:
    return re.sub(r'^(model_id = ").*(")$', rf"\g<1>{repo_id}\g<2>", card, flags=re.MULTILINE)
