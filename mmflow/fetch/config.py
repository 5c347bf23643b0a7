"""The recipe's settings for fetching images."""

from __future__ import annotations

from pydantic import Field

from mmflow.core.config import Config


class FetchConfig(Config):
    """How images are fetched over HTTP, politely and within limits."""

    user_agent: str = Field(
        "mmflow/0 (builds datasets of images and captions to train models)", pattern=r"^[A-Za-z0-9_-]+[ -~]*$"
    )
    """Who asks and why; its first word is our name in robots.txt. Add a page or an address where somebody answers."""
    concurrency: int = Field(64, ge=1)
    """Requests in progress at once, per task."""
    per_host: int = Field(2, ge=1)
    """Requests in progress at once to one host."""
    num_tasks: int = Field(4, ge=1)
    """Ray tasks that fetch; each host belongs to one of them, so that its limit holds."""
    timeout: float = Field(30.0, gt=0)
    """Seconds for one request, from the first byte sent to the last received."""
    max_bytes: int = Field(20_000_000, ge=1)
    """Most bytes of one body; a longer one is cut off and rejected."""
    max_redirects: int = Field(5, ge=0)
    """Most redirects followed; each target is checked like a first address."""
    retries: int = Field(2, ge=0)
    """Tries after the first, with growing pauses, after a temporary failure."""
    robots: bool = True
    """Whether to obey robots.txt. Opt-outs in the headers (noai, noml, TDM) are always obeyed."""
    loopback: bool = Field(False, exclude=True)
    """Allow addresses of this machine, for a server of your own beside the job."""
    refresh: bool = Field(False, exclude=True)
    """Ask again about every URL, conditionally: bytes that have not changed according to their server stay."""
