"""`image_classifier push`: a published model to where others find it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from image_classifier.cli.access import add_public_key_option
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute_action
from image_classifier.remote.cache import localize


def main(argv: Sequence[str] | None = None) -> int:
    """Run the action that the first word names and return the exit status."""
    return execute_action("push", ACTIONS, argv)


def build_hub_parser() -> ArgumentParser:
    """Build the parser of `push hub`."""
    parser = build_parser(
        "push hub",
        "Push a published model to the Hugging Face Hub, with its card as README.md; prints the commit's address. "
        "The token is that of HF_TOKEN, or of `hf auth login`.",
    )
    parser.add_argument("repository", type=str, help="OWNER/NAME; made if there is none")
    parser.add_argument(
        "model", type=Path, help="folder of a published run, or of the published model in it, or its URL"
    )
    parser.add_argument("--private", action="store_true", help="let only its owner see a repository that is made")
    add_public_key_option(parser)
    return parser


def _push_to_hub(argv: Sequence[str] | None) -> int:
    """push a published model to the Hugging Face Hub"""
    options = parse_arguments(build_hub_parser(), argv)

    from image_classifier.publishing.hub import push

    print(push(localize(options.model), options.repository, private=options.private, public_key=options.public_key))
    return ExitStatus.DONE


ACTIONS = {"hub": _push_to_hub}
PARSERS = (build_hub_parser,)
