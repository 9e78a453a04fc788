"""``tilepipe verify``: prove that a finished mask is what it should be."""

from __future__ import annotations

import json

import click

from tilepipe.cli import options


@click.command("verify")
@click.argument("store")
@click.option("--label", help="Verify this label alone; default every label of the store.")
@click.option(
    "--samples",
    type=click.IntRange(min=0, max=100_000),
    default=8,
    show_default=True,
    help="Places of 256 px that are computed again.",
)
@click.option("--slide", help="Where the slide is now, if it was moved.")
@click.option("--weights", help="Where the weights are now, if they were moved.")
@options.json_option
@options.quiet_option
@options.debug_option
def command(
    store: str,
    label: str | None,
    samples: int,
    slide: str | None,
    weights: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Verify the masks of STORE and keep the certificate beside them.

    Every checksum against the bytes, every pyramid level against a fresh reduction of the one
    below, the image against the slide if it is still there, and random places of the mask (and of
    its probabilities) against a second computation in float32 from larger pieces that are cut
    otherwise. Exit code 1 names the first wrong box.
    """
    from tilepipe.cli.steps import progress
    from tilepipe.errors import VerifyError
    from tilepipe.infer.certify import verifiable, verify

    names = (label,) if label is not None else verifiable(store)
    if not names:
        raise VerifyError(f"{store}: has no mask made by tilepipe run; there is nothing to verify")
    certificates = []
    for name in names:
        with progress(store, quiet=quiet, as_json=as_json) as tell:
            certificate = verify(
                store, label=name, samples=samples, slide=slide, weights=weights, tell=tell
            )
        certificates.append(certificate.to_json())
        if not (as_json or quiet):
            planes = certificate.probability_units
            beside = f", {planes} of its probabilities" if planes else ""
            objects = certificate.object_units
            beside += f", {objects} of its objects" if objects else ""
            click.echo(
                f"{store}: label {name} verified\n"
                f"  {certificate.samples} places, {certificate.sampled_px} px computed again: "
                f"{certificate.flips} differ, {certificate.ties} ties, "
                f"mask made in {certificate.precision}; two cuts in fp32 differ by at most "
                f"{certificate.max_probability_error:.2g} in probability\n"
                f"  {certificate.label_units} units of the mask{beside} and "
                f"{certificate.image_units} of the image have the bytes that were written; "
                f"slide: {certificate.slide}"
            )
            for note in certificate.notes:
                click.echo(f"  note: {note}")
    if as_json:
        click.echo(json.dumps(certificates[0] if len(certificates) == 1 else certificates))
