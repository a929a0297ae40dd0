"""``expert-mesh generate``: one prompt through the public API, streamed to a person or as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mesh.config import GatewayConfig

if TYPE_CHECKING:
    from expert_mesh import Client, Sampling

Target = Annotated[str, typer.Option(help="host:port of a gateway.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="EXPERT_MESH_API_KEY", help="Key, where the gateway wants one.")
]
TlsCert = Annotated[Path | None, typer.Option(help="PEM certificate to show (mTLS).")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM key of the certificate.")]
TlsCa = Annotated[Path | None, typer.Option(help="PEM authority to trust; turns TLS on.")]
DEFAULT_TARGET = f"127.0.0.1:{GatewayConfig.port}"


def generate(
    target: Target = DEFAULT_TARGET,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    token_ids: Annotated[str | None, typer.Option(help="Token ids instead: 1,2,3.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate at most; else what the context leaves.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 takes the likeliest token; else the checkpoint's default, or 1."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the likeliest tokens of this probability in all."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many likeliest tokens.")] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Leave out tokens less likely than this part of the likeliest."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: seen tokens become less likely.")
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="-2 to 2, on tokens generated before.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="-2 to 2, for each time a token was generated.")
    ] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Do not stop before.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be repeated.")] = None,
    stop_token_ids: Annotated[str | None, typer.Option(help="Stop token ids: 1,2,3.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on past the end of sequence.")] = False,
    timeout_s: Annotated[float | None, typer.Option(help="Deadline of the request.")] = None,
    as_json: AsJson = False,
    api_key: ApiKey = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
) -> None:
    """Stream the continuation of a text or of token ids."""
    from expert_mesh import Client

    if (prompt is None) == (token_ids is None):
        raise typer.BadParameter("give --prompt or --token-ids")
    given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "min_tokens": min_tokens,
        "seed": seed,
        "stop": stop,
        "stop_token_ids": parse_ids(stop_token_ids, "--stop-token-ids") if stop_token_ids else None,
        "ignore_eos": ignore_eos or None,
    }
    sampling: Any = {name: value for name, value in given.items() if value is not None}
    source = parse_ids(token_ids, "--token-ids") if token_ids is not None else prompt or ""
    options: Any = {"tls_cert": tls_cert, "tls_key": tls_key, "tls_ca": tls_ca}
    with Client(target, api_key=api_key, **options) as client:
        if as_json:
            _print_json(client, source, timeout_s, sampling)
        else:
            _stream(client, source, timeout_s, sampling)


def parse_ids(text: str, flag: str) -> list[int]:
    """``1,2,3`` as numbers. A usage error names the flag."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"{flag} wants numbers with commas between: 1,2,3") from error


def _print_json(
    client: Client, source: str | list[int], timeout_s: float | None, sampling: Sampling
) -> None:
    done = client.complete(source, timeout_s=timeout_s, **sampling)
    typer.echo(
        json.dumps(
            {
                "request_id": done.request_id,
                "text": done.text,
                "token_ids": done.token_ids,
                "finish_reason": done.finish_reason,
                "stop_reason": done.choices[0].stop_reason,
                "usage": done.usage._asdict(),
                "timing": done.timing._asdict(),
            }
        )
    )


def _stream(
    client: Client, source: str | list[int], timeout_s: float | None, sampling: Sampling
) -> None:
    as_ids = not isinstance(source, str) and not client.model_info().has_tokenizer
    for chunk in client.generate(source, timeout_s=timeout_s, **sampling):
        text = "".join(f"{token_id} " for token_id in chunk.token_ids) if as_ids else chunk.text
        sys.stdout.write(text)
        sys.stdout.flush()
        if chunk.usage is not None and chunk.timing is not None:
            sys.stdout.write("\n")
            _say(
                f"{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens, "
                f"{chunk.finish_reason}; TTFT {chunk.timing.ttft_s * 1e3:.1f} ms, "
                f"TPOT {chunk.timing.tpot_s * 1e3:.2f} ms"
            )


def _say(line: str) -> None:
    """What a person wants to know and a pipe does not."""
    if sys.stderr.isatty():
        typer.secho(line, err=True, dim=True)
