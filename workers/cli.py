"""The `pointsman` command."""

import json
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, BinaryIO

# One thread is all that a child of a fork can rely on.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click

from workers.config import Config, ConfigError
from workers.users_cli import users

_CONFIG_ERROR = 2


class _Commands(click.Group):
    """The commands of this file, and those that installed packages add under `pointsman.commands`."""

    def list_commands(self, context: click.Context) -> list[str]:
        found = {entry.name for entry in entry_points(group="pointsman.commands")}
        return sorted(found | set(super().list_commands(context)))

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        own = super().get_command(context, name)
        if own is not None:
            return own
        for entry in entry_points(group="pointsman.commands", name=name):
            try:
                command: click.Command = entry.load()
            except ModuleNotFoundError as error:
                raise click.ClickException(
                    f"{name} needs the Python package {error.name!r}: pip install '.[bench]' in a clone of pointsman"
                ) from None
            return command
        return None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="pointsman", prog_name="pointsman")
def main() -> None:
    """Sends each LLM request to the pod that will answer it soonest: an external processor for Envoy."""


def config_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--config FILE`."""
    return click.option(
        "--config", "path", type=click.Path(path_type=Path), help="YAML file; see docs/configuration.md."
    )(command)


def load_or_exit(path: Path | None, flags: dict[str, Any] | None = None, *, serving: bool = False) -> Config:
    """The configuration, or one line on standard error and exit code 2."""
    from workers.checks import load_checked

    try:
        return load_checked(path, flags, serving=serving)
    except ConfigError as error:
        click.echo(f"pointsman: {error}", err=True)
        sys.exit(_CONFIG_ERROR)


@main.command()
@config_option
@click.option("--listen", help="Address of all workers together.")
@click.option("--worker-listen", help="Address of worker i alone: port + i, or a unix path with {i}.")
@click.option("--workers", type=int, help="How many worker processes.")
@click.option("--transport", help="h2 or grpcio.")
@click.option("--admin", help="Address of the admin server.")
@click.option("--strategy", help="Default routing strategy; see `pointsman strategies`.")
@click.option("--endpoints", type=click.Path(), help="AIBrix endpoints file.")
@click.option("--log-format", type=click.Choice(["auto", "console", "json"]), help="Log lines.")
@click.option("--grpc-bind-address", hidden=True)
@click.option("--http-bind-address", "--metrics-bind-address", "http_bind_address", hidden=True)
@click.option("--endpoints-config", hidden=True)
@click.option("--standalone", is_flag=True, hidden=True)
def serve(
    path: Path | None,
    log_format: str | None,
    grpc_bind_address: str | None,
    http_bind_address: str | None,
    endpoints_config: str | None,
    standalone: bool,
    **flags: Any,
) -> None:
    """Run the router. AIBrix's flags are taken too: --grpc-bind-address, --http-bind-address, --metrics-bind-address,
    --endpoints-config, --standalone."""
    # Until the supervisor has handlers for them: their default is to end or to stop the process.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU})
    flags["listen"] = flags["listen"] or _bind_address(grpc_bind_address)
    flags["admin"] = flags["admin"] or _bind_address(http_bind_address)
    flags["endpoints"] = flags["endpoints"] or endpoints_config
    given = {name: value for name, value in flags.items() if value is not None}
    if log_format:
        given["log"] = {"format": log_format}
    config = load_or_exit(path, given, serving=True)
    from workers.checks import load_checked
    from workers.ports import AddressError
    from workers.supervisor import serve as run

    try:
        code = run(config, lambda: load_checked(path, given, serving=True))
    except ConfigError as error:
        where = f"{config.where(error.address)}: " if isinstance(error, AddressError) else ""
        click.echo(f"pointsman: {where}{error}", err=True)
        sys.exit(_CONFIG_ERROR)
    sys.exit(code)


def _bind_address(value: str | None) -> str | None:
    """Go writes ":50052" for every address of the host."""
    return f"0.0.0.0{value}" if value is not None and value.startswith(":") else value


@main.command("check-config", short_help="Check the configuration, print what is in force.")
@config_option
def check_config(path: Path | None) -> None:
    """Check the configuration and the files it names, as `serve` does, and print what is in force."""
    import yaml

    from workers.redis_link import without_password

    shown = load_or_exit(path, serving=True).model_dump(mode="json")
    if shown["redis"]:
        shown["redis"] = without_password(shown["redis"])
    click.echo(yaml.safe_dump(shown, sort_keys=False), nl=False)


@main.command()
@config_option
@click.option("--validate", is_flag=True, help="Also have Envoy itself check it; needs an envoy binary.")
def envoy(path: Path | None, validate: bool) -> None:
    """Print a complete Envoy bootstrap for this configuration."""
    import yaml

    from workers.envoy import bootstrap
    from workers.envoy_binary import envoy_path, validated

    config = load_or_exit(path)
    try:
        document = bootstrap(config)
        if validate:
            validated(envoy_path(), document)
    except ConfigError as error:
        click.echo(f"pointsman: {error}", err=True)
        sys.exit(_CONFIG_ERROR)
    click.echo("# Written by `pointsman envoy`; docs/envoy.md explains it.")
    click.echo(yaml.safe_dump(document, sort_keys=False, width=110), nl=False)


@main.command(short_help="Show where a running router would send a request.")
@click.argument("file", type=click.File("rb"))
@config_option
@click.option("--address", help="The router's ext_proc address; by default that of the configuration.")
@click.option("--path", "request_path", help="Of the request; by default inferred from the document's fields.")
@click.option("--header", "-H", "headers", multiple=True, metavar="NAME:VALUE", help="A request header; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print the receipt as JSON.")
def explain(
    file: BinaryIO,
    path: Path | None,
    address: str | None,
    request_path: str | None,
    headers: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show where a running router would send the request in FILE, a JSON body (- for standard input), and why.

    Nothing is sent to a pod, and nothing counted. The router must be configured with `explain: true`.
    """
    from workers.explain import ExplainError, ask, parse_headers, router_address, show

    try:
        config = load_or_exit(path)
        where = address or router_address(config)
        receipt = ask(where, file.read(), request_path, parse_headers(headers), config)
    except ExplainError as error:
        click.echo(f"pointsman: {error}", err=True)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(receipt))
    else:
        show(receipt)


@main.command()
def strategies() -> None:
    """List the routing strategies and their formulas."""
    from router.strategies import STRATEGIES, formula

    for name, strategy in STRATEGIES.items():
        click.secho(name, bold=True)
        for line in formula(strategy).splitlines():
            click.echo(f"    {line}" if line else "")
        click.echo()


main.add_command(users)


if __name__ == "__main__":
    main()
