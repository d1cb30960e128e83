"""Talk to a Barkstream server: `Client` (blocking), `AsyncClient` (asyncio), and the `barkstream` command."""

from barkstream.clients.aio import AsyncClient
from barkstream.clients.client import Client
from barkstream.clients.protocol import BarkstreamError

__all__ = ["AsyncClient", "BarkstreamError", "Client"]
