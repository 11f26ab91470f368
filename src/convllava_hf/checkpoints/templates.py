"""Rendering the chat template of a stranger: in a process of its own, with bounds on time, memory and length.

transformers renders templates in Jinja's sandbox, which runs no code of theirs, but lets them loop and multiply.
"""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from transformers import ProcessorMixin

from .weight_maps import ConversionError, describe_cause


MAX_SECONDS = 10
MAX_BYTES = 512 * 2**20
MAX_CHARACTERS = 10**6


def render_chat_template(processor: ProcessorMixin, messages: list[dict]) -> str:
    """Renders a conversation, with the start of an answer, as `apply_chat_template` does; see [`run_in_bounds`]."""

    def render() -> str:
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"it makes {len(text)} characters of a short question")
        return text

    return run_in_bounds(render)


def run_in_bounds(render: Callable[[], str | None]) -> str | None:
    """Calls a function that renders a chat template and gives what it returns.

    Where the system cannot fork (Windows), it runs in this process, without bounds.

    Raises:
        ConversionError: the template fails, or goes beyond a bound.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return render()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, render), daemon=True)
    with warnings.catch_warnings():
        # The process runs Python alone, so threads of this one that hold locks of C libraries do not matter.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()
    try:
        if not receiver.poll(20 * MAX_SECONDS):  # a busy machine gives the process little of its time
            raise ConversionError("the chat template does not end. Do not use it.")
        rendered, text = receiver.recv()
    except EOFError:
        process.join()
        bound = f"{MAX_SECONDS} s" if process.exitcode == -signal.SIGXCPU else f"{MAX_BYTES // 2**20} MB of memory"
        raise ConversionError(f"the chat template needs more than {bound}. Do not use it.") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if not rendered:
        raise ConversionError(f"the chat template cannot be rendered: {text}")
    return text


def _send_result(sender: Connection, render: Callable[[], str | None]):
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS + 1))
        if Path("/proc/self/statm").exists():
            size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (size + MAX_BYTES, resource.RLIM_INFINITY))
        sender.send((True, render()))
    except MemoryError:
        sender.send((False, f"it needs more than {MAX_BYTES // 2**20} MB of memory"))
    except Exception as error:  # templates raise what they like
        sender.send((False, describe_cause(error)))
