"""What the tests of JSON bodies share."""

import orjson

from router.bodies import read_body
from router.bodies.base import Body


def read_json(path: str, document: object) -> Body:
    """A document, or bytes that may be none, as the body of a request to `path`."""
    raw = document if isinstance(document, bytes) else orjson.dumps(document)
    return read_body(path, "application/json", raw)
