"""Who may use an API that is served over TCP: the bearer of a token."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ringstone.api.answers import answer
from ringstone.errors import UnauthorizedError
from ringstone.listening import Tokens

_MISSING = (
    "The request has no token. Send the header `Authorization: Bearer TOKEN`; `ringstone` does with --token-file or "
    "RINGSTONE_TOKEN_FILE."
)
_WRONG = "The token is not one of this server's. Use one of the lines of its token_file."


class TokenRequired:
    """Lets a request through to `app` when it has one of `tokens` (RFC 6750, section 2.1)."""

    def __init__(self, app: ASGIApp, tokens: Tokens) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # No lifespan is run and no endpoint is a websocket.
            return
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        given = scheme.lower() == "bearer" and bool(token.strip())
        if given and self._tokens.admit(token.strip()):
            await self._app(scope, receive, send)
            return
        refusal = answer(UnauthorizedError(_WRONG if given else _MISSING))
        refusal.headers["WWW-Authenticate"] = "Bearer"
        await refusal(scope, receive, send)
