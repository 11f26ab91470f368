"""The work of `convllava batch` on a cluster, with Ray Data: the same function, in several processes.

    pip install "convllava-hf[serving,ray]"
    python examples/serving/ray_batch.py photos "Describe the picture." MODEL answers.jsonl --workers 2

Appends to one file of JSON lines as the answers come. Rows that cannot be answered say why under "error"; rows that the
file holds are skipped, so a run that was killed goes on. For a cluster: `ray start --head` on one machine, `ray start
--address=...` on the others, this script on the first; paths of images must lead to the same files everywhere.
"""

import argparse
from pathlib import Path

import ray

from convllava_hf.serving.batch import BatchAnswerer, append_answers, list_rows, skip_done


def main(arguments: list[str] | None = None) -> tuple[int, int]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("question")
    parser.add_argument("checkpoint")
    parser.add_argument("output", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    options = parser.parse_args(arguments)

    rows = list(skip_done(list_rows(options.source, options.question), options.output))
    counts = (0, 0)
    if rows:
        answered = ray.data.from_items(rows).map_batches(
            BatchAnswerer,
            fn_constructor_args=(options.checkpoint, options.max_new_tokens),
            fn_constructor_kwargs={"load_options": {"dtype": options.dtype}},
            batch_size=32,
            concurrency=options.workers,
            num_gpus=options.gpus,
        )
        # As Arrow, whose lists are Python's own values again.
        batches = answered.iter_batches(batch_size=None, batch_format="pyarrow")
        counts = append_answers((batch.to_pydict() for batch in batches), options.output)
    print(f"{counts[0]} rows, {counts[1]} of them with an error, in {options.output}")
    return counts


if __name__ == "__main__":
    main()
