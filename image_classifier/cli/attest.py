"""`image_classifier attest RUN STATEMENT`: signs the verdict that another machine has given, and trains nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from image_classifier import files
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute
from image_classifier.errors import RunError
from image_classifier.published.attestation import MAX_BYTES
from image_classifier.text import one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Sign as the command line says and return the exit status."""
    return execute(_attest, argv)


def build_attest_parser() -> ArgumentParser:
    """Build the parser of `attest`."""
    parser = build_parser("attest", "Sign the verdict that `verify --statement` wrote on a machine that you vouch for.")
    parser.add_argument("run", type=Path, help="the run's folder, beside which the signed verdict is written")
    parser.add_argument("statement", type=Path, help="the file that `verify --statement` wrote")
    parser.add_argument(
        "--sign_key", type=str, required=True, help="private key for it (elliptic curve, PEM), or keyless"
    )
    return parser


def _attest(argv: Sequence[str] | None) -> int:
    arguments = parse_arguments(build_attest_parser(), argv)
    try:
        statement = files.read_file(arguments.statement, MAX_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise RunError(f"the statement {arguments.statement} cannot be read: {reason}") from error

    from image_classifier.attestation import prepare, sign_statement

    for path in sign_statement(arguments.run, statement, prepare(arguments.run, arguments.sign_key)):
        print(f"signed: {path}")
    return ExitStatus.DONE


PARSERS = (build_attest_parser,)
