"""``tilepipe view``: serve stores to the browser on this computer."""

from __future__ import annotations

import json
import threading
import webbrowser

import click

from tilepipe.cli import options
from tilepipe.cli.masks import tell_lost


@click.command("view")
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port on 127.0.0.1; 0 takes a free one.",
)
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@click.option(
    "--cache",
    "cache_mib",
    type=click.IntRange(16, 1 << 20),
    default=256,
    show_default=True,
    help="MiB of decoded tiles kept in memory.",
)
@options.json_option
@options.quiet_option
@options.debug_option
def command(
    stores: tuple[str, ...],
    port: int,
    no_browser: bool,
    cache_mib: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Look at results in the browser, also while the job still runs.

    Two or more stores can be compared. The server answers only this computer, only reads, and
    its address holds a random token. Ctrl-C ends it.
    """
    from tilepipe.view.server import ViewServer

    server = ViewServer(list(stores), port=port, cache_bytes=cache_mib << 20)
    for source in server.sources if not quiet else ():
        for reason in source.left_out:
            click.echo(f"Warning: not shown: {reason}", err=True)
        tell_lost(source.store)
    if as_json:
        click.echo(json.dumps({"url": server.url, "stores": list(stores)}))
    elif not quiet:
        click.echo(f"{server.url}\nCtrl-C ends it.")
    if not no_browser:
        # It waits for some browsers to begin, or to end in a terminal; they want answers then.
        threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
