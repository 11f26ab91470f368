"""`convllava serve`, `demo` and `batch`."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from .ask import (
    AttentionOption,
    DeviceOption,
    DtypeOption,
    ImageTokensOption,
    ModelOption,
    QuantizeOption,
    RuntimeOption,
    TrustOption,
    load_model,
)
from .options import RevisionOption, print_error, report_errors


CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A path or a Hub id.", show_default=False)
]


def add_serving_command(app: typer.Typer) -> None:
    """Adds the commands of this module to the command line."""
    for command in (serve, demo, batch):
        app.command()(command)


def serve(
    checkpoint: CheckpointArgument,
    *,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="CONVLLAVA_API_KEY",
            show_envvar=True,
            help="What clients must send; other users of the machine can read it here, but not in the variable.",
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What /v1/models lists. [default: the name of the checkpoint]")
    ] = None,
    max_image_pixels: Annotated[int, typer.Option(metavar="N", min=1, help="Most pixels of an image.")] = 40_000_000,
    max_image_bytes: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most bytes of the images of a request, as files.")
    ] = 32 * 2**20,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer that a client can get.")] = 2048,
    max_queue: Annotated[int, typer.Option(metavar="N", min=1, help="Requests that may wait; others get 429.")] = 64,
    max_batch: Annotated[int, typer.Option(metavar="N", min=1, help="Requests that are answered together.")] = 8,
    batch_wait: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long a batch waits for requests being prepared.")
    ] = 0.05,
    image_cache: Annotated[
        int, typer.Option(metavar="MIB", min=0, help="Memory for images seen before, for follow-up questions.")
    ] = 512,
    allow_url: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Fetch images from this host, too; repeat for more.", show_default=False),
    ] = None,
    engine: Annotated[str, typer.Option(metavar="transformers|vllm", help="What runs the model.")] = "transformers",
    vllm_options: Annotated[
        str, typer.Option(metavar="TEXT", help="More of `vllm serve`, such as '--tensor-parallel-size 2'.")
    ] = "",
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    attn_implementation: AttentionOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    runtime: RuntimeOption = None,
):
    """Serve a checkpoint over HTTP with OpenAI's chat completions.

    Safe to expose: images come as data: URLs (or from the hosts of --allow-url), everything has a limit, and only
    fields that are honoured are accepted. Needs `pip install "convllava-hf[serving]"`.

    \b
    Examples:
      convllava serve MODEL
      CONVLLAVA_API_KEY=... convllava serve MODEL --host 0.0.0.0 --port 8080
      curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" -d '{"messages": [{"role": "user",
        "content": "Hello?"}]}'
    """
    with report_errors():
        check_checkpoint(checkpoint)
        hosts = check_hosts(allow_url or [])
        if engine not in ("transformers", "vllm"):
            raise ValueError(f"--engine {engine}; expected transformers or vllm.")
        import_serving("serving", "prometheus_client", "pydantic", "starlette", "uvicorn")
        from ..serving.backends import LocalBackend
        from ..serving.server import ServerOptions, build_app, is_loopback, run_server

        if not is_loopback(host) and api_key is None:
            print_error(f"warning: everyone who reaches {host} can use this server; --api-key sets a key.")
        name = served_model_name or checkpoint.rstrip("/").rpartition("/")[2]
        options = ServerOptions(
            name, api_key, max_image_bytes, hosts, loopback_only=is_loopback(host) and api_key is None
        )
        if engine == "vllm":
            from ..serving.vllm_engine import run_vllm

            if quantize or attn_implementation or device or runtime:
                raise ValueError(
                    "--device, --quantize, --attn-implementation and --runtime belong to --engine transformers."
                )
            limits = (max_image_pixels, max_tokens, max_queue, shlex.split(vllm_options))
            with run_vllm(checkpoint, dtype, revision, trust_remote_code, *limits) as backend:
                announce(name, host, port)
                run_server(build_app(backend, options), host, port)
            return
        loaded = load_engine(
            checkpoint, device, dtype, quantize, attn_implementation, revision, trust_remote_code, runtime,
            max_batch=max_batch, batch_seconds=batch_wait, max_queue=max_queue, cache_bytes=image_cache * 2**20,
        )  # fmt: skip
        app = build_app(LocalBackend(loaded, max_image_pixels, max_tokens), options)
        announce(name, host, port)
        run_server(app, host, port)


def demo(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="[CHECKPOINT]", help="A path or a Hub id.", show_default=False)
    ] = None,
    *,
    compare: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="Another checkpoint, to answer side by side.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask this server, up to and with /v1, and load nothing.")
    ] = None,
    api_key: Annotated[
        str, typer.Option(metavar="KEY", envvar="CONVLLAVA_API_KEY", show_envvar=True, help="Key of --server.")
    ] = "",
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="Port to listen on.")] = 7860,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    attn_implementation: AttentionOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
):
    """Show a page to ask about images in a browser.

    Needs `pip install "convllava-hf[demo,serving]"`.

    \b
    Examples:
      convllava demo MODEL
      convllava demo MODEL --compare ANOTHER
      convllava demo --server http://localhost:8000/v1
    """
    with report_errors():
        if (checkpoint is None) == (server is None):
            raise ValueError("expected a CHECKPOINT, or --server with the URL of a server.")
        for source in (checkpoint, compare):
            if source is not None:
                check_checkpoint(source)
        import_serving("demo,serving", "gradio", "pydantic")
        from ..serving.backends import LocalBackend, RemoteBackend
        from ..serving.demo import MAX_ANSWER, MAX_PIXELS, Model, build_page, launch_page, read_examples

        models, examples = [], []
        for source in filter(None, (checkpoint, compare)):
            engine = load_engine(source, device, dtype, quantize, attn_implementation, revision, trust_remote_code)
            backend = LocalBackend(engine, MAX_PIXELS, MAX_ANSWER)
            models.append(Model("/".join(source.rstrip("/").split("/")[-2:]), backend))
            examples = examples or read_examples(Path(source).absolute())
        if server is not None:
            models = [Model(server, RemoteBackend(server, "", api_key, MAX_PIXELS, MAX_ANSWER, max_queue=64))]
        print(f"http://{host}:{port} (Ctrl-C stops)", file=sys.stderr, flush=True)
        launch_page(build_page(models, examples), host, port)


def batch(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A folder of images, a .jsonl or .parquet file, or a data set on the Hub."
        ),
    ],
    *,
    model: ModelOption,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="JSON lines; what it holds is skipped.")
    ],
    question: Annotated[
        str | None, typer.Option("--question", "-q", metavar="TEXT", help="Asked about every row without one.")
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Of a data set on the Hub.")] = "train",
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = 512,
    max_image_tokens: ImageTokensOption = None,
    max_batch: Annotated[int, typer.Option(metavar="N", min=1, help="Rows that are answered together.")] = 8,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    attn_implementation: AttentionOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    runtime: RuntimeOption = None,
):
    """Answer about every image of a folder or every row of a data set; starting again goes on where it stopped.

    Writes {"id", "question", "answer", "error"} per row; a row that cannot be answered says why under "error".

    \b
    Examples:
      convllava batch photos -q "Describe the picture." -m MODEL -o answers.jsonl
      convllava batch questions.parquet -m MODEL -o answers.jsonl
    """
    with report_errors():
        check_checkpoint(model)
        import_serving("serving", "datasets", "pydantic")
        from ..serving.batch import BatchAnswerer, answer_rows, list_rows

        options = {"device": device, "dtype": dtype, "quantize": quantize, "revision": revision}
        options |= {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
        options |= {"runtime": runtime}
        answerer = BatchAnswerer(model, max_new_tokens, max_image_tokens, max_batch=max_batch, load_options=options)
        answered, failed = answer_rows(answerer, list_rows(source, question, split), output, 4 * max_batch)
        answerer.close()
        print(f"{answered} rows, {failed} of them with an error, in {output}", file=sys.stderr)


def announce(name: str, host: str, port: int) -> None:
    print(f"{name} at http://{host}:{port}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)


def load_engine(
    checkpoint, device, dtype, quantize, attn_implementation, revision, trust_remote_code, runtime=None, **settings
):
    """Loads a checkpoint into an engine; `settings` are those of `Engine`."""
    from ..serving.engine import Engine

    model, processor = load_model(
        checkpoint, device, dtype, quantize, attn_implementation, revision, trust_remote_code, None, runtime
    )
    return Engine(model, processor, **settings)


def check_checkpoint(checkpoint: str) -> None:
    """Refuses what can be no checkpoint before the Hub is asked, which retries for a minute; raises OSError."""
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{checkpoint} holds no config.json; expected the folder of a checkpoint.")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", checkpoint) or folder.exists():
        raise FileNotFoundError(f"there is no folder {checkpoint!r}, and it is no Hub id either (OWNER/NAME).")


def check_hosts(hosts: list[str]) -> frozenset[str]:
    """Names of hosts, in lower case; raises ValueError for URLs and ports."""
    for host in hosts:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", host):
            raise ValueError(f"--allow-url {host}; expected the name of a host, such as images.example.com.")
    return frozenset(host.lower() for host in hosts)


def import_serving(extra: str, *packages: str) -> None:
    """Raises ImportError, in one line, where a package of an extra is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"this needs {package}: pip install 'convllava-hf[{extra}]'")
