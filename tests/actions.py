"""Executes a GitHub workflow on this machine: its expressions, its jobs and every `run:` step, under bash.

What GitHub itself does is behind one seam, `GitHub`: it holds the artifacts, answers `gh`, and records what it was
given. Only the forms that this project's workflows use are known; any other raises, so that nothing is passed over.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Context = Mapping[str, Any]
TOKEN = "ghs_a-token-that-nobody-may-see"
REPOSITORY = "somebody/image-classifier"

_TOKENS = re.compile(
    r"""\s*(?:
    (?P<text>'(?:[^']|'')*') | (?P<number>-?\d+(?:\.\d+)?(?![\w.])) | (?P<name>[A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*)
    | (?P<operator>==|!=|&&|\|\||[!(),]) )""",
    re.VERBOSE,
)
_EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)
_STATUS_FUNCTIONS = ("always", "cancelled", "failure", "success")


class UnknownFormError(Exception):
    """A workflow uses a form that this module does not know."""


def evaluate(expression: str, context: Context, functions: Mapping[str, Callable[..., Any]]) -> Any:
    """Evaluate an expression, written without its braces, as GitHub documents it."""
    tokens: list[tuple[str, str]] = []
    position = 0
    expression = expression.strip()
    while position < len(expression):
        match = _TOKENS.match(expression, position)
        if match is None:
            raise UnknownFormError(f"in the expression {expression!r}: {expression[position:]!r}")
        assert match.lastgroup is not None
        tokens.append((match.lastgroup, match[match.lastgroup]))
        position = match.end()
    parser = _Parser(tokens, context, functions)
    value = parser.parse_or()
    if parser.tokens:
        raise UnknownFormError(f"in the expression {expression!r}: {parser.tokens}")
    return value


class _Parser:
    """Evaluates while it parses; both sides of `&&` and `||` are always looked up, so a wrong name is never missed."""

    def __init__(
        self, tokens: list[tuple[str, str]], context: Context, functions: Mapping[str, Callable[..., Any]]
    ) -> None:
        self.tokens = tokens
        self._context = context
        self._functions = functions

    def parse_or(self) -> Any:
        value = self._parse_and()
        while self._take("||"):
            other = self._parse_and()
            value = value if _is_true(value) else other
        return value

    def _parse_and(self) -> Any:
        value = self._parse_comparison()
        while self._take("&&"):
            other = self._parse_comparison()
            value = other if _is_true(value) else value
        return value

    def _parse_comparison(self) -> Any:
        value = self._parse_unary()
        for operator in ("==", "!="):
            if self._take(operator):
                return _are_equal(value, self._parse_unary()) == (operator == "==")
        return value

    def _parse_unary(self) -> Any:
        if self._take("!"):
            return not _is_true(self._parse_unary())
        if self._take("("):
            value = self.parse_or()
            self._expect(")")
            return value
        kind, text = self.tokens.pop(0)
        if kind == "text":
            return text[1:-1].replace("''", "'")
        if kind == "number":
            return float(text)
        if kind != "name":
            raise UnknownFormError(f"{text!r} where a value should be")
        if self._take("("):
            return self._call(text)
        return (
            {"true": True, "false": False, "null": None}[text]
            if text in ("true", "false", "null")
            else self._find(text)
        )

    def _call(self, name: str) -> Any:
        if name not in self._functions:
            raise UnknownFormError(f"the function {name}")
        arguments = []
        if not self._take(")"):
            arguments.append(self.parse_or())
            while self._take(","):
                arguments.append(self.parse_or())
            self._expect(")")
        return self._functions[name](*arguments)

    def _find(self, path: str) -> Any:
        """Look a value up. GitHub takes an unknown name for nothing; here only an output may be missing."""
        value: Any = self._context
        names = path.split(".")
        for name in names:
            if isinstance(value, Mapping) and name in value:
                value = value[name]
            elif isinstance(value, _Optional):
                return None
            else:
                raise UnknownFormError(f"the name {path}")
        return value

    def _take(self, text: str) -> bool:
        if self.tokens and self.tokens[0] == ("operator", text):
            self.tokens.pop(0)
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise UnknownFormError(f"{text!r} is missing before {self.tokens}")


class _Optional(dict[str, Any]):
    """What may lack a name: the outputs of what was skipped, and a repository's variables."""


def _is_true(value: Any) -> bool:
    return value not in (None, False, "", 0)


def _are_equal(first: Any, second: Any) -> bool:
    if isinstance(first, str) and isinstance(second, str):
        return first.lower() == second.lower()
    if type(first) is type(second):
        return bool(first == second)
    numbers = [{None: 0.0, "": 0.0, True: 1.0, False: 0.0}.get(value, value) for value in (first, second)]
    return bool(numbers[0] == numbers[1])


def format_value(value: Any) -> str:
    """Format a value as GitHub writes it into a text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value
    raise UnknownFormError(f"{type(value).__name__} in a text")


@dataclass(frozen=True)
class Attestation:
    """What `actions/attest-build-provenance` was given, and the commit of the run, which its certificate names."""

    subjects: Mapping[str, bytes]
    commit: str
    identity: str


@dataclass
class GitHub:
    """What GitHub has and does, as far as a workflow meets it; `folder` is the fake's own.

    Attributes:
        repository: the git repository that checkouts clone; whatever commit it holds can be fetched, as a fork's can
            that somebody proposed.
        uploads, attestations, builds: what the actions were given, in order.
        index: what was published to the package index, by name.
    """

    folder: Path
    repository: Path
    uploads: list[dict[str, str]] = field(default_factory=list)
    attestations: list[Attestation] = field(default_factory=list)
    builds: list[dict[str, str]] = field(default_factory=list)
    index: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.artifacts = self.folder / "artifacts"
        self.artifacts.mkdir(parents=True)
        for name in ("bin", "zips", "releases"):
            (self.folder / name).mkdir()
        gh = self.folder / "bin" / "gh"
        gh.write_text(f"#!{sys.executable}\n{_GH}")
        gh.chmod(0o755)
        self._write({"runs": [], "artifacts": []})

    @property
    def dispatches(self) -> list[dict[str, str]]:
        """The inputs that `gh workflow run` was given, in order."""
        return [call["inputs"] for call in self.calls if "inputs" in call]

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Every call of `gh`: its words, and the inputs that it read."""
        log = self.folder / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def get_artifact(self, run_id: str, name: str) -> Path:
        """Get the folder that holds an artifact's files."""
        return self.artifacts / run_id / name

    def add_run(self, run_id: str, **changes: Any) -> None:
        """Add a run as the API shows it, by default one of training.yaml that somebody started on the branch main."""
        run = {
            "id": int(run_id),
            "name": "Training",
            "path": ".github/workflows/training.yaml",
            "event": "workflow_dispatch",
            "head_branch": "main",
            "head_sha": ask_git(self.repository, "rev-parse", "HEAD"),
            "status": "completed",
            "conclusion": "success",
            "created_at": f"2026-01-01T{int(run_id) // 3600:02}:{int(run_id) // 60 % 60:02}:{int(run_id) % 60:02}Z",
            "repository": {"id": 1, "full_name": REPOSITORY},
            "head_repository": {"id": 1, "full_name": REPOSITORY},
        }
        state = self._read()
        state["runs"] = [known for known in state["runs"] if known["id"] != int(run_id)] + [{**run, **changes}]
        self._write(state)

    def change_run(self, run_id: str, **changes: Any) -> None:
        """Change what the API shows of a run."""
        state = self._read()
        (run,) = [run for run in state["runs"] if run["id"] == int(run_id)]
        run.update(changes)
        self._write(state)

    def add_artifact(self, run_id: str, name: str, content: Path | bytes, **changes: Any) -> dict[str, Any]:
        """Add an artifact of a run, a folder, a file or a zip file as it is; one of the same name is kept."""
        state = self._read()
        number = 1 + len(state["artifacts"])
        archive = self.folder / "zips" / f"{number}.zip"
        if isinstance(content, bytes):
            archive.write_bytes(content)
        else:
            _zip(content, archive)
        shutil.rmtree(self.get_artifact(run_id, name), ignore_errors=True)
        if not isinstance(content, bytes):
            with zipfile.ZipFile(archive) as zipped:
                zipped.extractall(self.get_artifact(run_id, name))
        (run,) = [run for run in state["runs"] if run["id"] == int(run_id)]
        artifact = {
            "id": number,
            "name": name,
            "size_in_bytes": archive.stat().st_size,
            "expired": False,
            "created_at": f"2026-01-01T00:00:{number % 60:02}Z",
            "digest": f"sha256:{hashlib.sha256(archive.read_bytes()).hexdigest()}",
            "workflow_run": {
                "id": int(run_id),
                "repository_id": run["repository"]["id"],
                "head_repository_id": run["head_repository"]["id"],
                "head_branch": run["head_branch"],
                "head_sha": run["head_sha"],
            },
            **changes,
        }
        self._write({**state, "artifacts": [*state["artifacts"], artifact]})
        return artifact

    def find_artifact(self, run_id: str, name: str) -> dict[str, Any] | None:
        """Find the newest artifact of a name in a run."""
        found = [
            artifact
            for artifact in self._read()["artifacts"]
            if (artifact["workflow_run"]["id"], artifact["name"]) == (int(run_id), name)
        ]
        return found[-1] if found else None

    def change_artifact(self, artifact_id: int, **changes: Any) -> None:
        """Change what the API shows of an artifact."""
        state = self._read()
        state["artifacts"][artifact_id - 1].update(changes)
        self._write(state)

    def _read(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return state

    def _write(self, state: dict[str, Any]) -> None:
        (self.folder / "state.json").write_text(json.dumps(state))

    def use(self, action: str, options: dict[str, str], runner: Runner, job: JobRun) -> dict[str, str]:
        """Do what an action does and return its outputs.

        Raises:
            StepError: the action would have failed.
        """
        match action:
            case "actions/checkout":
                self._check_out(options, runner, job.workspace)
                job.commits.add(ask_git(job.workspace, "rev-parse", "HEAD"))
            case "actions/setup-python":
                job.path.insert(0, str(Path(sys.executable).parent))
            case "actions/cache":
                for path in options["path"].split():
                    (job.workspace / path).parent.mkdir(parents=True, exist_ok=True)
                if options["path"] == ".wheels":
                    (job.workspace / ".wheels").mkdir()
                return {"cache-hit": "true"}
            case "actions/upload-artifact":
                return self._upload(options, runner, job.workspace)
            case "actions/download-artifact":
                self._download(options, runner, job.workspace)
            case "actions/attest-build-provenance":
                return self._attest(options, runner, job.workspace)
            case "docker/setup-buildx-action" | "docker/login-action":
                pass
            case "docker/metadata-action":
                return {"tags": f"ghcr.io/{REPOSITORY}:{runner.ref_name}", "labels": ""}
            case "docker/build-push-action":
                return self._build(options, job.workspace)
            case "pypa/gh-action-pypi-publish":
                for file in sorted((job.workspace / "dist").iterdir()):
                    self.index[file.name] = file.read_bytes()
            case _:
                raise UnknownFormError(f"the action {action}")
        return {}

    def _check_out(self, options: dict[str, str], runner: Runner, workspace: Path) -> None:
        """Fetch a commit, without its history unless that is asked for, into a folder that is cleaned before."""
        if options.get("persist-credentials") != "false":
            raise UnknownFormError("a checkout that leaves its credentials behind")
        _check_keys(options, {"persist-credentials", "ref", "fetch-depth"}, "actions/checkout")
        commit = options.get("ref") or runner.commit
        if options.get("fetch-depth") == "0" and not any(workspace.iterdir()):  # a clone in a folder copies nothing
            subprocess.run(["git", "clone", "--quiet", "--no-checkout", self.repository, workspace], check=True)
        serve = "--upload-pack=git -c uploadpack.allowAnySHA1InWant=true upload-pack"
        refs = {
            "1": ["--depth=1", "--no-tags", serve, "origin", commit],
            "0": [serve, "origin", "+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*", commit],
        }[options.get("fetch-depth", "1")]
        commands = [
            ["fetch", "--quiet", *refs],
            ["checkout", "--quiet", "--force", commit],
            ["clean", "-ffdx", "--quiet"],
        ]
        if not (workspace / ".git").exists():
            commands = [["init", "--quiet"], ["remote", "add", "origin", f"file://{self.repository}"], *commands]
        # `lfs: false` is the action's default: pointers stay pointers
        environment = {**os.environ, "GIT_LFS_SKIP_SMUDGE": "1"}
        for words in commands:
            result = subprocess.run(["git", *words], cwd=workspace, env=environment, capture_output=True, text=True)
            if result.returncode:
                raise StepError(result.stderr)

    def _upload(self, options: dict[str, str], runner: Runner, workspace: Path) -> dict[str, str]:
        _check_keys(options, {"name", "path", "if-no-files-found", "retention-days"}, "actions/upload-artifact")
        source = workspace / options["path"]
        if not options["path"] or not source.exists() or (source.is_dir() and not any(source.iterdir())):
            raise StepError(f"no files were found with the path {options['path']!r}")
        if self.find_artifact(runner.run_id, options["name"]):
            raise StepError(f"there is an artifact {options['name']} already")
        artifact = self.add_artifact(runner.run_id, options["name"], source)
        self.uploads.append(options)
        return {
            "artifact-id": str(artifact["id"]),
            "artifact-digest": artifact["digest"].removeprefix("sha256:"),
            "artifact-url": f"https://github.com/{REPOSITORY}/actions/runs/{runner.run_id}/artifacts/{artifact['id']}",
        }

    def _download(self, options: dict[str, str], runner: Runner, workspace: Path) -> None:
        """Download an artifact of the same run; scripts fetch those of others."""
        _check_keys(options, {"name", "artifact-ids", "merge-multiple", "path", "pattern"}, "actions/download-artifact")
        own = [a for a in self._read()["artifacts"] if a["workflow_run"]["id"] == int(runner.run_id)]
        if "pattern" in options:  # each into a folder of its name
            for artifact in own:
                if fnmatch.fnmatchcase(artifact["name"], options["pattern"]):
                    with zipfile.ZipFile(self.folder / "zips" / f"{artifact['id']}.zip") as archive:
                        archive.extractall(workspace / options["path"] / artifact["name"])
            return
        wanted = [a for a in own if str(a["id"]) == options.get("artifact-ids") or a["name"] == options.get("name")]
        if not wanted or ("artifact-ids" in options and options.get("merge-multiple") != "true"):
            raise StepError(f"the run {runner.run_id} has no artifact {options}")
        with zipfile.ZipFile(self.folder / "zips" / f"{wanted[-1]['id']}.zip") as archive:
            archive.extractall(workspace / options["path"])

    def _attest(self, options: dict[str, str], runner: Runner, workspace: Path) -> dict[str, str]:
        if "subject-path" in options:
            subjects = {path.name: path.read_bytes() for path in sorted(workspace.glob(options["subject-path"]))}
        else:
            subjects = {options["subject-name"]: options["subject-digest"].encode()}
        if not subjects:
            raise StepError(f"there is nothing to attest at {options['subject-path']}")
        self.attestations.append(Attestation(subjects, runner.commit, runner.identity))
        return {}

    def _build(self, options: dict[str, str], workspace: Path) -> dict[str, str]:
        """Build an image for real, and push it nowhere."""
        words = ["docker", "build", "--quiet", "--file", options["file"]]
        for line in options["build-args"].splitlines():
            words += ["--build-arg", line]
        result = subprocess.run([*words, options["context"]], cwd=workspace, capture_output=True, text=True)
        if result.returncode:
            raise StepError(result.stderr)
        self.builds.append(options)
        return {"digest": f"sha256:{result.stdout.split()[-1].removeprefix('sha256:')}"}


def _zip(source: Path, archive: Path) -> None:
    """Zip a folder, or a file, as `upload-artifact` does: hidden files are left out, links followed."""
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as content:
        for path in files:
            name = path.relative_to(source if source.is_dir() else source.parent)
            if not any(part.startswith(".") for part in name.parts):
                content.write(path, name)


_GH = '''
"""`gh`, as the scripts call it: it answers from the fake's folder, and writes down what it was asked."""
import json, os, pathlib, re, shutil, sys, urllib.parse

folder = pathlib.Path(__file__).parents[1]
words = sys.argv[1:]
call = {"words": words, "token": os.environ.get("GH_TOKEN")}
state = json.loads((folder / "state.json").read_text())


def answer(path, query):
    if match := re.fullmatch(r"actions/runs/(\\d+)", path):
        return [run for run in state["runs"] if run["id"] == int(match[1])][0]
    if match := re.fullmatch(r"actions/runs/(\\d+)/artifacts", path):
        return {"artifacts": [a for a in state["artifacts"]
                              if a["workflow_run"]["id"] == int(match[1]) and a["name"] == query["name"]]}
    if match := re.fullmatch(r"actions/workflows/([^/]+)/runs", path):
        keys = {"branch": "head_branch", "event": "event", "head_sha": "head_sha"}
        found = [run for run in state["runs"] if run["path"].endswith(match[1])
                 and all(run[key] == query[name] for name, key in keys.items() if name in query)
                 and query.get("status", "success") in ("success", run["status"], run["conclusion"])]
        return {"workflow_runs": found[::-1][:int(query["per_page"])]}
    raise LookupError(path)


if words[:2] == ["workflow", "run"]:
    assert words[2:3] == ["training.yaml"] and words[3::2] == ["--repo", "--ref", "--json"], words
    call["inputs"] = json.load(sys.stdin)
elif words[:2] == ["release", "create"]:
    options = {words[i]: words[i + 1] for i in (4, 6)}
    assert words[3] == "--verify-tag" and set(options) == {"--title", "--notes-file"}, words
    (folder / "releases" / words[2]).mkdir()
    for path in (options["--notes-file"], *words[8:]):
        shutil.copy(path, folder / "releases" / words[2])
elif words[0] == "api" and words[1].startswith("repos/somebody/image-classifier/"):
    path, _, query = words[1].removeprefix("repos/somebody/image-classifier/").partition("?")
    if match := re.fullmatch(r"actions/artifacts/(\\d+)/zip", path):
        if state["artifacts"][int(match[1]) - 1]["expired"]:
            sys.exit("gh: Artifact has expired (HTTP 410)")
        sys.stdout.buffer.write((folder / "zips" / f"{match[1]}.zip").read_bytes())
    else:
        try:
            print(json.dumps(answer(path, dict(urllib.parse.parse_qsl(query)))))
        except LookupError:
            sys.exit("gh: Not Found (HTTP 404)")
else:
    sys.exit(f"gh does not know {words}")
with open(folder / "calls.jsonl", "a") as log:
    log.write(json.dumps(call) + "\\n")
'''


class StepError(Exception):
    """A step failed."""


@dataclass
class JobRun:
    """One job while it runs and afterwards.

    Attributes:
        result: success, failure or skipped.
        log: what its steps printed.
        summary: the Markdown that they wrote.
        commits: what was checked out.
        may_sign: whether it has the right to the identity of the workflow.
    """

    workspace: Path
    path: list[str]
    result: str = "success"
    outputs: _Optional = field(default_factory=_Optional)
    log: str = ""
    summary: str = ""
    commits: set[str] = field(default_factory=set)
    may_sign: bool = False


class Runner:
    """Executes one run of a workflow, as a commit has it, each job in a clean clone.

    Args:
        inputs: what was typed in; None for a run that something else started.
        event: what started it, where nobody typed in anything.
        ref: the branch or tag that it runs on, at its newest commit.
        variables: the repository's variables.
        secrets: the repository's secrets.
        environment: added to that of each step, for what a test has to steer.
        on_runners: added to that of the steps on a kind of runners, by its label.
    """

    def __init__(
        self,
        github: GitHub,
        workflow: str,
        folder: Path,
        *,
        run_id: str,
        inputs: Mapping[str, str | bool] | None,
        event: str = "schedule",
        ref: str = "refs/heads/main",
        variables: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        on_runners: Mapping[str, Mapping[str, str]] | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        self.github = github
        self.run_id = run_id
        self.commit = ask_git(github.repository, "rev-parse", f"{ref}^{{commit}}")
        self.ref_name = ref.split("/", 2)[2]
        self.identity = f"https://github.com/{REPOSITORY}/.github/workflows/{workflow}@{ref}"
        self.jobs: dict[str, JobRun] = {}
        self._folder = folder
        self._path = f".github/workflows/{workflow}"
        self._workflow = yaml.load(ask_git(github.repository, "show", f"{self.commit}:{self._path}"), yaml.CSafeLoader)
        self._environment = dict(environment or {})
        self._on_runners = on_runners or {}
        self._instead: Mapping[str, Callable[[JobRun], None]] = {}
        self._event = event = "workflow_dispatch" if inputs is not None else event
        triggers = self._workflow[True]  # YAML reads the key `on` as a truth value
        if event not in triggers or (event == "push" and not _is_pushed(triggers["push"], ref)):
            raise UnknownFormError(f"{workflow} does not run on {event} of {ref}")
        self._context: dict[str, Any] = {
            "inputs": _take_inputs(triggers.get("workflow_dispatch", {}).get("inputs", {}), inputs),
            "vars": _Optional(variables or {}),
            "secrets": _Optional(secrets or {}),
            "github": {
                "actor": "somebody",
                "event_name": event,
                "event": {"repository": {"default_branch": "main"}},
                "ref": ref,
                "ref_name": self.ref_name,
                "repository": REPOSITORY,
                "run_id": run_id,
                "server_url": "https://github.com",
                "sha": self.commit,
                "token": TOKEN,
            },
        }

    def run(self, instead: Mapping[str, Callable[[JobRun], None]] | None = None) -> dict[str, JobRun]:
        """Run all jobs, each after those that it needs.

        Args:
            instead: by the name of a job or of a step, what is done in its place where it is to run.
        """
        self._instead = instead or {}
        known = {"name", "on", True, "run-name", "permissions", "concurrency", "env", "jobs"}
        _check_keys(self._workflow, known, "the workflow")
        format_value(self._fill(self._workflow.get("run-name", ""), self._context, {}))
        self._fill(self._workflow["concurrency"], self._context, {})
        facts = {"path": self._path, "event": self._event, "head_branch": self.ref_name, "head_sha": self.commit}
        self.github.add_run(self.run_id, **facts, status="in_progress", conclusion=None)
        pending = dict(self._workflow["jobs"])
        while pending:
            name = next(name for name, job in pending.items() if not _list_needs(job) & pending.keys())
            self.jobs[name] = self._run_job(name, pending.pop(name))
        failed = any(job.result == "failure" for job in self.jobs.values())
        self.github.change_run(self.run_id, status="completed", conclusion="failure" if failed else "success")
        return self.jobs

    def _run_job(self, name: str, job: dict[str, Any]) -> JobRun:
        known = {"name", "needs", "if", "runs-on", "timeout-minutes", "environment", "permissions", "outputs", "steps"}
        _check_keys(job, known | {"strategy"}, f"the job {name}")
        needs = _list_needs(job)
        context = {
            **self._context,
            "needs": {
                needed: {"result": self.jobs[needed].result, "outputs": self.jobs[needed].outputs} for needed in needs
            },
        }
        run = JobRun(self._folder / self.run_id / name / "workspace", [])
        run.may_sign = job["permissions"].get("id-token") == "write"
        succeeded = all(self.jobs[needed].result == "success" for needed in self._list_all_needs(needs))
        if not self._is_wanted(job.get("if", "success()"), context, succeeded):
            run.result = "skipped"
        elif name in self._instead:
            run.workspace.mkdir(parents=True)
            self._instead[name](run)
        else:
            for matrix in self._list_matrix(job, context):
                folder = run.workspace.parent.joinpath(*matrix.values())
                self._run_on_runner(folder, job, {**context, "matrix": matrix}, run)
        return run

    def _list_matrix(self, job: dict[str, Any], context: Context) -> list[dict[str, str]]:
        """List what the context `matrix` holds in each run of a job: values of at most one name are known here."""
        strategy = job.get("strategy", {"matrix": {}})
        if not strategy["matrix"]:
            return [{}]
        _check_keys(strategy, {"fail-fast", "matrix"}, "a strategy")
        ((name, values),) = strategy["matrix"].items()
        match = _EXPRESSION.fullmatch(values)
        if match is None or strategy["fail-fast"]:
            raise UnknownFormError(f"the strategy {strategy}")
        return [{name: value} for value in evaluate(match[1], context, {"fromJSON": json.loads})]

    def _run_on_runner(self, folder: Path, job: dict[str, Any], context: dict[str, Any], run: JobRun) -> None:
        """Run a job's steps in a clean workspace; one that failed on another runner stays failed."""
        temporary = folder / "temporary"
        temporary.mkdir(parents=True)
        run.workspace, run.path = folder / "workspace", [str(self.github.folder / "bin"), os.environ["PATH"]]
        run.workspace.mkdir()
        before, run.result = run.result, "success"
        context = {
            **context,
            "github": {**self._context["github"], "workspace": str(run.workspace)},
            "runner": {"arch": "X64", "temp": str(temporary)},
        }
        label = self._fill(job["runs-on"], context, {})
        environment = {name: self._fill(value, context, {}) for name, value in self._workflow.get("env", {}).items()}
        with self._files(folder, run) as files:
            steps = self._run_steps(
                job["steps"], context, environment | files | dict(self._on_runners.get(label, {})), run
            )
        if run.result == "success":
            for output, value in job.get("outputs", {}).items():
                run.outputs[output] = self._fill(value, {**context, "steps": steps}, {})
            run.result = before

    @contextmanager
    def _files(self, folder: Path, run: JobRun) -> Iterator[dict[str, str]]:
        """Make the scratch files that steps write to; those that no workflow here uses must stay empty."""
        names = ("GITHUB_ENV", "GITHUB_PATH", "GITHUB_STATE", "GITHUB_STEP_SUMMARY")
        paths = {name: folder / name.lower() for name in names}
        for path in paths.values():
            path.touch()
        yield {name: str(path) for name, path in paths.items()}
        run.summary += paths.pop("GITHUB_STEP_SUMMARY").read_text(encoding="utf-8")
        for name, path in paths.items():
            if path.read_text():
                raise UnknownFormError(f"{name} was written to")

    def _run_steps(
        self, steps: list[dict[str, Any]], context: dict[str, Any], environment: dict[str, str], run: JobRun
    ) -> dict[str, Any]:
        """Run steps one after the other; return what the context `steps` holds in the end."""
        done = {step["id"]: {"outputs": _Optional()} for step in steps if "id" in step}
        context = {**context, "steps": done}
        for number, step in enumerate(steps):
            _check_keys(step, {"name", "id", "if", "uses", "with", "env", "run", "shell"}, f"the step {number}")
            if not self._is_wanted(step.get("if", "success()"), context, run.result == "success"):
                continue
            outputs: Mapping[str, str] = {}
            try:
                if step.get("name") in self._instead:
                    self._instead[step["name"]](run)
                elif "run" in step:
                    added = self._fill_all(step.get("env", {}), context, run)
                    outputs = self._run_script(step, environment | added, context, run)
                else:
                    outputs = self._use(step, context, environment, run)
            except StepError as error:
                run.log += f"\n{step.get('name', step.get('uses'))}: {error}\n"
                run.result = "failure"
            if "id" in step:
                done[step["id"]]["outputs"].update(outputs)
        return done

    def _run_script(
        self, step: dict[str, Any], environment: dict[str, str], context: dict[str, Any], run: JobRun
    ) -> dict[str, str]:
        if "${{" in step["run"]:
            raise UnknownFormError("an expression in a script, where its value would be executed")
        if step.get("shell", "bash") != "bash":
            raise UnknownFormError(f"the shell {step['shell']}")
        output = run.workspace.parent / "output"
        output.write_text("")
        github = context["github"]
        variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith("GITHUB_")},
            "PATH": ":".join(run.path),
            "RUNNER_TEMP": context["runner"]["temp"],
            **{f"GITHUB_{name.upper()}": str(github[name]) for name in github.keys() - {"event", "token"}},
            "GITHUB_OUTPUT": str(output),
            **environment,
            **self._environment,
        }
        options = ["--noprofile", "--norc", "-e", *(["-o", "pipefail"] if "shell" in step else [])]
        result = subprocess.run(
            ["bash", *options, "-c", step["run"]],
            cwd=run.workspace,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=1200,
        )
        text = result.stdout.decode(errors="replace")
        run.log += text
        check_commands(text)
        if result.returncode:
            raise StepError(f"exit status {result.returncode}")
        lines = output.read_text(encoding="utf-8").splitlines()
        if not all(re.match(r"\w+=", line) for line in lines):
            raise UnknownFormError(f"in GITHUB_OUTPUT: {lines}")
        return dict(line.split("=", 1) for line in lines)

    def _use(
        self, step: dict[str, Any], context: dict[str, Any], environment: dict[str, str], run: JobRun
    ) -> Mapping[str, str]:
        action, options = step["uses"], self._fill_all(step.get("with", {}), context, run)
        if not action.startswith("./"):
            name, _, commit = action.partition("@")
            if not re.fullmatch(r"[0-9a-f]{40}", commit):
                raise UnknownFormError(f"the action {action}, which no commit pins")
            return self.github.use(name, options, self, run)
        composite = yaml.safe_load((run.workspace / action / "action.yaml").read_text(encoding="utf-8"))
        _check_keys(composite, {"name", "description", "inputs", "outputs", "runs"}, action)
        unknown = options.keys() - composite["inputs"].keys()
        if unknown:
            raise UnknownFormError(f"{action} has no inputs {unknown}")
        inputs = {name: options.get(name, facts.get("default", "")) for name, facts in composite["inputs"].items()}
        kept = {name: context[name] for name in ("github", "runner")}
        done = self._run_steps(composite["runs"]["steps"], {**kept, "inputs": inputs}, environment, run)
        if run.result != "success":
            raise StepError("a step of it failed")
        outputs = {name: facts["value"] for name, facts in composite["outputs"].items()}
        return self._fill_all(outputs, {**kept, "steps": done}, run)

    def _is_wanted(self, condition: str, context: Context, succeeded: bool) -> bool:
        """Evaluate an `if:`; without a function for the status it also asks for success, as GitHub has it."""
        match = _EXPRESSION.fullmatch(str(condition).strip())
        expression = match[1] if match else str(condition)
        functions = {
            "always": lambda: True,
            "cancelled": lambda: False,
            "failure": lambda: not succeeded,
            "success": lambda: succeeded,
        }
        wanted = _is_true(evaluate(expression, context, functions))
        asks = any(re.search(rf"\b{name}\(", expression) for name in _STATUS_FUNCTIONS)
        return wanted and (asks or succeeded)

    def _fill_all(self, values: Mapping[str, Any], context: Context, run: JobRun) -> dict[str, str]:
        def hash_files(*patterns: str) -> str:
            return str(hash(tuple((run.workspace / pattern).read_bytes() for pattern in patterns)))

        return {name: self._fill(value, context, {"hashFiles": hash_files}) for name, value in values.items()}

    def _fill(self, value: Any, context: Context, functions: Mapping[str, Callable[..., Any]]) -> str:
        """Put the values of its expressions into a text."""
        if isinstance(value, Mapping):
            return json.dumps({name: self._fill(part, context, functions) for name, part in value.items()})
        if isinstance(value, bool | int):
            return format_value(value if isinstance(value, bool) else float(value))
        known = {"format": lambda text, *parts: re.sub(r"\{(\d)\}", lambda m: format_value(parts[int(m[1])]), text)}
        return _EXPRESSION.sub(lambda match: format_value(evaluate(match[1], context, known | dict(functions))), value)

    def _list_all_needs(self, needs: set[str]) -> set[str]:
        deeper = {name for needed in needs for name in _list_needs(self._workflow["jobs"][needed])}
        return needs | self._list_all_needs(deeper) if deeper else needs


def _take_inputs(declared: Mapping[str, Any], given: Mapping[str, str | bool] | None) -> dict[str, Any]:
    if given is None:
        return dict.fromkeys(declared)
    if given.keys() - declared.keys():
        raise UnknownFormError(f"no inputs {given.keys() - declared.keys()} are declared")
    taken: dict[str, Any] = {}
    for name, facts in declared.items():
        value = given.get(name, facts.get("default", ""))
        if facts.get("type") == "boolean":  # `gh workflow run` gives texts, the form a truth value
            value = value in (True, "true")
        taken[name] = value
    return taken


def _is_pushed(trigger: Mapping[str, Any], ref: str) -> bool:
    """Say whether a push of a branch or a tag is one that starts the workflow."""
    _check_keys(trigger, {"branches", "tags"}, "the trigger push")
    _, kind, name = ref.split("/", 2)
    patterns = trigger.get({"heads": "branches", "tags": "tags"}[kind], [])
    return any("/" not in name and fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_commands(log: str) -> None:
    """Go through what a step prints as the runner does, which takes some lines for commands.

    Raises:
        UnknownFormError: it would have carried out one that changes something, which no script here prints.
    """
    token = None
    for line in log.splitlines():
        match = re.match(r"\s*(?:::([\w-]+)[^:]*::(.*)|##\[([\w-]+))", line)
        if match is None or (token and match[1] != token):
            continue
        name = match[1] or match[3]
        if name == token:
            token = None
        elif name == "stop-commands":
            token = match[2]
        elif name not in ("add-mask", "debug", "error", "notice", "warning"):
            raise UnknownFormError(f"the command {line!r}")


def _list_needs(job: Mapping[str, Any]) -> set[str]:
    needs = job.get("needs", [])
    return {needs} if isinstance(needs, str) else set(needs)


def _check_keys(mapping: Mapping[Any, Any], known: set[Any], what: str) -> None:
    if mapping.keys() - known:
        raise UnknownFormError(f"{what} has {mapping.keys() - known}")


def ask_git(folder: Path, *words: str) -> str:
    """Ask git about a repository."""
    return subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True, text=True).stdout.strip()
