#!/usr/bin/env python3
"""Runs other people's load generators, unmodified, against a server of the built-in model.

    python scripts/bench/clients.py --aiperf VENV/bin/aiperf --guidellm VENV/bin/guidellm

Their commands are those of docs/clients.md. What counts is that each ends well and that the server
answered every request it was asked for; their own reports go to standard output.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.ray.serving import serve  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT_S = 300.0
PROMPT_TOKENS, OUTPUT_TOKENS, STREAMS = 64, 32, 4
ANSWERED = re.compile(r'^tandem_requests_total\{[^}]*outcome="(?:stop|length)"[^}]*\} (\S+)')


def aiperf(program: Path, url: str, requests: int) -> list[str]:
    shape = {"concurrency": STREAMS, "request-count": requests}
    lengths = {"isl": PROMPT_TOKENS, "osl": OUTPUT_TOKENS}
    extra = ["--extra-inputs", "ignore_eos:true"]
    extra += ["--extra-inputs", f"min_tokens:{OUTPUT_TOKENS}", "--use-server-token-count"]
    options = [f"--{name}={value}" for name, value in (shape | lengths).items()]
    target = ["--model", "demo", "--tokenizer", str(ROOT / "engine" / "demo"), "--url", url]
    return [
        str(program),
        "profile",
        *target,
        "--endpoint-type=chat",
        "--streaming",
        *options,
        *extra,
    ]


def guidellm(program: Path, url: str, requests: int) -> list[str]:
    data = f"prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"
    options = {
        "backend": f"kind=openai_http,target={url},request_format=/v1/completions",
        "tokenizer": f"kind=hf_auto,model={ROOT / 'engine' / 'demo'}",
        "data": f"kind=synthetic_text,{data}",
        "profile": f"kind=concurrent,streams={STREAMS}",
        "constraint": f"kind=max_requests,count={requests}",
    }
    return [str(program), "run", *(part for one in options.items() for part in _option(*one))]


def _option(name: str, value: str) -> tuple[str, str]:
    return f"--{name}", value


CLIENTS: dict[str, Callable[[Path, str, int], list[str]]] = {"aiperf": aiperf, "guidellm": guidellm}


def answered(url: str) -> int:
    """Requests that the server has answered to their end."""
    with urllib.request.urlopen(f"{url}/metrics") as page:
        lines = page.read().decode().splitlines()
    return round(sum(float(found[1]) for line in lines if (found := ANSWERED.match(line))))


def run(name: str, program: Path, url: str, requests: int) -> bool:
    before = answered(url)
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    with tempfile.TemporaryDirectory() as folder:
        command = CLIENTS[name](program.absolute(), url, requests)
        ended = subprocess.run(command, cwd=folder, env=environment, timeout=LIMIT_S, check=False)
    count = answered(url) - before
    print(
        f"{name}: exit status {ended.returncode}, {count} of {requests} requests answered",
        flush=True,
    )
    return ended.returncode == 0 and count >= requests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in CLIENTS:
        parser.add_argument(f"--{name}", type=Path, help="its program; left out if not given")
    parser.add_argument("--requests", type=int, default=24)
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in CLIENTS if getattr(options, name)}
    with tempfile.TemporaryDirectory() as folder:
        serving = serve(Path(folder) / "serve.log")
        try:
            fine = [run(name, one, serving.http, options.requests) for name, one in given.items()]
        finally:
            serving.end()
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
