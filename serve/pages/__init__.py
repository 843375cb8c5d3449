"""Pages of the endpoint: HTML files without anything from elsewhere, and the headers that hold them to that."""

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from starlette.responses import Response

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Page:
    """A page with its scripts and styles inside. The browser runs exactly those: their hashes are in the policy."""

    html: str

    @classmethod
    def load(cls, name: str) -> "Page":
        """The page in a file of this folder."""
        return cls((FOLDER / name).read_text(encoding="utf-8"))

    @property
    def policy(self) -> str:
        """The Content-Security-Policy header."""
        return "; ".join(
            (
                "default-src 'none'",
                f"script-src {self._hashes('script')}",
                f"style-src {self._hashes('style')}",
                "connect-src 'self'",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
            )
        )

    def _hashes(self, tag: str) -> str:
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", self.html, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents]
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    async def respond(self) -> Response:
        """The handler."""
        headers = {
            "Content-Security-Policy": self.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return Response(self.html, headers=headers, media_type="text/html")
