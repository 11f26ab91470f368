"""What the commands of `convllava` share: options, and errors in one line.

Exit codes: 0 done, 1 the machine failed, 2 something about the input is wrong, 130 interrupted.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


OutputOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make.", show_default=False)
]
StoredDtypeOption = Annotated[str, typer.Option("--dtype", metavar="NAME", help="auto, bfloat16, float16 or float32.")]
ShardOption = Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file; also bounds the memory.")]
RevisionOption = Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit on the Hub.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an output folder that holds a model.")]


@contextmanager
def report_errors() -> Iterator[None]:
    """Turns what users can mend into one line on stderr and exit code 2; what the machine lacks gives 1."""
    # load_image refuses such images itself, in one line.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    sys.stdout.reconfigure(errors="replace")  # terminals that cannot show every character
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (ValueError, ImportError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output is gone, which is no error of ours
            raise
        print_error(error)
        raise typer.Exit(2) from error
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        print_error("out of memory: try --quantize 4bit, a smaller --max-image-tokens, or another --device.")
        raise typer.Exit(1) from error


def print_error(error: Exception | str) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
