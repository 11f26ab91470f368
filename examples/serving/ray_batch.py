"""The work of `convllava batch` on a cluster, with Ray Data: the same function, in several processes.

    pip install "convllava-hf[serving]" "ray[data]"
    python examples/serving/ray_batch.py photos "Describe the picture." MODEL answers --workers 2

Writes JSON lines into a folder, one file per block. Rows that cannot be answered say why under "error".
"""

import argparse

import ray

from convllava_hf.serving.batch import BatchAnswerer, list_rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("question")
    parser.add_argument("checkpoint")
    parser.add_argument("output")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    options = parser.parse_args(arguments)

    rows = ray.data.from_items(list(list_rows(options.source, options.question)))
    answered = rows.map_batches(
        BatchAnswerer,
        fn_constructor_args=(options.checkpoint, options.max_new_tokens),
        batch_size=32,
        concurrency=options.workers,
    )
    answered.write_json(options.output)


if __name__ == "__main__":
    main()
