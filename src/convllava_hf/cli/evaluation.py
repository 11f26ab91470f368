"""The commands around evaluation: `convllava eval`, `score`, `eval-report`, `eval-convert` and `ground`."""

from pathlib import Path
from typing import Annotated

import typer

from .ask import (
    DeviceOption,
    DtypeOption,
    ImageTokensOption,
    QuantizeOption,
    RuntimeOption,
    TemperatureOption,
    TrustOption,
    load_model,
)
from .options import JsonOption, RevisionOption, print_json, print_report, report_errors


QuestionsOption = Annotated[
    Path | None, typer.Option("--questions", metavar="FILE", help="Question file.", show_default=False)
]
AnnotationsOption = Annotated[
    Path | None, typer.Option(metavar="PATH", help="Truths, where they are in another file.", show_default=False)
]


def add_evaluation_commands(app: typer.Typer) -> None:
    """Adds the commands of this module to the command line."""
    app.command(name="eval")(evaluate)
    app.command()(score)
    app.command(name="eval-report")(write_report)
    app.command(name="eval-convert")(convert)
    app.command()(ground)


def evaluate(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="[CHECKPOINT]", help="Hub id or path; none with --server or --rescore.")
    ] = None,
    *,
    task: Annotated[
        str | None, typer.Option(metavar="TASK", help="scienceqa, pope, textvqa, ..., exact-match, contains, anls.")
    ] = None,
    questions: QuestionsOption = None,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the images.")] = None,
    annotations: AnnotationsOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder of results.")] = None,
    rescore: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Only compute the results of a folder again.", show_default=False)
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask an OpenAI-compatible server instead.", show_default=False)
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Model of the server. [default: the first that it lists]")
    ] = None,
    prompt_style: Annotated[
        str, typer.Option(metavar="NAME", help="checkpoint, convllava, llava, llavar or tinyllava.")
    ] = "checkpoint",
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Questions at a time.")] = 8,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the first questions.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Longest answer. [default: the original's]")
    ] = None,
    max_image_tokens: ImageTokensOption = None,
    temperature: TemperatureOption = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of sampling.")] = 0,
    draft_photos: Annotated[
        bool, typer.Option("--draft-photos", help="Let the JPEG decoder shrink large photos: faster, other pixels.")
    ] = False,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Count such questions as not answered instead of stopping.")
    ] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    runtime: RuntimeOption = None,
    judge_url: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible judge of gpt-review.", show_default=False)
    ] = None,
    judge_model: Annotated[str | None, typer.Option(metavar="NAME", help="[default: the original's judge]")] = None,
    references: Annotated[
        Path | None, typer.Option(metavar="FILE", help="gpt-review: reference answers.", show_default=False)
    ] = None,
    context: Annotated[
        Path | None, typer.Option(metavar="FILE", help="gpt-review: what is known of the images.", show_default=False)
    ] = None,
    review_kind: Annotated[str, typer.Option(metavar="NAME", help="text, visual, bench or llavar.")] = "visual",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
):
    """Ask a checkpoint the questions of a benchmark and score the answers, by the original's rule and by ours.

    What is interrupted goes on with the same command. Several GPUs or machines share the work with the same options
    behind `accelerate launch "$(command -v convllava)"`.

    \b
    Examples:
      convllava eval MODEL --task pope --questions llava_pope_test.jsonl --images val2014 --annotations coco -o RESULTS
      convllava eval MODEL --task anls --questions my.json --images images -o RESULTS --max-image-tokens 256
      convllava eval --server http://localhost:8000/v1 --task textvqa --questions q.jsonl --images DIR -o RESULTS
      convllava eval --rescore RESULTS
    """
    with report_errors():
        from datetime import timedelta
        from functools import partial

        from ..evaluation import results as folders
        from ..evaluation import run

        if rescore is not None:
            report(folders.rescore(rescore, questions, annotations), rescore, as_json)
            return
        if (checkpoint is None) == (server is None):
            raise ValueError("give either a checkpoint, or --server URL (or --rescore DIR).")
        if task is None or questions is None or output is None:
            raise ValueError("--task, --questions and --output are needed; see `convllava eval --help`.")
        from accelerate import PartialState

        settings = {"temperature": temperature, "seed": seed, "max_image_tokens": max_image_tokens}
        # Processes wait for the slowest, however long its share takes.
        state = PartialState(cpu=device == "cpu" or server is not None, timeout=timedelta(weeks=1))
        if server is not None:
            local = {
                **{"max-image-tokens": max_image_tokens, "device": device, "dtype": dtype != "auto"},
                **{"quantize": quantize, "runtime": runtime, "revision": revision},
                **{"trust-remote-code": trust_remote_code, "draft-photos": draft_photos},
            }
            if given := [f"--{name}" for name, value in local.items() if value]:
                raise ValueError(f"{', '.join(given)}: the server decides that; give it where the server is started.")
            from ..evaluation.client import connect, find_model, make_server_answerer

            client = connect(server)
            name = model_name or find_model(client)
            mark, settings["server"] = f"{server} {name}", server

            def make(style, longest, options):
                return make_server_answerer(client, name, images, style, longest, options)

        else:
            from ..evaluation.answering import make_local_answerer

            name, mark = checkpoint, folders.hash_checkpoint(checkpoint, revision)
            place = device or (str(state.device) if state.num_processes > 1 and runtime is None else None)
            settings |= {"dtype": dtype, "quantize": quantize, "runtime": runtime}
            settings |= {"draft_photos": True} if draft_photos else {}  # unset, the image processor decides

            def make(style, longest, options):
                loaded = load_model(
                    checkpoint, place, dtype, quantize, None, revision, trust_remote_code, None, runtime
                )
                return make_local_answerer(*loaded, images, style, longest, options)

        judge = None
        if judge_url is not None:
            if references is None or (context is None and review_kind != "text"):
                raise ValueError("a review needs --references FILE, and --context FILE unless --review-kind text.")
            from ..evaluation.client import connect
            from ..evaluation.judge import review_answers

            files = (questions, references, context)
            judge = partial(review_answers, connect(judge_url), *files, review_kind, judge_model, limit)
        results = run.evaluate(
            task,
            questions,
            output,
            images,
            annotations,
            make_answerer=make,
            model_id=name,
            checkpoint_hash=mark,
            prompt_style=prompt_style,
            batch_size=batch_size,
            limit=limit,
            max_new_tokens=max_new_tokens,
            skip_bad_images=skip_bad_images,
            settings=settings,
            state=state,
            whole_batches=server is None,
            judge=judge,
        )
        if state.is_main_process:
            report(results, output, as_json)
            unread = results["problems"].get("images that cannot be read")
            if unread and not skip_bad_images:
                raise ValueError(
                    f"{unread['count']} images cannot be read, the first of question {unread['first'][0]!r}; they "
                    "count as not answered. Mend --images, or pass --skip-bad-images."
                )
            if failed := results["problems"].get("requests that failed"):
                raise ValueError(f"{failed['count']} requests failed and are not scored; the same command asks again.")


def report(results: dict, folder: Path, as_json: bool) -> None:
    print_problems(results["problems"])
    if as_json:
        print_json({"output": folder, **results})
        return
    print_numbers(results["numbers"])
    if "judge" in results:
        print("judge:", ", ".join(f"{value} {name}" for name, value in results["judge"].items() if value != []))
    print(f"results: {folder / 'results.json'}; a page: convllava eval-report {folder} --out page.html")


def score(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Benchmark; see `convllava eval --help`.")],
    *,
    predictions: Annotated[Path, typer.Option(metavar="PATH", help="Answers of a model.", show_default=False)],
    questions: QuestionsOption = None,
    annotations: AnnotationsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the original computes, as JSON.")] = False,
):
    """Score predictions without a model, by the original's rule and by ours.

    \b
    Examples:
      convllava score pope --questions llava_pope_test.jsonl --annotations coco --predictions answers.jsonl
      convllava score textvqa --annotations TextVQA_0.5.1_val.json --predictions answers.jsonl --json
      convllava score anls --questions my.jsonl --predictions answers.jsonl
    """
    with report_errors():
        import json

        from ..evaluation.tasks import score_task

        result = score_task(task, predictions, questions, annotations)
        print_problems(result.count_problems())
        if as_json:
            print(json.dumps(result.original, indent=1, ensure_ascii=False))
        else:
            print_numbers(result.summarise())
            print_original(result.original)
        if "error" in result.original:
            raise ValueError(f"the original's code stops here: {result.original['error']}.")


def print_problems(problems: dict) -> None:
    import sys

    for kind, found in problems.items():
        first = ", ".join(map(str, found["first"])) + (", ..." if found["count"] > len(found["first"]) else "")
        print(f"warning: {kind}: {found['count']} ({first})", file=sys.stderr)


def print_numbers(numbers: dict) -> None:
    """A table: a number, by the original's rule and by ours, with the middle 95% of resampled questions."""
    if not numbers:
        return
    width = max(len(name) for name in numbers)
    print(f"{'':{width}}  {'original':>24}  {'ours':>24}  {'count':>6}")
    for name, row in numbers.items():
        cells = []
        for rule in ("original", "ours"):
            value, interval = row.get(rule), row.get(f"{rule}_interval")
            cells.append("" if value is None else f"{value:.2f} ({interval[0]:.1f} to {interval[1]:.1f})")
        print(f"{name:{width}}  {cells[0]:>24}  {cells[1]:>24}  {row['count']:>6}")


def print_original(original: dict) -> None:
    """What the original prints, where it prints something."""
    for key, value in original.items():
        if key == "stdout":
            print("\n".join(value) if isinstance(value, list) else value)
        elif isinstance(value, dict) and "stdout" in value:
            print(f"{key}: {value['stdout']}")


def write_report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of `convllava eval`.")],
    *,
    out: Annotated[
        Path | None, typer.Option("--output", "--out", "-o", metavar="FILE", help="Page to write.", show_default=False)
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="Write the numbers into this model card.", show_default=False),
    ] = None,
    wrong: Annotated[int, typer.Option(metavar="N", min=0, help="Wrong answers to show of each.")] = 24,
):
    """Show evaluations as one web page, beside the published numbers, or write them into a model card.

    \b
    Examples:
      convllava eval-report POPE TEXTVQA --out page.html
      convllava eval-report POPE --card CHECKPOINT
    """
    with report_errors():
        from ..evaluation import report as page
        from ..evaluation.files import write_text

        if out is None and card is None:
            raise ValueError("give --out FILE for a page, --card CHECKPOINT for the model card, or both.")
        if out is not None:
            write_text(out, page.render_report(folders, wrong))
            print(f"wrote {out}")
        if card is not None:
            print(f"wrote {page.add_to_card(folders, card)} numbers into {card / 'README.md'}")


def convert(
    kind: Annotated[str, typer.Argument(metavar="scienceqa|mixture|images", help="What SOURCE is.")],
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Folder with problems.json; LLaVA-format JSON; folder of GIFs.")
    ],
    *,
    out: Annotated[
        Path | None, typer.Option("--output", "--out", "-o", metavar="FILE", help="File to write.", show_default=False)
    ] = None,
    prompt_format: Annotated[str, typer.Option(metavar="NAME", help="scienceqa: such as CQM-A, QCM-LEPA.")] = "CQM-A",
    split: Annotated[str, typer.Option(metavar="NAME", help="scienceqa: train, val, test, ...")] = "test",
):
    """Convert files of other projects: ScienceQA to LLaVA's format, training files to questions, GIFs to JPEG.

    A FILE that ends in .jsonl gets the originals' `instruction` and `output` for scienceqa.

    \b
    Examples:
      convllava eval-convert scienceqa data/scienceqa --prompt-format QCM-LEA --split train --out train.json
      convllava eval-convert mixture llava_v1_5_mix665k.json --out questions.jsonl
      convllava eval-convert images ocr_vqa/images
    """
    with report_errors():
        import json

        from ..evaluation import converters
        from ..evaluation.files import read_json, read_rows, write_json_lines

        if kind == "images":
            count, bad = converters.convert_images(source)
            print(f"wrote {count} images")
            if bad:
                name, reason = next(iter(bad.items()))
                raise ValueError(f"{len(bad)} images cannot be read, the first {name}: {reason}.")
            return
        if kind not in ("scienceqa", "mixture"):
            raise ValueError(f"{kind!r}; expected scienceqa, mixture or images.")
        if out is None:
            raise ValueError("--out FILE is needed.")
        if kind == "mixture":
            rows = converters.list_questions(read_rows(source))
            write_json_lines(out, rows)
        else:
            splits = read_json(source / "pid_splits.json")
            if split not in splits:
                raise ValueError(f"--split {split}; expected one of {', '.join(splits)}.")
            rows = converters.convert_scienceqa(read_json(source / "problems.json"), splits[split], prompt_format)
            if out.suffix == ".jsonl":
                write_json_lines(out, converters.list_instructions(rows))
            else:
                out.write_text(json.dumps(rows, indent=2), encoding="utf-8")
        print(f"wrote {len(rows)} rows to {out}")


def ground(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Path or URL.")],
    phrase: Annotated[str, typer.Argument(metavar="TEXT", help='What to find, such as "the red cup".')],
    *,
    model: Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="Hub id or path.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--output", "--out", "-o", metavar="FILE", help="Image to write.", show_default=False)
    ],
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
):
    """Draw the box that a model gives for a description. Prints it in pixels of the image.

    \b
    Example:
      convllava ground photo.jpg "the red cup" --out boxed.png --model MODEL
    """
    with report_errors():
        from ..evaluation.grounding import PROMPT, draw_boxes, parse_box, place_box
        from ..images import load_image
        from ..inference.answer import answer

        picture = load_image(image)
        loaded = load_model(model, device, "auto", None, None, None, trust_remote_code, None)
        text = answer(*loaded, PROMPT.format(phrase), images=[picture], max_new_tokens=100)
        box = parse_box(text)
        if box is None:
            raise ValueError(f"the model gave no box but {text!r}; it may not have learned to.")
        placed = place_box(box, picture.height, picture.width)
        draw_boxes(picture, {"#d42a20": placed}).save(out)
        sides = [round(float(number), 1) for number in placed]
        print_report(as_json, {"output": out, "box": sides}, f"{sides}  {out}")
