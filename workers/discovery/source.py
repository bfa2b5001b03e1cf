"""What discovery asks of a source of pods."""

from collections.abc import Iterable
from typing import Protocol

from workers.config import Config
from workers.discovery.file_source import FileSource
from workers.discovery.registry import FoundPod, Settings


class Source(Protocol):
    """Lists the pods that there are. A source never waits long, and keeps to what it knew while it learns nothing."""

    @property
    def loaded(self) -> bool:
        """Whether anything was ever read: until then nothing is known, which is not the same as no pods."""

    @property
    def usable(self) -> bool:
        """Whether it could be read when that was last tried."""

    @property
    def news(self) -> bool:
        """Whether something has changed since the pods were listed last."""

    @property
    def complete(self) -> bool:
        """Whether no pods may be missing from what is listed."""

    def remember(self, pods: Iterable[FoundPod]) -> None:
        """Take what a predecessor found."""

    def changed(self) -> bool:
        """Whether it has to be read again, by `reload` and `resolve`."""

    def reload(self) -> None:
        """Read it, or begin to."""

    async def resolve(self) -> tuple[list[FoundPod], Settings]:
        """Bring what is known up to date, and list it."""

    def listed(self) -> tuple[list[FoundPod], Settings]:
        """The pods as they are known at this moment."""

    async def stop(self) -> None:
        """End whatever it does by itself."""

    def cure(self) -> str:
        """What a person should do where there are no pods."""


def source_of(config: Config) -> Source | None:
    """The one that is configured."""
    if config.kubernetes is not None:
        # Only who needs it pays for its client: some 20 MB.
        from workers.discovery.kubernetes_source import KubernetesSource

        return KubernetesSource(config.kubernetes)
    if config.endpoints is not None:
        return FileSource(config.endpoints)
    return None
