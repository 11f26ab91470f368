"""`convllava serve`: the server of transformers, started where the classes of this package are known.

`transformers serve` looks architectures up on the transformers module, also with `--trust-remote-code`, and so finds a
ConvLLaVA only after `register()`. The models of the LLaVA family, which hold no code of ours, need no detour.
"""

import sys

import typer

from .options import report_errors


def add_serving_command(app: typer.Typer) -> None:
    """Adds the command of this module to the command line."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


def serve(context: typer.Context):
    """Serve a checkpoint over HTTP with OpenAI's API: `transformers serve`, which knows ConvLLaVA here.

    Takes a checkpoint (a Hub id or a path) and the options of `transformers serve`, which `transformers serve --help`
    lists. Needs `pip install "convllava-hf[serving]"`.

    \b
    Examples:
      convllava serve MODEL
      convllava serve MODEL --host 0.0.0.0 --port 8080 --dtype bfloat16 --attn-implementation sdpa
      curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" -d '{"messages": [{"role": "user",
        "content": [{"type": "image_url", "image_url": {"url": "https://example.com/page.png"}},
        {"type": "text", "text": "Summarise this."}]}]}'
    """
    from transformers.utils.import_utils import is_serve_available

    from ..registration import register

    with report_errors():
        if not is_serve_available():
            raise ImportError("serving needs more packages: pip install 'convllava-hf[serving]'")
        from transformers.cli.transformers import main

        register()
        sys.argv = ["transformers", "serve", *context.args]
        main()
