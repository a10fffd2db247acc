"""The one JSON shape of every error, and nothing of what the caller sent in it."""

from typing import Any

import msgspec


class Problem(Exception):  # noqa: N818 an answer, as in RFC 9457
    """An answer that is no success. `fields` name what is wrong in a body; headers go with the answer."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        fields: list[dict[str, str]] | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.fields, self.headers = fields or [], headers

    def body(self, request_id: str) -> bytes:
        """The JSON of the answer."""
        content: dict[str, Any] = {
            "status": self.status,
            "code": self.code,
            "message": self.message,
            "fields": self.fields,
            "request_id": request_id,
        }
        return msgspec.json.encode(content)
