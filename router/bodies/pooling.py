"""`/v1/rerank` and `/v1/classify`: texts in, scores out."""

from typing import Any, ClassVar, Final

from router.bodies.base import Body, Document, not_strings, read_model, require_model
from router.bodies.text import joined
from router.errors import bad_body, missing

_STRINGS: Final = frozenset({str, type(None)})


class RerankBody(Body):
    """A query and the documents to rank."""

    __slots__ = ()
    kind: ClassVar[str] = "rerank"

    def _write(self) -> bytes:
        document = self.json or {}
        return joined([" ".join([document["query"], *(text or "" for text in document["documents"])])])


class ClassifyBody(Body):
    """Texts to classify."""

    __slots__ = ()
    kind: ClassVar[str] = "classify"

    def _write(self) -> bytes:
        given = (self.json or {})["input"]
        return joined([given if type(given) is str else " ".join(text or "" for text in given)])


def read_rerank(document: Document, size: int) -> RerankBody:
    """Types first, then model, query and documents, each of which must be there."""
    read_model(document)
    query = document.get("query")
    if query is not None and type(query) is not str:
        raise bad_body()
    documents = document.get("documents")
    if documents is not None and not _strings(documents):
        raise bad_body()
    model = require_model(document)
    if not query:
        raise missing("query")
    if not documents:
        raise bad_body("'documents' is a required property and cannot be empty", "documents")
    return RerankBody(document, size, model, False)


def read_classify(document: Document, size: int) -> ClassifyBody:
    """A text or several."""
    model = require_model(document)
    given = document.get("input")
    if given is None:
        raise missing("input")
    if type(given) is str:
        if not given:
            raise bad_body("'input' cannot be an empty string", "input")
    elif not _strings(given):
        raise not_strings("input")
    elif not given:
        raise bad_body("'input' array cannot be empty", "input")
    return ClassifyBody(document, size, model, False)


def _strings(value: Any) -> bool:
    return type(value) is list and _STRINGS.issuperset(map(type, value))
