"""`/v1/images/generations` and `/v1/video/generations`: nothing in them decides where they go but the model."""

from typing import ClassVar, Final

from router.bodies.base import Body, Document, read_model

XDIT_PATHS: Final = {"/v1/images/generations": "/generate", "/v1/video/generations": "/generatevideo"}
"""Where the xdit engine takes what others take under OpenAI's paths."""


class MediaBody(Body):
    """A picture or a clip to make. Diffusion has no prefix cache, so the routing text is empty."""

    __slots__ = ()
    kind: ClassVar[str] = "media"


def read_media(document: Document, size: int) -> MediaBody:
    """Only the model is looked at."""
    return MediaBody(document, size, read_model(document), False)
