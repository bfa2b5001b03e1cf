"""Request bodies by path: bytes in, a checked `Body` with its model, its options and its routing text out.

One file per API, one table here. Beside `orjson.loads`, which is most of it, reading a 4 KB chat completion costs
1.5 µs and its routing text another 2.5 µs (`pytest tests/router/bodies/test_body_cost.py --benchmark-enable`).
"""

from router.bodies.base import Body
from router.bodies.by_path import FORMS, READERS, read_body, read_request, strip_query, takes_body, upstream_path

__all__ = ["FORMS", "READERS", "Body", "read_body", "read_request", "strip_query", "takes_body", "upstream_path"]
