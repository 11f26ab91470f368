"""What the package brings: recipes (config files of `trl sft`), mixtures (see `data.sources`) and chat templates."""

from pathlib import Path


FOLDERS = {
    "recipe": Path(__file__).with_name("training") / "recipes",
    "mixture": Path(__file__).with_name("data") / "mixtures",
}
# What the originals, and the papers' tables, call formats that are the same.
CHAT_TEMPLATE_ALIASES = {"v0": "llava_v0", "v1": "vicuna_v1", "stablelm": "phi", "mistral": "mistral_instruct"}
CHAT_TEMPLATES = Path(__file__).with_name("chat_templates")


def list_files(kind: str) -> dict[str, Path]:
    """Name -> file, in order of the alphabet.

    Args:
        kind: `"recipe"` or `"mixture"`.
    """
    return {file.stem: file for file in sorted(FOLDERS[kind].glob("*.yaml"))}


def find_file(kind: str, name: str | Path) -> Path:
    """A file of the package, or of anyone else.

    Args:
        kind: `"recipe"` or `"mixture"`.
        name: of a file of the package, or the path of any YAML file.

    Raises:
        FileNotFoundError: neither.
    """
    known = list_files(kind)
    for candidate in (Path(name), known.get(str(name))):
        if candidate is not None and candidate.is_file():
            return candidate
    raise FileNotFoundError(f"no {kind} {str(name)!r}; expected a YAML file or one of: {', '.join(known)}.")


def read_titles(kind: str) -> dict[str, str]:
    """Name of a file -> the comment that it begins with."""
    texts = {name: file.read_text(encoding="utf-8") for name, file in list_files(kind).items()}
    return {name: text.split("\n", 1)[0].lstrip("# ") for name, text in texts.items()}


def list_titles(kind: str) -> str:
    """A line for each file: its name, and the comment that it begins with."""
    titles = read_titles(kind)
    width = max(map(len, titles))
    return "\n".join(f"{name:{width}}  {title}" for name, title in titles.items())


def list_chat_templates() -> dict[str, Path]:
    """Name -> file of the chat templates of this package, by the originals' other names as well."""
    files = {path.stem: path for path in sorted(CHAT_TEMPLATES.glob("*.jinja"))}
    return {**files, **{alias: files[name] for alias, name in CHAT_TEMPLATE_ALIASES.items()}}


def build_chat_template(tokenizer, name: str, image_tag: str | None = None) -> str:
    """One of this package's chat templates, fitted to a tokenizer.

    Args:
        tokenizer: its start token goes in front where it adds one to texts.
        name: of the template.
        image_tag: text that stands for an image, in the formats that wrap the placeholder.

    Raises:
        ValueError: there is no such template.
    """
    template = read_chat_template(name)
    if image_tag:
        template = f"{{%- set image_tag = '{image_tag}' -%}}\n{template}"
    return _add_start_token(tokenizer, template)


def read_chat_template(name: str) -> str:
    templates = list_chat_templates()
    if name not in templates:
        raise ValueError(f"chat_template={name!r}; expected one of {', '.join(templates)}.")
    return templates[name].read_text(encoding="utf-8")


def _add_start_token(tokenizer, template: str) -> str:
    """A chat template, with the token that begins a text in it where the tokenizer adds one.

    Chat servers and TRL tokenise a rendered chat without adding special tokens, so without this their texts would lack
    the first token of every text that the model was trained on. transformers sees it there and adds no second one.
    """
    if not tokenizer.bos_token or tokenizer("A")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return template
    answer = {"role": "assistant", "content": "A."}
    picture = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    chats = [[picture, answer], [{"role": "user", "content": "What is it?"}, answer]]
    best, most = template, 0
    # Tokenizers differ in whether a word after a special token begins with SentencePiece's space by itself.
    for gap in ("", " "):
        candidate = f"{{{{- bos_token ~ '{gap}' -}}}}\n{template}"
        same = []
        for chat in chats:
            plain = tokenizer.apply_chat_template(chat, tokenize=False, chat_template=template)
            started = tokenizer.apply_chat_template(chat, tokenize=False, chat_template=candidate)
            ids = tokenizer(started, add_special_tokens=False)["input_ids"]
            same.append(ids == tokenizer(plain)["input_ids"])
        if same[0] and sum(same) > most:  # texts without an image come second: captions always have one
            best, most = candidate, sum(same)
    return best
