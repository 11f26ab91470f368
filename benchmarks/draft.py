"""What drafting photos (`draft_photos`) does to answers: exact answers of the quickstart's model, with it and without.

    make quickstart
    python benchmarks/draft.py --model quickstart/checkpoint

The quickstart's test pages are enlarged and written as JPEG files, as a camera would take them, and each question is
asked twice: with the file decoded whole, and with it shrunk by the decoder as far as the model's size allows.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from machine import describe_machine, print_machine, print_table, show_progress, write_json
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "quickstart"))


def main(arguments: list[str] | None = None) -> None:
    from pages import IMAGE_TASKS, ask, make_pages

    from convllava_hf.images import get_draft, load_image
    from convllava_hf.inference.answer import answer
    from convllava_hf.inference.load import load

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint of the quickstart")
    parser.add_argument("--pages", type=int, default=300, help="of the test split")
    parser.add_argument("--seed", type=int, default=0, help="that the quickstart was run with")
    parser.add_argument("--scales", nargs="+", type=float, default=[3, 5, 8, 12], help="of the enlarged pages")
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path, help="also write the results there")
    options = parser.parse_args(arguments)
    model, processor = load(options.model, device=options.device)
    rng, questions = random.Random(0), []
    for page in make_pages("test", options.pages, options.seed):
        questions += [(page, *asked) for task in IMAGE_TASKS if (asked := ask(page, task, rng))]
    machine, results = describe_machine(1), []
    with tempfile.TemporaryDirectory() as folder:
        for scale in options.scales:
            show_progress(f"{scale} times larger: {len(questions)} questions")
            exact, equal, levels, sizes = [0, 0], 0, [], set()
            for page, question, truth in questions:
                path = Path(folder) / "page.jpg"
                side = round(page.image.width * scale)
                page.image.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=92)
                said = [answer(model, processor, question, path, draft_photos=draft) for draft in (False, True)]
                exact = [count + (text == truth) for count, text in zip(exact, said, strict=True)]
                equal += said[0] == said[1]
                drafted = load_image(path, draft=get_draft(processor.image_processor, True))
                sizes.add(drafted.width)
                pixels = [
                    processor.image_processor(image, do_normalize=False, do_rescale=False, return_tensors="np")
                    for image in (load_image(path), drafted)
                ]
                whole, shrunk = (found["pixel_values"].astype(np.int16) for found in pixels)
                levels.append((np.abs(whole - shrunk).mean(), np.abs(whole - shrunk).max()))
            mean, most = (float(number) for number in (np.mean([m for m, _ in levels]), np.max([m for _, m in levels])))
            results.append(
                {
                    "pixels": side,
                    "decoded_at": max(sizes),
                    "questions": len(questions),
                    "exact_whole": exact[0] / len(questions),
                    "exact_drafted": exact[1] / len(questions),
                    "equal": equal / len(questions),
                    "mean_levels": mean,
                    "largest_levels": most,
                }
            )
    table = [
        {
            "page, pixels": row["pixels"],
            "decoded at": row["decoded_at"],
            "questions": row["questions"],
            "exact, whole": f"{row['exact_whole']:.1%}",
            "exact, drafted": f"{row['exact_drafted']:.1%}",
            "equal answers": f"{row['equal']:.1%}",
            "levels of 255, mean": f"{row['mean_levels']:.2f}",
            "largest": f"{row['largest_levels']:.0f}",
        }
        for row in results
    ]
    print_table("Answers about drafted photos", table)
    print_machine(machine)
    write_json(options.json, {"machine": machine, "results": results})


if __name__ == "__main__":
    main()
