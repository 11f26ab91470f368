"""What the pages need to become a site: mkdocs calls these functions while it builds (`hooks` in mkdocs.yml)."""

import re
from pathlib import Path


# A link to a file of the repository that is no page, as it works where the repository is looked at.
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#]+)(?:#[^)]*)?\)")


def on_config(config):
    """Leaves pages out of the navigation that are not there."""
    config.nav = keep_pages(config.nav, Path(config.docs_dir))
    return config


def keep_pages(entries: list, folder: Path) -> list:
    """Entries whose page exists; sections without one are dropped."""
    kept = []
    for entry in entries:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            target = keep_pages(target, folder)
            kept += [{title: target}] if target else []
        elif (folder / target).is_file():
            kept.append(entry)
    return kept


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Links that leave the pages become the names of the files."""
    return OUTSIDE.sub(r"`\2`", markdown)
