"""Rest: the listening end of the admin API."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from .errors import ConfigError

SHUTDOWN_SECONDS: Final = 5.0  # an admin request that takes longer is cut off


class Rest:
    """Serves an application on one address."""

    def __init__(self, app: web.Application) -> None:
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_SECONDS)

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port (a free one for 0). Raises ConfigError when the address is taken."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on daemon.rest_host:rest_port = {host}:{port} ({error.strerror}); "
                "choose another, or port 0 for any free one"
            ) from error
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()
