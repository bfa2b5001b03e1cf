"""The configuration, and what is checked beyond it before anything is done by it: the files that it names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.config import Config, ConfigError, load
from workers.discovery.endpoints_file import EndpointsError, read_endpoints
from workers.transport import tls_context
from workers.users import UsersError, read_users


def load_checked(path: Path | None, flags: Mapping[str, Any] | None = None, *, serving: bool = False) -> Config:
    """As `load`, with the endpoints file and the users file read once. `serving`: with the TLS files, too, which only
    the router itself can be expected to have. Raises ConfigError."""
    config = load(path, flags)
    try:
        if config.endpoints is not None:
            read_endpoints(config.endpoints)
        if config.limits.users_file is not None:
            read_users(config.limits.users_file)
    except (EndpointsError, UsersError) as error:
        raise ConfigError(str(error)) from None
    if serving:
        tls_context(config.tls)
        if config.kubernetes is not None:
            from workers.discovery.kubernetes_source import check_access

            check_access()
    return config
