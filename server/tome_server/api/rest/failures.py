"""The answer to HTTP requests that fail for an error that no part of the server foresaw."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tome_server.api.failures import final_status
from tome_server.api.rest.errors import refusal


class Failures:
    """Answers with the contract's status, and logs the error once: Starlette and uvicorn would log it as well."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called for each request."""
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            if begun:  # all that is left is to break the answer off, which uvicorn does and logs
                raise
            final_status(error)
            await refusal(error)(scope, receive, send)
