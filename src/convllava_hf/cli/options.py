"""What the commands of `convllava` share: options, exit codes, and errors in one line.

Exit codes: 0 done; 1 a check failed, or the machine could not do it; 2 the command line is wrong; 3 something about the
input is wrong; 130 interrupted.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


EXIT_FAILED, EXIT_USAGE, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 3, 130
# With this set to 1, errors keep their traceback, for bug reports.
TRACEBACK_VARIABLE = "CONVLLAVA_TRACEBACK"
# These are mistakes of the program, and never of who uses it.
MISTAKES = (LookupError, TypeError, AttributeError, NameError, AssertionError)
# What tells transformers, the Hub's client, datasets and tqdm to write nothing but errors.
QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}

OutputOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make.", show_default=False)
]
StoredDtypeOption = Annotated[str, typer.Option("--dtype", metavar="NAME", help="auto, bfloat16, float16 or float32.")]
ShardOption = Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file; also bounds the memory.")]
RevisionOption = Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit on the Hub.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an output folder that convllava-hf made.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


class CheckFailed(Exception):
    """What was checked is not as it should be: the input could be read, and the answer is no."""


class MachineError(Exception):
    """What was asked for is right, and this machine cannot do it."""


@contextmanager
def report_errors() -> Iterator[None]:
    """Turns errors into one line on stderr and an exit code, see the module.

    Mistakes of the program itself (a missing key, a wrong type) keep their traceback, and so does everything with
    `CONVLLAVA_TRACEBACK=1`. What other libraries raise without a kind of its own is named with that way to see more.
    """
    # load_image refuses such images itself, in one line.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    sys.stdout.reconfigure(errors="replace")  # terminals that cannot show every character
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (BrokenPipeError, *MISTAKES):  # the reader of our output is gone, which is no error of ours
        raise
    except Exception as error:
        if type(error).__module__.startswith(("typer", "click")) or os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise  # `typer.Exit` and errors of usage are the command line's own
        if isinstance(error, (ValueError, ImportError, OSError)):
            message, code = error, EXIT_BAD_INPUT
        elif isinstance(error, (CheckFailed, MachineError, FloatingPointError)):
            message, code = error, EXIT_FAILED
        elif "out of memory" in str(error):
            message = "out of memory: try --quantize 4bit, a smaller --max-image-tokens, or another --device."
            code = EXIT_FAILED
        elif isinstance(error, RuntimeError):  # also what is not installed: transformers reports integrations so
            message, code = f"{error} ({TRACEBACK_VARIABLE}=1 shows where this came from)", EXIT_FAILED
        else:  # damaged files: of safetensors, yaml, jinja and others, which have no common base
            message, code = f"{error} ({type(error).__name__})", EXIT_BAD_INPUT
        print_error(message)
        raise typer.Exit(code) from error


def print_error(error: Exception | str) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def print_report(as_json: bool, report: object, text: str) -> None:
    """Prints what a command did: as `print_json`, or as text for people."""
    print_json(report) if as_json else print(text)


def print_json(report: object) -> None:
    """Prints a report for programs: one JSON object on one line of stdout."""
    print(json.dumps(report, ensure_ascii=False, default=str))


def be_quiet(wanted: bool) -> None:
    """Leaves nothing on stderr but errors: no progress, no warnings. For this process and those that it starts."""
    if not wanted:
        return
    os.environ.update(QUIET_ENVIRONMENT)
    warnings.simplefilter("ignore")
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()
