"""`image_classifier verify RUN`: trains a recorded run again and gives the verdict."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from jsonargparse import ArgumentParser

from image_classifier.cli.access import add_access_options, build_access
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute
from image_classifier.cli.signals import StopRequest
from image_classifier.config import DatabaseAccess
from image_classifier.errors import Interrupted
from image_classifier.progress import track

FLAGS = {
    "files_only": "check the files against the manifest and train nothing",
    "anyway": "train although this machine is of another class, with the nearest to what it lacks, and say how far "
    "apart it ends",
    "allow_code_change": "train although the package's code is not the code of the record",
    "allow_environment_change": "train although the installed libraries are not those of the record",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Verify as the command line says and return the exit status."""
    return execute(_verify, argv)


def build_verify_parser() -> ArgumentParser:
    """Build the parser of `verify`."""
    parser = build_parser("verify", "Train a recorded run again and say whether every bit of it is the same.")
    parser.add_argument("run", type=Path, help="the run's folder")
    for flag, purpose in FLAGS.items():
        parser.add_argument(f"--{flag}", action="store_true", help=purpose)
    parser.add_argument(
        "--dataset_folder", type=Path | None, default=None, help="the run's data set, if it moved; or db:NAME@VERSION"
    )
    add_access_options(parser)
    parser.add_argument(
        "--experiments_folder", type=Path | None, default=None, help="where its pretrained model lies, if it moved"
    )
    parser.add_argument(
        "--segment", type=str | None, default=None, help="A:B trains only from the checkpoint of step A to step B"
    )
    parser.add_argument("--num_threads", type=int, default=0, help="threads that compute shards; 0 for all cores")
    parser.add_argument("--num_workers", type=int, default=1, help="threads that prepare batches")
    return parser


def _verify(argv: Sequence[str] | None) -> int:
    parsed = parse_arguments(build_verify_parser(), argv)
    access = build_access(parsed, DatabaseAccess().dataset_folder)
    options = {name: value for name, value in parsed.items() if not name.startswith("db_")}

    from image_classifier.tracking.run import describe_others, read_manifest, read_record, verify_files

    if options.pop("files_only"):
        if changed := verify_files(options["run"]):
            return _print_verdict("DIFFERENT", changed)
        num_files = len(read_manifest(options["run"])["files"])
        checked = f"{num_files} files are as the manifest has them"
        return _print_verdict("INTACT", [checked, *describe_others(options["run"])])

    from image_classifier.training.determinism import cap_instruction_set, restore_nearest_settings

    nearest, _ = restore_nearest_settings(read_record(options["run"])["settings"])
    cap_instruction_set(nearest.instruction_set)  # before torch is imported

    with StopRequest() as stop:
        try:
            with track("starting"):
                from image_classifier.cli.progress import TerminalReporter
                from image_classifier.verification import VerificationSettings, verify

            settings = VerificationSettings(run_folder=options.pop("run"), database_access=access, **options)
            with closing(TerminalReporter()) as reporter:
                verification = verify(settings, reporter)
        except Interrupted as interruption:
            print(f"{interruption}: no verdict", file=sys.stderr)
            return stop.exit_status
    return _print_verdict(verification.verdict, verification.reasons)


def _print_verdict(verdict: str, reasons: Sequence[str]) -> int:
    print(verdict)
    for reason in reasons:
        print(f"  {reason}")
    return {"DIFFERENT": ExitStatus.DIFFERENT, "NOT COMPARABLE": ExitStatus.NOT_COMPARABLE}.get(
        verdict, ExitStatus.DONE
    )


PARSERS = (build_verify_parser,)
