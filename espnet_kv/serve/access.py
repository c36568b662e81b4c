"""Who may use the server: tokens, and the web pages whose scripts may."""

import hmac
import json
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

PORTS = {"http": 80, "https": 443}


class Access:
    """Refuses requests.

    Args:
        token: what clients have to send; None: nothing.
        origins: of web pages whose scripts may open streams, beside the server's own page. A
            browser sends a page's origin with each websocket, and its same-origin policy does not
            cover them: any page that a user visits could open streams on the user's machine.
    """

    def __init__(self, token: str | None, origins: Collection[str] = ()):
        self.token = token
        self._origins = {_place(origin) for origin in origins}

    def check_token(self, request: web.Request) -> None:
        """Raise HTTPUnauthorized without the token."""
        if self.token is None:
            return
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        given = given or request.query.get("token", "")  # browsers cannot set the header
        # headers may hold any bytes
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.token.encode()):
            raise web.HTTPUnauthorized(
                **json_body("the token is missing or wrong"), headers={"WWW-Authenticate": "Bearer"}
            )

    def check_origin(self, request: web.Request) -> None:
        """Raise HTTPForbidden for the script of another server's page."""
        origin = request.headers.get("Origin")
        if origin is None:  # no browser
            return
        # behind a proxy that ends TLS the scheme of its own page is another one
        own = {_place(f"{scheme}://{request.host}") for scheme in PORTS}
        place = _place(origin)
        if place is None or place not in own | self._origins:
            problem = f"pages of {origin[:100]!r} may not open streams (--allowed_origins)"
            raise web.HTTPForbidden(**json_body(problem))


def json_body(problem: str) -> dict[str, Any]:
    """Arguments of a refusal in aiohttp."""
    return {"text": json.dumps({"error": problem}), "content_type": "application/json"}


def is_origin(text: str) -> bool:
    """Whether a text is SCHEME://HOST or SCHEME://HOST:PORT of http or https."""
    return _place(text) is not None


def _place(origin: str) -> tuple[str, str, int] | None:
    """Scheme, host and port of an origin; None: it is none."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in PORTS or not parts.hostname or "@" in parts.netloc:
        return None
    if parts.path or parts.query or parts.fragment:
        return None
    return parts.scheme, parts.hostname, port or PORTS[parts.scheme]
