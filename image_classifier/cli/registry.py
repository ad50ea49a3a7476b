"""`image_classifier registry`: versions and aliases of published models, and whether their files are whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from image_classifier.access import DatabaseAccess
from image_classifier.choices import describe_views
from image_classifier.cli.access import (
    add_access_options,
    add_public_key_option,
    add_skip_bad_option,
    build_access,
)
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute_action
from image_classifier.cli.table import format_table
from image_classifier.errors import SettingsError
from image_classifier.progress import say
from image_classifier.references import get_url
from image_classifier.remote.cache import localize
from image_classifier.text import make_printable

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from image_classifier.publishing.registry import Proof, Registry, Version

GITHUB_ISSUER = "https://token.actions.githubusercontent.com"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the action that the first word names and return the exit status."""
    return execute_action("registry", ACTIONS, argv)


def _build_parser(action: str, description: str) -> ArgumentParser:
    parser = build_parser(f"registry {action}", description)
    parser.add_argument(
        "--tracking_uri", type=str | None, default=None, help="MLflow server or database; a SQLite file by default"
    )
    parser.add_argument(
        "--experiments_folder", type=Path, default=Path("experiments"), help="folder that the SQLite file lies under"
    )
    return parser


def _add_proof(parser: ArgumentParser) -> None:
    add_public_key_option(parser)
    parser.add_argument(
        "--dataset_folder",
        type=Path | None,
        default=None,
        help="the model's data set, or db:NAME@VERSION, to compute its accuracy; "
        f"by default {DatabaseAccess().dataset_folder}, but with --public_key the signed accuracy counts",
    )
    add_access_options(parser)
    add_skip_bad_option(parser)


def _build_proof(arguments: Namespace) -> Proof:
    from image_classifier.published.policy import load_policy
    from image_classifier.publishing.registry import Proof

    return Proof(
        public_key=arguments.public_key,
        dataset_folder=arguments.dataset_folder,
        access=build_access(arguments, DatabaseAccess().dataset_folder),
        skip_bad=arguments.skip_bad,
        policy=load_policy(arguments.policy) if arguments.get("policy") else None,
        captured=arguments.get("captured"),
        labels=arguments.get("labels"),
        say=say,
    )


def build_add_parser() -> ArgumentParser:
    """Build the parser of `registry add`."""
    parser = _build_parser("add", "Register a published run as the next version of a model; prints NAME/VERSION.")
    parser.add_argument("run", type=Path, help="folder of a published run, or of the published model in it")
    parser.add_argument("--name", type=str | None, default=None, help="of the model; the experiment's by default")
    parser.add_argument("--alias", type=str | None, default=None, help="alias to point to it, such as challenger")
    _add_proof(parser)
    return parser


def build_list_parser() -> ArgumentParser:
    """Build the parser of `registry list`."""
    parser = _build_parser("list", "Show models, their versions, aliases, runs and accuracy.")
    parser.add_argument("--name", type=str | None, default=None, help="show this model alone")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def build_promote_parser() -> ArgumentParser:
    """Build the parser of `registry promote`."""
    parser = _build_parser(
        "promote",
        "Point an alias to a version, unless it is significantly worse than the one that the alias points to.",
    )
    parser.add_argument("reference", type=str, help="NAME/VERSION or NAME@ALIAS")
    parser.add_argument("--alias", type=str, default="champion", help="the alias to point to it")
    parser.add_argument("--allow_loss", action="store_true", help="promote it although it is worse, or not comparable")
    _add_proof(parser)
    parser.add_argument(
        "--policy", type=Path | None, default=None, help="YAML file that says by whom its run must have been verified"
    )
    parser.add_argument(
        "--captured",
        type=str | None,
        default=None,
        help="folder or URL that servers captured to: it must be no worse on the images there, either",
    )
    parser.add_argument(
        "--labels",
        type=Path | None,
        default=None,
        help="CSV file with request_id, image_index and label of captured images",
    )
    return parser


def build_resolve_parser() -> ArgumentParser:
    """Build the parser of `registry resolve`."""
    parser = _build_parser("resolve", "Print the folder of a version; it is fetched if need be, and checked.")
    parser.add_argument("reference", type=str, help="NAME/VERSION or NAME@ALIAS")
    add_public_key_option(parser)
    return parser


def build_check_parser() -> ArgumentParser:
    """Build the parser of `registry check`."""
    parser = _build_parser("check", "Check a published model's files against its manifest and its signature.")
    parser.add_argument(
        "reference", type=str, help="folder of a published run or model or its URL, or NAME/VERSION or NAME@ALIAS"
    )
    add_public_key_option(parser)
    parser.add_argument(
        "--identity",
        type=str | None,
        default=None,
        help="identity that must have signed it with Sigstore, such as a workflow's address",
    )
    parser.add_argument("--issuer", type=str, default=GITHUB_ISSUER, help="OpenID issuer of that identity")
    parser.add_argument(
        "--trust_config",
        type=Path | None,
        default=None,
        help="file with the keys of a Sigstore of your own (ClientTrustConfig, JSON); by default the public one's",
    )
    return parser


def _open(arguments: Namespace) -> Registry:
    from image_classifier.publishing.registry import Registry

    return Registry(arguments.tracking_uri, arguments.experiments_folder)


def _add(argv: Sequence[str] | None) -> int:
    """register a published run as the next version of a model"""
    arguments = parse_arguments(build_add_parser(), argv)

    from image_classifier.published.folder import find_published, read_manifest

    folder = find_published(localize(arguments.run))
    name = arguments.name or read_manifest(folder)["experiment_name"]
    proof = _build_proof(arguments)
    version = _open(arguments).add(folder, name, alias=arguments.alias, proof=proof)
    if version.accuracy is not None:
        say(f"accuracy {_format_accuracy(version.accuracy)} of the test set, {_describe_views(version)}")
    if version.unchecked:
        proof.say(f"note: its accuracy was not checked: {version.unchecked}; name the run's data with --dataset_folder")
    print(f"{version.name}/{version.number}")
    return ExitStatus.DONE


def _list(argv: Sequence[str] | None) -> int:
    """show models, versions, aliases and their accuracy"""
    arguments = parse_arguments(build_list_parser(), argv)
    versions = _open(arguments).list(arguments.name)
    if arguments.json:
        rows = [
            {"name": v.name, "version": v.number, "aliases": v.aliases, **v.tags, "run_id": v.run_id} for v in versions
        ]
        print(json.dumps(rows, indent=2))
    else:
        heading = ["model", "version", "aliases", "run", "views", "accuracy"]
        lines = [
            [
                *(v.name, v.number, ", ".join(v.aliases), v.tags.get("run", "")),
                *(_describe_views(v), _format_accuracy(v.accuracy)),
            ]
            for v in versions
        ]
        print(format_table([heading, *lines], num_left=5) if versions else "no model is registered")
    return ExitStatus.DONE


def _format_accuracy(accuracy: float | None) -> str:
    return "unchecked" if accuracy is None else f"{100 * accuracy:.2f} %"


def _describe_views(version: Version) -> str:
    return describe_views(version.tags.get("views", "unknown"))


def _promote(argv: Sequence[str] | None) -> int:
    """point an alias to a version that is not significantly worse than the present one"""
    arguments = parse_arguments(build_promote_parser(), argv)
    if (arguments.captured is None) != (arguments.labels is None):
        raise SettingsError("--captured and --labels are needed together; give both")
    proof = _build_proof(arguments)
    promotion = _open(arguments).promote(
        arguments.reference, alias=arguments.alias, allow_loss=arguments.allow_loss, proof=proof
    )
    if promotion.unchecked:
        proof.say(f"note: it was not checked: {promotion.unchecked}")
    comparison = f"; it was {promotion.former}" if promotion.former not in (None, promotion.number) else ""
    if promotion.difference is not None:
        comparison += f", {100 * promotion.difference:+.2f} points of accuracy (p = {promotion.p_value:.2g})"
    if promotion.judged is not None:
        judged = promotion.judged
        comparison += f", {100 * judged.difference:+.2f} points on {judged.num_images:,} captured images"
    print(f"{promotion.name}@{promotion.alias} is version {promotion.number}{comparison}")
    return ExitStatus.DONE


def _resolve(argv: Sequence[str] | None) -> int:
    """print the folder of a version, which is fetched and checked"""
    arguments = parse_arguments(build_resolve_parser(), argv)
    folder, _ = _open(arguments).resolve(arguments.reference, public_key=arguments.public_key)
    print(folder)
    return ExitStatus.DONE


def _check(argv: Sequence[str] | None) -> int:
    """check a published model's files against its manifest and its signature"""
    arguments = parse_arguments(build_check_parser(), argv)

    from image_classifier.published.folder import (
        SIGNATURE,
        check_identity_signature,
        find_published,
        read_published,
    )

    if get_url(arguments.reference) is not None or Path(arguments.reference).exists():
        folder = find_published(localize(arguments.reference))
    else:
        folder, _ = _open(arguments).resolve(arguments.reference)
    published = read_published(folder, arguments.public_key)
    if arguments.identity is not None:
        check_identity_signature(folder, published, arguments.identity, arguments.issuer, arguments.trust_config)
    signers = [str(signer) for signer in (arguments.public_key, arguments.identity) if signer is not None]
    if signers:
        signature = f"signed by {' and '.join(signers)}"
    elif SIGNATURE in published.files:
        signature = "signed, by whom was not asked: give --public_key or --identity"
    else:
        signature = "not signed"
    num_files = len(published.manifest["files"])
    print(f"INTACT\n  {num_files} files are as the manifest has them\n  {make_printable(signature)}")
    return ExitStatus.DONE


ACTIONS = {"add": _add, "list": _list, "promote": _promote, "resolve": _resolve, "check": _check}
PARSERS = (build_add_parser, build_list_parser, build_promote_parser, build_resolve_parser, build_check_parser)
