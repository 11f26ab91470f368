"""The commands around training data: `convllava data build`, `check`, `show` and `mixtures`."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .commands import CommandGroup
from .options import CheckFailed, JsonOption, TrustOption, print_report, report_errors


data_app = typer.Typer(
    cls=CommandGroup,
    help="Build, check and look at training data.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Built dataset.", show_default=False)]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", metavar="MODEL", help="Checkpoint to train: a Hub id or a path.")
]
LengthOption = Annotated[int | None, typer.Option(metavar="N", min=1, help="Most tokens of a row; needs --model.")]
ImageSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="PIXELS", help="Train at this size; needs --model. [default: the checkpoint's]", show_default=False
    ),
]
VerifyOption = Annotated[
    str, typer.Option(metavar="decode|header", help="Check images as a whole, or by their first bytes (faster).")
]


@contextmanager
def report_data_errors() -> Iterator[None]:
    """`report_errors`, and what is missing where the package was installed without the extra `train`."""
    with report_errors():
        if find_spec("datasets") is None:
            raise ImportError("training data needs the extra `train`: pip install 'convllava-hf[train]'.")
        yield


def add_data_commands(app: typer.Typer) -> None:
    """Adds the commands of this module to the command line."""
    app.add_typer(data_app, name="data")


@data_app.command()
def build(
    llava_json: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="LLaVA-format JSON or JSON Lines; may be repeated.", show_default=False),
    ] = None,
    image_root: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Folder of its images; one for all, or one per FILE.", show_default=False),
    ] = None,
    mixture: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead: a mixture's name, or a YAML file.", show_default=False)
    ] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the mixture's files. [default: that of the YAML file]")
    ] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make.", show_default=False)],
    images: Annotated[
        str, typer.Option(metavar="bytes|paths", help="Copy images into the dataset, or refer to their paths.")
    ] = "bytes",
    image_placement: Annotated[
        str,
        typer.Option(
            metavar="front|keep", help="Move a turn's image to its beginning, as LLaVA v1.5 does, or keep it."
        ),
    ] = "front",
    on_error: Annotated[str, typer.Option(metavar="stop|skip", help="What to do at a bad row.")] = "stop",
    verify: VerifyOption = "decode",
    model: ModelOption = None,
    image_size: ImageSizeOption = None,
    max_length: LengthOption = None,
    long_rows: Annotated[
        str, typer.Option(metavar="error|cut", help="Longer rows: bad, or cut by whole rounds, never inside an image.")
    ] = "error",
    holdout: Annotated[
        int, typer.Option(metavar="N", min=0, help="Make about N rows the split `test`; no image is in both splits.")
    ] = 0,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Let symbolic links below the image root lead out of it.")
    ] = False,
    num_proc: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Processes. [default: one per core]", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a dataset, or another unfinished build.")] = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
):
    """Build a dataset for training from LLaVA-format JSON: parquet with messages and images, and a report.

    Every bad row is named by its file, number (counted from 0), line and id. What is interrupted goes on with the same
    command; rows that were mended in between are read anew.

    \b
    Examples:
      convllava data build --llava-json my.json --image-root images --output DATA
      convllava data build --llava-json a.json --image-root a --llava-json b.json --image-root b --output DATA
      convllava data build --mixture convllava_stage3 --root /data --images paths --on-error skip --output DATA
      convllava data build --llava-json my.json --image-root images --model MODEL --max-length 2048 --output DATA
      convllava data build --llava-json my.json --image-root images --holdout 500 --output DATA
    """
    with report_data_errors():
        from ..data.build import build_dataset
        from ..data.sources import Source, read_mixture

        jsons, roots = llava_json or [], image_root or []
        if bool(jsons) == bool(mixture):
            raise ValueError("give either --llava-json FILE (with --image-root DIR), or --mixture NAME.")
        if mixture:
            sources = read_mixture(mixture, root)
        elif len(roots) not in (0, 1, len(jsons)):
            raise ValueError(
                f"{len(jsons)} --llava-json and {len(roots)} --image-root; give one root, or one per file."
            )
        else:
            roots = roots * len(jsons) if len(roots) == 1 else roots or [None] * len(jsons)
            pairs = zip(jsons, roots, strict=True)
            sources = [Source(file, folder, image_placement=image_placement) for file, folder in pairs]
        report = build_dataset(
            sources,
            output,
            images=images,
            num_proc=num_proc or count_cores(),
            on_error=on_error,
            verify=verify,
            processor=load_processor(model, image_size, trust_remote_code),
            max_length=max_length,
            long_rows=long_rows,
            follow_links=follow_links,
            holdout=holdout,
            force=force,
        )
        text = f"{report.summary()}\nwrote {output}; look at it: convllava data show {output} --out page.html"
        print_report(as_json, {"output": output, **report.to_dict()}, text)


@data_app.command()
def check(
    folder: FolderArgument,
    verify: VerifyOption = "decode",
    model: ModelOption = None,
    image_size: ImageSizeOption = None,
    max_length: LengthOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
):
    """Check every row of a built dataset; exit code 1 where one is bad.

    \b
    Examples:
      convllava data check DATA
      convllava data check DATA --model CHECKPOINT --max-length 2048
    """
    with report_data_errors():
        from ..data.check import check_dataset

        processor = load_processor(model, image_size, trust_remote_code)
        report = check_dataset(folder, verify=verify, processor=processor, max_length=max_length)
        print_report(as_json, report.to_dict(), report.summary())
        if report.bad_rows:
            raise CheckFailed(f"{len(report.bad_rows)} bad rows in {folder}; build it again without them.")


@data_app.command()
def show(
    folder: FolderArgument,
    *,
    out: Annotated[Path, typer.Option("--output", "--out", "-o", metavar="FILE", help="Page to write.")],
    model: ModelOption = None,
    image_size: ImageSizeOption = None,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="How many rows, chosen at random.")] = 20,
    rows: Annotated[
        str | None, typer.Option(metavar="5,17,30-40", help="Instead: these rows, counted from 0.", show_default=False)
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="train|test", help="Of a dataset with a part held out. [default: train]")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the choice.")] = 0,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
):
    """Show rows as a web page: images, also as the model sees them, the prompt, and which tokens carry loss.

    Rows that the build left out are at its end, with the reason. Row numbers are those of `data check`.

    \b
    Examples:
      convllava data show DATA --out page.html --model CHECKPOINT
      convllava data show DATA --out page.html --rows 5,17,30-40
    """
    with report_data_errors():
        from ..data.page import write_page

        processor = load_processor(model, image_size, trust_remote_code)
        numbers = None if rows is None else parse_rows(rows)
        shown, left_out = write_page(folder, out, count, seed, processor, numbers, split)
        more = f", and {left_out} that were left out" if left_out else ""
        report = {"output": out, "rows": shown, "left_out": left_out}
        print_report(as_json, report, f"wrote {shown} rows{more} to {out}")


@data_app.command()
def mixtures(as_json: JsonOption = False):
    """List the mixtures of the original trainings."""
    with report_data_errors():
        from ..shipped import list_titles, read_titles

        print_report(as_json, {"mixtures": read_titles("mixture")}, list_titles("mixture"))


def parse_rows(text: str) -> list[int]:
    """Numbers of rows, such as "5,17,30-40"."""
    numbers = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--rows {text!r}: expected numbers and ranges such as 5,17,30-40.")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def load_processor(model: str | None, image_size: int | None, trust_remote_code: bool):
    """The processor of a checkpoint, set to another image size in pixels if there is one; `None` without checkpoint."""
    if model is None:
        if image_size is not None:
            raise ValueError(f"--image-size {image_size} needs --model, the checkpoint to train.")
        return None
    from transformers import AutoProcessor

    from ..images import set_image_size
    from ..registration import register

    register()
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
    if image_size is not None:
        set_image_size(processor.image_processor, image_size)
    return processor


def count_cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
