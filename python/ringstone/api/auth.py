"""Who may use an API that is served over TCP, and what for: the bearer of a token, as far as its scope reaches."""

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ringstone.api.answers import answer
from ringstone.errors import ForbiddenError, RingstoneError, UnauthorizedError
from ringstone.listening import Scope as TokenScope
from ringstone.listening import Tokens

_MISSING = (
    "The request has no token. Send the header `Authorization: Bearer TOKEN`; `ringstone` does with --token-file or "
    "RINGSTONE_TOKEN_FILE."
)
_WRONG = "The token is not one of this server's. Use one of the lines of its token_file."


def scope_needed(method: str) -> TokenScope:
    """No GET changes anything, and nothing else is known to be only a look. tests/unit/test_scopes.py has each call."""
    return "look" if method == "GET" else "change"


class TokenRequired:
    """Lets a request through to `app` when it has one of `tokens` (RFC 6750, section 2.1), whose scope is enough for
    it. `admit` is told of the other end of each connection that has shown one of them."""

    def __init__(
        self, app: ASGIApp, tokens: Tokens, *, admit: Callable[[tuple[str, int] | None], None] | None = None
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._admit = admit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # No lifespan is run and no endpoint is a websocket.
            return
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        given = scheme.lower() == "bearer" and bool(token.strip())
        allowed = self._tokens.admit(token.strip()) if given else None
        if allowed is not None and self._admit is not None:
            self._admit(scope.get("client"))
        needed = scope_needed(scope["method"])
        if allowed in ("change", needed):
            await self._app(scope, receive, send)
            return
        error: RingstoneError
        if allowed is None:
            error, challenge = UnauthorizedError(_WRONG if given else _MISSING), "Bearer"
        else:
            error = ForbiddenError(
                f"{scope['method']} {scope['path']} is more than the token allows, which has the scope `{allowed}`. "
                f"Use one of the lines of the server's token_file with the scope `{needed}`."
            )
            challenge = f'Bearer error="insufficient_scope", scope="{needed}"'
        refusal = answer(error)
        refusal.headers["WWW-Authenticate"] = challenge
        if allowed is None:
            # Nobody of ours, whose connection has been there for long enough.
            refusal.headers["Connection"] = "close"
        await refusal(scope, receive, send)
