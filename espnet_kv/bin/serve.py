"""Serve the recognition of many live streams over websockets."""

import argparse
import asyncio
import os
import socket
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path

from espnet_kv.bin.model_options import add_model_options, find_model
from espnet_kv.bin.streaming_options import add_live_options, build_recognizer
from espnet_kv.cli import HelpFormatter, command, whole
from espnet_kv.errors import UserError
from espnet_kv.espnet.parser import Parser

TOKEN = "ESPNET_KV_TOKEN"
"""Environment variable with the token."""
CACHE_DTYPE = "bf16"
"""Of the states of attention and convolution: half the bytes of float32, in no more time."""
SEND_BYTES = 1 << 16
"""Results that the system holds for a client, in bytes."""


def get_parser() -> argparse.ArgumentParser:
    """The options of this command, with the names of stream."""
    parser = Parser(
        prog="python -m espnet_kv.bin.serve",
        description="Recognize the streams of many clients at once. Clients of sherpa-onnx's "
        "online websocket server can be used. One port serves the websocket, a page for trying it "
        "(/), /health and /metrics.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add_model_options(add)
    add_live_options(parser, cache_default=f"{CACHE_DTYPE} for float32, else the model's type")
    add = parser.add_argument_group("Server related").add_argument
    add("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 = all of the machine")
    add("--port", type=whole(0, 65535), default=6006, help="0 = any free port")
    add(
        "--token_file",
        type=Path,
        help=f"File with the token that clients have to send; default: the variable {TOKEN}",
    )
    add(
        "--allowed_origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="Other web sites whose pages may open streams, e.g. https://captions.example.org",
    )
    add("--certificate", type=Path, help="TLS certificate chain, PEM")
    add("--key", type=Path, help="Its key, PEM; default: it is in the file of the certificate")
    add("--max_streams", type=whole(1, 4096), default=32, help="Open streams; more are refused")
    add("--max_batch_size", type=whole(1), default=32, help="Streams that are decoded together")
    add(
        "--max_wait_ms",
        type=whole(0, 10_000),
        default=100,
        help="Longest time that a chunk waits for those of other streams, to be decoded with them",
    )
    add(
        "--idle_seconds",
        type=float,
        default=60.0,
        help="A stream ends when no audio came, or no result could be sent, for this time",
    )
    add(
        "--max_stream_seconds",
        type=float,
        default=0.0,
        help="Limit for the audio of a stream and for the time that it is open; 0 = no limit",
    )
    add(
        "--max_message_bytes",
        type=whole(1024, 1 << 30),
        default=1 << 24,
        help="Longer messages are refused",
    )
    return parser


@command
def main(cmd: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        cmd: the options; None: sys.argv.

    Raises:
        UserError: an option, the model or the address cannot be used.
    """
    args = get_parser().parse_args(cmd)
    try:
        from espnet_kv.serve.access import Access, is_origin
        from espnet_kv.serve.server import Limits, Server
    except ImportError as error:
        raise UserError(f'{error.name} is not installed: pip install "espnet_kv[serve]"') from error

    for name, least in (("idle_seconds", 0.1), ("max_stream_seconds", 0.0)):
        if not least <= getattr(args, name) < float("inf"):
            raise UserError(f"--{name} {getattr(args, name)}: allowed: {least:g} or more seconds")
    if other := [origin for origin in args.allowed_origins if not is_origin(origin)]:
        raise UserError(
            f"--allowed_origins {other[0]}: allowed: the beginning of an address without a path, "
            "e.g. https://captions.example.org or http://localhost:8000"
        )
    token, tls = _token(args.token_file), _tls(args.certificate, args.key)
    find_model(args)
    with _listener(args.host, args.port) as listener:  # before the model is loaded
        if args.engine == "torch" and args.dtype == "float32" and args.cache_dtype is None:
            args.cache_dtype = CACHE_DTYPE
        recognizer = build_recognizer(args)
        _check_memory_is_bounded(args, recognizer.left_chunks)
        if token is None and not _is_local(listener):
            print(
                f"warning: --host {args.host}: other machines can use this server; set a token "
                "with --token_file",
                file=sys.stderr,
            )
        limits = Limits(
            args.max_streams,
            args.max_batch_size,
            args.max_wait_ms / 1000,
            args.idle_seconds,
            args.max_stream_seconds,
            args.max_message_bytes,
        )
        access = Access(token, args.allowed_origins)
        server = Server(recognizer, limits, access, Path(args.asr_model_file).resolve().parent.name)
        host = f"[{args.host}]" if ":" in args.host else args.host
        address = f"{'https' if tls else 'http'}://{host}:{listener.getsockname()[1]}"
        asyncio.run(server.run(listener, tls, lambda: print(f"listening on {address}", flush=True)))


def _token(file: Path | None) -> str | None:
    """The token of a file, or of the environment; None: there is none."""
    if file is not None:
        source, text = f"--token_file {file}", file.read_text("utf-8", "replace")
    elif os.environ.get(TOKEN):
        source, text = f"the variable {TOKEN}", os.environ[TOKEN]
    else:
        return None
    token = text.strip()
    if len(token.split()) != 1 or not token.isascii():
        raise UserError(f"{source}: allowed: one word in ASCII, the token")
    return token


def _tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if certificate is None:
        if key is not None:
            raise UserError(f"--key {key}: give the --certificate, too")
        return None
    for file in filter(None, (certificate, key)):
        file.read_bytes()  # its error names the file
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise UserError(
            f"--certificate {certificate}: it and its key are no pair of PEM files ({error})"
        ) from error
    return context


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise UserError(
            f"--host {host} --port {port}: {reason}: name another address or port"
        ) from error
    # results are small; the system would let megabytes of them wait for a client that reads none
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
    return listener


def _is_local(listener: socket.socket) -> bool:
    address = listener.getsockname()[0]
    return address == "::1" or address.startswith("127.")


def _check_memory_is_bounded(args: argparse.Namespace, left_chunks: int) -> None:
    """Refuse settings with which the memory of a stream grows with its length."""
    if left_chunks < 0:
        raise UserError(
            "--left_chunks -1: the cache of a stream would grow without limit; give e.g. "
            "--left_chunks 4"
        )
    if not args.max_segment_seconds:
        raise UserError(
            "--max_segment_seconds 0: what is held of a segment would grow without limit; give "
            "e.g. --max_segment_seconds 30"
        )


if __name__ == "__main__":
    sys.exit(main())
