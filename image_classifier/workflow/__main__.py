"""`python -m image_classifier.workflow run --config FILE`: checks the file, then starts Metaflow."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from image_classifier.cli.command import ExitStatus, execute
from image_classifier.errors import SettingsError
from image_classifier.extras import check_extra
from image_classifier.workflow.document import Document, check_before, load_document, parse_document

USAGE = """usage: python -m image_classifier.workflow run --config FILE [OPTIONS]
       python -m image_classifier.workflow resume [OPTIONS]

  run        check a workflow's file and run it, from the snapshot to the promotion
  resume     go on with the last run, or with --origin-run-id: what succeeded is not computed again

All other commands and options are Metaflow's, such as `card view train`, `logs ID/train`, `run --with kubernetes`:
`python -m image_classifier.workflow metaflow` lists them."""

FLOW = Path(__file__).with_name("flow.py")
_PLACE = "METAFLOW_DATASTORE_SYSROOT_LOCAL"
_MAX_SPLITS = 100
"""Of a foreach, unless Metaflow is told otherwise."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check what there is to check, and become Metaflow's process; return the exit status if that is not reached."""
    return execute(_workflow, argv, shows_progress=False)


def _workflow(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return ExitStatus.DONE
    check_extra("metaflow", "workflow")
    if words == ["metaflow"]:
        words = ["--help"]
    elif "run" in words and (words[0] == "run" or words[0].startswith("-")):
        words = build_run(words)
    environment = {**os.environ, **build_environment(os.environ)}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, str(FLOW), "--no-pylint", *words], environment)


def build_run(words: Sequence[str]) -> list[str]:
    """Check the file that `run` is given, and build the words for Metaflow, with its content in place of its name.

    Raises:
        ImageClassifierError: the file is not as it must be, or the run is there already.
    """
    position = words.index("run")
    above, options = list(words[:position]), list(words[position + 1 :])
    file = _take_option(options, "--config")
    content = load_document(Path(file))
    document = parse_document(content)
    check_before(document)
    return [*above, "run", "--document", json.dumps(content), *_limit(document, options), *options]


def _take_option(words: list[str], name: str) -> str:
    """Take an option and its value out of the words."""
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == name and (equals or words[index + 1 : index + 2]):
            taken = words[index : index + (1 if equals else 2)]
            del words[index : index + len(taken)]
            return value if equals else taken[1]
    raise SettingsError(f"{name} is required: the workflow's YAML file")


def _limit(document: Document, options: Sequence[str]) -> list[str]:
    """Limit processes and tasks of a sweep to what it has, unless the user does."""
    given = {option.partition("=")[0] for option in options}
    if document.sweep is None:
        return []
    limits = {"--max-workers": document.sweep.parallel, "--max-num-splits": max(document.num_trials, _MAX_SPLITS)}
    return [word for name, limit in limits.items() if name not in given for word in (name, str(limit))]


def build_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Build the variables that Metaflow's processes need.

    They find the modules that this one finds. What Metaflow keeps lies in the current folder, and in none above that it
    finds by chance. It wants the name of a user that is not root, which a container may not have.
    """
    folders = [*([] if sys.flags.safe_path else [os.getcwd()]), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    variables = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, folders)))}
    variables[_PLACE] = environment.get(_PLACE) or os.getcwd()
    names = (environment.get(name) for name in ("METAFLOW_USER", "SUDO_USER", "USERNAME", "USER"))
    if not any(name and name != "root" for name in names):
        variables["METAFLOW_USER"] = f"uid-{os.getuid()}"
    return variables


if __name__ == "__main__":
    sys.exit(main())
