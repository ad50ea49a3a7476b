"""`image_classifier verify RUN`: trains a recorded run again and gives the verdict."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from image_classifier.access import DatabaseAccess
from image_classifier.cli.access import add_access_options, build_access
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute
from image_classifier.cli.signals import StopRequest
from image_classifier.errors import Interrupted, SettingsError
from image_classifier.progress import say, track
from image_classifier.references import get_url
from image_classifier.remote.cache import localize
from image_classifier.storage import written_beside
from image_classifier.text import count, make_printable

if TYPE_CHECKING:
    from image_classifier.verification import Verification

FLAGS = {
    "files_only": "check the files against the manifest and train nothing",
    "anyway": "train although this machine is of another class, with the nearest to what it lacks, and say how far "
    "apart it ends",
    "allow_code_change": "train although the package's code is not the code of the record",
    "allow_environment_change": "train although the installed libraries are not those of the record",
    "recreate": "make the run's environment again in a scratch folder, and let the package that trained it verify it",
}
PASSED_ON = (
    *("anyway", "dataset_folder", "experiments_folder", "segment", "sample", "nonce", "statement"),
    *("num_threads", "num_workers", "db_config", "db_pass_file"),
)
"""Options of `--recreate` that the package of the run is given."""


def main(argv: Sequence[str] | None = None) -> int:
    """Verify as the command line says and return the exit status."""
    return execute(_verify, argv)


# Over 50 lines: a list of options.
def build_verify_parser() -> ArgumentParser:
    """Build the parser of `verify`."""
    parser = build_parser("verify", "Train a recorded run again and say whether every bit of it is the same.")
    parser.add_argument(
        "run", type=Path, help="the run's folder, or its URL; to count verdicts, also that of a published model"
    )
    for flag, purpose in FLAGS.items():
        parser.add_argument(f"--{flag}", action="store_true", help=purpose)
    parser.add_argument(
        "--dataset_folder",
        type=Path | None,
        default=None,
        help="the run's data set, if it moved; its URL, or db:NAME@VERSION",
    )
    add_access_options(parser)
    parser.add_argument(
        "--experiments_folder", type=Path | None, default=None, help="where its pretrained model lies, if it moved"
    )
    parser.add_argument(
        "--segment", type=str | None, default=None, help="A:B trains only from the checkpoint of step A to step B"
    )
    parser.add_argument(
        "--sample", type=int | None, default=None, help="train only so many segments, each between two checkpoints"
    )
    parser.add_argument(
        "--nonce", type=str | None, default=None, help="nonce that decides which segments are drawn; random by default"
    )
    parser.add_argument(
        "--wheels",
        type=Path | None,
        default=None,
        help="folder with the wheels for --recreate, which then needs no network; without it, pip's index",
    )
    parser.add_argument("--attest", action="store_true", help="sign the verdict, and write it beside the run")
    parser.add_argument(
        "--statement", type=Path | None, default=None, help="new file for the verdict, for `attest` to sign elsewhere"
    )
    parser.add_argument(
        "--sign_key", type=str | None, default=None, help="private key to sign with (elliptic curve, PEM), or keyless"
    )
    parser.add_argument(
        "--threshold",
        type=str | None,
        default=None,
        help="K-of-N: train nothing, and count the signed verdicts of N verifiers, of which K are needed",
    )
    parser.add_argument(
        "--public_key", type=Path, nargs="+", default=[], help="PEM files of the verifiers' public keys"
    )
    parser.add_argument(
        "--policy",
        type=Path | None,
        default=None,
        help="YAML file with the verifiers who count, and how many are needed",
    )
    parser.add_argument("--num_threads", type=int, default=0, help="threads that compute shards; 0 for all cores")
    parser.add_argument("--num_workers", type=int, default=1, help="threads that prepare batches")
    return parser


# Over 50 lines: the stages of a verification in their order.
def _verify(argv: Sequence[str] | None) -> int:
    parsed = parse_arguments(build_verify_parser(), argv)
    access = build_access(parsed, DatabaseAccess().dataset_folder)
    options = {name: value for name, value in parsed.items() if not name.startswith("db_")}
    counting = {name: options.pop(name) for name in ("threshold", "public_key", "policy")}
    signing = {name: options.pop(name) for name in ("attest", "sign_key", "statement")}
    if signing["attest"] and get_url(options["run"]) is not None:
        raise SettingsError("--attest writes beside the run, which must lie on this machine: copy it here first")
    options["run"] = localize(options["run"])
    if any(counting.values()):
        _check_alone(options, signing)
        return _count(options["run"], **counting)
    if signing["attest"] != (signing["sign_key"] is not None):
        raise SettingsError("--attest and --sign_key are needed together: a verdict that nobody signed proves nothing")
    _check_statement(signing["statement"])
    recreating = {name: options.pop(name) for name in ("recreate", "wheels")}
    if any(recreating.values()):
        return _recreate(options["run"], {**dict(parsed.items()), **options, **signing, **recreating})

    if options.pop("files_only"):
        if signing["attest"] or signing["statement"]:
            raise SettingsError("--files_only trains nothing that --attest could attest; leave one of them out")
        return _check_files(options["run"])

    from image_classifier.tracking.reading import read_record
    from image_classifier.training.determinism import cap_instruction_set, restore_nearest_settings

    nearest, _ = restore_nearest_settings(read_record(options["run"])["settings"])
    cap_instruction_set(nearest.instruction_set)  # before torch is imported

    with StopRequest() as stop:
        try:
            with track("starting"):
                from image_classifier.cli.progress import TerminalReporter
                from image_classifier.verification import VerificationSettings, verify

            run = options.pop("run")
            settings = VerificationSettings(run_folder=run, database_access=access, **options)
            sign = None
            if signing["attest"]:
                from image_classifier.attestation import attest, prepare

                sign = prepare(run, signing["sign_key"])
            with closing(TerminalReporter()) as reporter:
                verification = verify(settings, reporter)
        except Interrupted as interruption:
            print(f"{interruption}: no verdict", file=sys.stderr)
            return stop.exit_status
    status = _print_verdict(verification.verdict, verification.reasons)
    if sign is not None:
        for path in attest(run, verification, sign, say=say):
            print(f"  signed: {path}")
    if signing["statement"]:
        _write_statement(signing["statement"], run, verification)
    return status


def _recreate(run: Path, options: dict[str, Any]) -> int:
    """Let the run be verified in an environment like its own."""
    if not options["recreate"]:
        raise SettingsError("--wheels is for --recreate; give that, too")
    for name in ("files_only", "allow_code_change", "allow_environment_change", "attest"):
        if options[name]:
            remedy = "write a --statement, and sign it with `attest`" if name == "attest" else "leave one of them out"
            raise SettingsError(f"--recreate and --{name} contradict each other: {remedy}")

    from image_classifier.tracking.checking import verify_files

    if changed := verify_files(run):
        return _print_verdict("DIFFERENT", changed)

    from image_classifier.recreation import recreate

    defaults = build_verify_parser().get_defaults()
    given = [name for name in PASSED_ON if options[name] != defaults[name]]
    words = [f"--{name}" if name in FLAGS else f"--{name}={options[name]}" for name in given]
    return recreate(run, words, wheels=options["wheels"], say=say)


def _check_files(run: Path) -> int:
    """Hold a run's files against its manifest, and print what differs."""
    from image_classifier.tracking.checking import describe_others, verify_files
    from image_classifier.tracking.reading import read_manifest

    if changed := verify_files(run):
        return _print_verdict("DIFFERENT", changed)
    checked = f"{len(read_manifest(run)['files'])} files are as the manifest has them"
    return _print_verdict("INTACT", [checked, *describe_others(run)])


def _write_statement(path: Path, run: Path, verification: Verification) -> None:
    """Write a verdict, for `attest` to sign elsewhere."""
    from image_classifier.attestation import serialize_verdict

    statement = serialize_verdict(run, verification, say=say)
    with written_beside(path, replace=False) as temporary:
        temporary.write_bytes(statement)
    print(f"  not signed yet: {make_printable(str(path))}")


def _check_statement(path: Path | None) -> None:
    """Check, before a run is trained again, that its verdict can be written.

    Raises:
        SettingsError: it cannot.
    """
    if path is not None and (os.path.lexists(path) or not path.parent.is_dir()):
        reason = "is there already" if os.path.lexists(path) else "lies in no folder"
        raise SettingsError(f"--statement takes a new file, and {path} {reason}")


def _check_alone(options: dict[str, Any], signing: dict[str, Any]) -> None:
    """Check that nothing is asked for that trains where verdicts are counted.

    Raises:
        SettingsError: something is.
    """
    names = (*FLAGS, "wheels", "dataset_folder", "experiments_folder", "segment", "sample", "nonce")
    asked = [name for name, value in (options | signing).items() if value and name in (*names, *signing)]
    if asked:
        raise SettingsError(
            f"--{asked[0]} is for a verification that trains, and --threshold, --public_key and --policy count the "
            "verdicts of others; leave one of them out"
        )


def _count(path: Path, *, threshold: str | None, public_key: list[Path], policy: Path | None) -> int:
    """Count the verdicts of others about a run, or a published model, and print who has given them."""
    from image_classifier.published.folder import MODEL, read_published
    from image_classifier.published.policy import build_policy, check_published, check_run, load_policy, parse_threshold
    from image_classifier.tracking.checking import is_finished, verify_files
    from image_classifier.tracking.reading import read_manifest

    if bool(public_key) == (policy is not None) or (public_key and threshold is None):
        raise SettingsError("give --threshold K-of-N with the --public_key of each of N verifiers, or give a --policy")
    number, total = parse_threshold(threshold) if threshold is not None else (0, 0)
    asked = load_policy(policy) if policy is not None else None
    num_named = len(public_key) if asked is None else len(asked.verifiers)
    if threshold is not None and total != num_named:
        raise SettingsError(f"--threshold {threshold} is of {total} verifiers, and {num_named} are named")
    if asked is None:
        asked = build_policy(number, public_key)
    elif threshold is not None:
        asked = replace(asked, threshold=number)
    if (path / MODEL).is_file():
        tally = check_published(path, read_published(path), asked)
    else:
        manifest = read_manifest(path) if is_finished(path) else {}
        if changed := verify_files(path):
            return _print_verdict("DIFFERENT", changed)
        tally = check_run(path, manifest, asked)
    num_found = len(asked.verifiers) - len(tally.missing)
    lines = [f"found IDENTICAL by {num_found} of {count(len(asked.verifiers), 'verifier')}; needed: {asked.threshold}"]
    lines += sorted({attestation.describe() for attestation in tally.counted})
    lines += [f"missing: {name}" for name in tally.missing]
    lines += [f"not counted: {line}" for line in tally.describe_ignored()]
    return _print_verdict("ACCEPTED", [make_printable(line) for line in lines])


def _print_verdict(verdict: str, reasons: Sequence[str]) -> int:
    print(verdict)
    for reason in reasons:
        print(f"  {reason}")
    return {"DIFFERENT": ExitStatus.DIFFERENT, "NOT COMPARABLE": ExitStatus.NOT_COMPARABLE}.get(
        verdict, ExitStatus.DONE
    )


PARSERS = (build_verify_parser,)
