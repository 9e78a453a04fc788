"""``tilepipe convert``: a plain state dict into weights that say what they are."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import click

from tilepipe.cli import options


@click.command("convert")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="Architecture, see `tilepipe models`.")
@click.option("--map", "map_file", type=click.Path(path_type=Path), help="Key map, TOML.")
@click.option("--in-channels", type=click.IntRange(1, 1024), help="Channels (default IN's or 3).")
@click.option(
    "--classes", type=click.IntRange(1, 255), help="Logits; 1 is a sigmoid (default IN's or 2)."
)
@click.option("--base", type=click.IntRange(1, 1024), help="Channels of the first level.")
@click.option("--option", "pairs", multiple=True, metavar="KEY=VALUE", help="Of the architecture.")
@click.option("--mpp", type=float, help="µm/px of the training images.")
@click.option("--mean", multiple=True, type=float, help="Per channel, in units of full scale.")
@click.option("--std", multiple=True, type=float, help="Per channel, in units of full scale.")
@click.option("--fp16", is_flag=True, help="Store half the bytes.")
@options.json_option
@options.quiet_option
@options.debug_option
def command(
    source: Path,
    target: Path,
    model: str,
    map_file: Path | None,
    in_channels: int | None,
    classes: int | None,
    base: int | None,
    pairs: tuple[str, ...],
    mpp: float | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    fp16: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Turn IN (.pth, .pt or .safetensors state dict) into weights OUT (.safetensors).

    Nothing in IN is executed; a file that would is refused and what it calls is named. Of weights
    that are tilepipe's already, classes, normalisation, µm/px and options are kept where neither an
    option nor the map says otherwise.

    \b
    The map file renames keys and may say what the weights cannot:
      in_channels = 1
      outputs = 1
      declared_halo = 32             as published; checked by the probe
      drop = ["optimizer"]           regular expressions
      swap = ["decoders.+0.conv.weight"]  of ours, if it joins maps the other way
      [arguments]                    base and options of the architecture
      depth = 3
      [prefix]                       the longest that fits, once
      "module." = ""
      [[regex]]                      then these, in order
      from = '^enc(\\d)'
      to = 'encoders.\\1'
    """  # noqa: D301 - click wants the character itself
    from tilepipe.errors import CheckpointError, argument
    from tilepipe.models.convert import KeyMap, convert
    from tilepipe.models.normalisation import Normalisation

    if target.suffix.lower() != ".safetensors":
        raise CheckpointError(f"{target}: weights are called .safetensors; rename OUT")
    arguments = options.key_values(pairs)
    if base is not None:
        arguments["base"] = base
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", UserWarning)
        facts = convert(
            source,
            target,
            model=model,
            key_map=KeyMap.from_toml(map_file) if map_file else None,
            in_channels=in_channels,
            outputs=classes,
            arguments=arguments,
            mpp=mpp,
            normalisation=Normalisation("mean-std", mean, std) if mean or std else None,
            storage="fp16" if fp16 else "fp32",
        )
    facts["warnings"] = [str(item.message) for item in raised if item.category is UserWarning]
    for warning in [] if quiet else facts["warnings"]:
        click.echo(f"Warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps(facts))
    elif not quiet:
        exact = "exact in tiles" if facts["exact"] else facts["reason"]
        taken = ""
        if facts["assumed"]:
            taken = (
                f"Weights do not say, so this is taken: {', '.join(facts['assumed'])}; compare one "
                "result with the program that they come from\n"
            )
        click.echo(
            f"{facts['path']}: {facts['architecture']}, {facts['tensors']} tensors, context "
            f"{facts['context_px']} px, alignment {facts['alignment_px']} px, {exact}\n"
            f"{taken}Next: tilepipe run SLIDE -o OUT.zarr --model {facts['architecture']} "
            f"--weights {argument(facts['path'])}"
        )
