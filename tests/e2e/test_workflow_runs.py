"""training.yaml, executed: every step under bash in a clean clone, with a real image and real trainings."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from image_classifier.__main__ import main
from image_classifier.attestation import sign_statement
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.ingest import ingest
from image_classifier.published.folder import ATTESTATIONS
from image_classifier.tracking.checking import is_finished, verify_files
from image_classifier.tracking.reading import read_manifest, read_record
from image_classifier.training.determinism import FORCE_KERNELS, list_portable_kernels
from tests.actions import REPOSITORY, TOKEN, GitHub, JobRun, Runner, ask_git
from tests.conftest import PROJECT, require_program, run_program
from tests.databases import make_home_in
from tests.e2e.conftest import IMAGE_NAME
from tests.postgres import PASSWORD, Cluster
from tests.sigstore import Sigstore

pytestmark = pytest.mark.timeout(1800)  # the first test that asks for the image waits until it is built

INPUTS: Mapping[str, str | bool] = {
    "experiment_name": "workflow",
    "run_name": "first",
    "dataset": "sample",
    "recipe": "notebook",
    "batch_size": "100",
    "num_epochs": "1",
}
IDENTITY = f"https://github.com/{REPOSITORY}/.github/workflows/training.yaml@refs/heads/main"
Dispatch = Callable[..., dict[str, JobRun]]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, project_copy: Path) -> Path:
    """A clone of the project's copy, on which commits may follow."""
    clone = tmp_path_factory.mktemp("repository") / "image_classifier"
    run_program(require_program("git"), "clone", "--quiet", project_copy, clone, cwd=clone.parent)
    return clone


@pytest.fixture(scope="module")
def github(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> GitHub:
    """A GitHub that holds the project."""
    return make_github(tmp_path_factory.mktemp("github"), repository)


def make_github(folder: Path, repository: Path) -> GitHub:
    """Make a GitHub whose scripts find the programs that a runner has."""
    for program in ("git", "git-lfs", "jq", "timeout"):
        require_program(program)
    return GitHub(folder, repository)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which each run of the workflow has one."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def dispatch(github: GitHub, training_image: str, runs: Path) -> Dispatch:
    """Start training.yaml as a person, `gh`, or (with inputs=None) the schedule does."""

    def start(
        run_id: str,
        inputs: Mapping[str, str | bool] | None,
        variables: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
        kernels: str | None = None,
        on_runners: Mapping[str, Mapping[str, str]] | None = None,
        instead: Mapping[str, Callable[[JobRun], None]] | None = None,
    ) -> dict[str, JobRun]:
        environment = {"IMAGE_NAME": IMAGE_NAME} | ({FORCE_KERNELS: kernels} if kernels else {})
        runner = Runner(
            github,
            "training.yaml",
            runs,
            run_id=run_id,
            inputs=inputs,
            variables=variables,
            environment=environment,
            on_runners=on_runners,
            secrets=secrets,
        )
        jobs = runner.run(instead)
        for job in jobs.values():
            assert TOKEN not in job.log
            assert not job.may_sign or job.commits <= {runner.commit}, "code of another commit could sign"
        return jobs

    return start


@pytest.fixture(scope="module")
def sigstore() -> Sigstore:
    """What vouches for the identity of the workflow, in place of the public one."""
    return Sigstore()


@pytest.fixture(scope="module")
def other_processor(tmp_path_factory: pytest.TempPathFactory, github: GitHub) -> dict[str, str]:
    """What makes a runner's containers see a processor of another family, and takes the least of the kernels."""
    folder = tmp_path_factory.mktemp("other")
    facts = Path("/proc/cpuinfo").read_text()
    facts = re.sub(r"(?m)^(vendor_id\s*: ).*$", r"\1SomebodyElse", facts)
    (folder / "cpuinfo").write_text(re.sub(r"(?m)^(CPU implementer\s*: ).*$", r"\g<1>0x99", facts))
    docker = folder / "bin" / "docker"
    docker.parent.mkdir()
    real = require_program("docker")
    mount = f"--volume={folder}/cpuinfo:/proc/cpuinfo:ro"
    docker.write_text(f'#!/bin/sh\n[ "$1" != run ] || {{ shift; set -- run {mount} "$@"; }}\nexec {real} "$@"\n')
    docker.chmod(0o755)
    path = f"{docker.parent}:{Path(sys.executable).parent}:{github.folder / 'bin'}:{os.environ['PATH']}"
    return {"PATH": path, FORCE_KERNELS: list_portable_kernels()[0]}


@pytest.fixture(scope="module")
def first(dispatch: Dispatch, sigstore: Sigstore, other_processor: dict[str, str]) -> dict[str, JobRun]:
    """The jobs of a training that is verified on two kinds of runners and published."""

    def sign_model(job: JobRun) -> None:
        sigstore.sign(job.workspace / "run" / "published", IDENTITY)

    def sign_verdicts(job: JobRun) -> None:
        for statement in sorted(job.workspace.glob("verdicts/*/statement.json")):
            sign_statement(
                job.workspace / "run",
                statement.read_bytes(),
                lambda content: sigstore.sign_statement(content, IDENTITY),
            )

    return dispatch(
        "1",
        {**INPUTS, "verify": True, "publish": True},
        on_runners={"ubuntu-24.04-arm": other_processor},
        instead={"Sign with the identity of this workflow": sign_model, "Sign the verdicts": sign_verdicts},
    )


@pytest.fixture(scope="module")
def second(first: dict[str, JobRun], dispatch: Dispatch) -> dict[str, JobRun]:
    """The jobs of a training after the first, with another seed."""
    return dispatch("2", {**INPUTS, "run_name": "second", "seed": "7"})


def get_results(jobs: dict[str, JobRun]) -> dict[str, str]:
    """Get what became of each job."""
    return {name: job.result for name, job in jobs.items()}


def expect(*succeeded: str) -> dict[str, str]:
    """Say what becomes of each job if these succeed and no other is to run."""
    names = ("plan", "train", "attest", "sign", "verify", "continue")
    return {name: "success" if name in succeeded else "skipped" for name in names}


def test_the_jobs_do_what_the_inputs_ask_for(first: dict[str, JobRun]) -> None:
    log = "\n".join(job.log for job in first.values())
    assert get_results(first) == expect("plan", "train", "attest", "verify", "sign"), log


def test_the_artifact_is_the_whole_run(first: dict[str, JobRun], github: GitHub) -> None:
    artifact = github.get_artifact("1", "run")
    names = {path.name for path in artifact.iterdir()}
    assert names >= {"model.pth", "metrics.png", "run.json", "evaluation.json", "manifest.json", "report.html"}
    assert is_finished(artifact)
    assert verify_files(artifact) == ()


def test_the_record_says_what_the_inputs_said(first: dict[str, JobRun], github: GitHub) -> None:
    record = read_record(github.get_artifact("1", "run"))
    settings = record["settings"]
    assert (record["experiment_name"], record["run_name"], record["recipe"]) == ("workflow", "first", "notebook")
    assert (settings["batch_size"], settings["num_epochs"], settings["instruction_set"]) == (100, 1, "portable")
    assert record["data"]["name"] == "sample"
    assert record["code"]["commit"] == github.attestations[0].commit
    assert record["code"]["uncommitted_changes"] is False


def test_the_weights_are_attested_to_the_commit_that_was_trained(first: dict[str, JobRun], github: GitHub) -> None:
    artifact, attestation = github.get_artifact("1", "run"), github.attestations[0]
    assert attestation.subjects == {"model.pth": (artifact / "model.pth").read_bytes()}
    assert attestation.commit == read_record(artifact)["code"]["commit"]
    assert attestation.identity.endswith("/.github/workflows/training.yaml@refs/heads/main")


def test_the_summary_shows_settings_metrics_and_a_picture(first: dict[str, JobRun], github: GitHub) -> None:
    summary = first["train"].summary
    artifact = github.get_artifact("1", "run")
    evaluation = json.loads((artifact / "evaluation.json").read_text())
    assert summary.startswith("## `workflow/first`\n")
    assert f"**{evaluation['accuracy']:.2%}**" in summary
    assert "| `batch_size` | `100` |" in summary
    assert summary.count("```mermaid\nxychart-beta\n") == 3
    assert "/actions/runs/1/artifacts/" in summary
    assert "previous run" not in summary


def test_two_kinds_of_runners_give_the_verdict(first: dict[str, JobRun]) -> None:
    assert first["verify"].summary.count("## Verification of workflow/first\n\n    IDENTICAL\n") == 2


def test_a_policy_takes_the_published_model_with_the_verdicts_of_both_runners_and_with_none_less(
    first: dict[str, JobRun],
    github: GitHub,
    sigstore: Sigstore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (content,) = re.findall(
        r"```yaml\n(format_version: 1\n.*?)```", (PROJECT / "docs" / "ci.md").read_text(), re.DOTALL
    )
    trust_config = sigstore.write_trust_config(tmp_path / "trust.json")
    policy = tmp_path / "policy.yaml"
    policy.write_text(content.replace("OWNER/REPOSITORY", REPOSITORY) + f"trust_config: {trust_config}\n")
    published = github.get_artifact("1", "published")
    verdicts = sorted(path.name for path in (published / ATTESTATIONS).iterdir())
    assert verdicts == sorted(path.name for path in github.get_artifact("1", "attestations").iterdir())
    assert main(["verify", str(published), "--policy", str(policy)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("ACCEPTED\n  found IDENTICAL by 1 of 1 verifier;") and said.count(", all ") == 2
    for name in verdicts:
        less = shutil.copytree(published, tmp_path / name)
        (less / ATTESTATIONS / name).unlink()
        assert main(["verify", str(less), "--policy", str(policy)]) == 2
        assert ": 1 of 2 processor families: " in capsys.readouterr().err


def test_a_later_run_is_compared_to_the_one_before(second: dict[str, JobRun]) -> None:
    assert get_results(second)["train"] == "success", second["train"].log
    assert get_results(second)["verify"] == "skipped"
    summary = second["train"].summary
    assert "### Against the previous run on the default branch" in summary
    assert "McNemar" in summary


def test_the_schedule_verifies_the_newest_published_run(second: dict[str, JobRun], dispatch: Dispatch) -> None:
    level = list_portable_kernels()[0]  # the least: as on a runner of another generation
    jobs = dispatch("3", None, kernels=level)
    assert get_results(jobs) == expect("plan", "verify"), jobs["plan"].log
    assert "Verification of workflow/second\n\n    IDENTICAL" in jobs["verify"].summary


def test_a_run_whose_weights_were_changed_fails_its_verification(
    second: dict[str, JobRun], github: GitHub, dispatch: Dispatch, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(github.get_artifact("2", "run"), changed)
    weights = bytearray((changed / "model.pth").read_bytes())
    weights[len(weights) // 2] ^= 1
    (changed / "model.pth").write_bytes(weights)
    github.add_run("5")
    github.add_artifact("5", "run", changed)
    jobs = dispatch("4", None)
    github.change_run("5", conclusion="failure")
    assert jobs["verify"].result == "failure"
    assert "DIFFERENT\n      model.pth" in jobs["verify"].summary


def test_without_a_published_run_the_schedule_does_nothing(project_copy: Path, tmp_path: Path) -> None:
    github = make_github(tmp_path / "github", project_copy)
    jobs = Runner(github, "training.yaml", tmp_path, run_id="1", inputs=None).run()
    assert get_results(jobs) == {name: "success" if name == "plan" else "skipped" for name in jobs}


def expire(workspace: Path, run: Path, limit: str) -> None:
    """Let the time of a training be over as soon as it has taken some steps, by the signal that `timeout` waits for."""
    deadline = time.monotonic() + 300
    chain = run / "digests.jsonl"
    while not (chain.is_file() and chain.stat().st_size):
        assert time.monotonic() < deadline, "the training has not begun"
        time.sleep(0.02)
    (pid,) = [
        int(process.name)
        for process in Path("/proc").iterdir()
        if process.name.isdigit() and is_timeout(process, workspace, limit)
    ]
    os.kill(pid, signal.SIGALRM)


def is_timeout(process: Path, workspace: Path, limit: str) -> bool:
    """Say whether a process is the `timeout` that waits for a training of this workspace."""
    try:
        words = (process / "cmdline").read_bytes().decode().split("\0")
        return words[0] == "timeout" and limit in words and (process / "cwd").resolve() == workspace
    except OSError:  # it has ended, or is another user's
        return False


def test_a_run_that_meets_the_limit_goes_on_in_another_and_ends_the_same(
    github: GitHub, dispatch: Dispatch, runs: Path, repository: Path
) -> None:
    """The branch moves on meanwhile: the run goes on at its commit, and no signature names another one."""
    long = {**INPUTS, "run_name": "long", "num_epochs": "4", "batch_size": "20"}
    workspace = runs / "10" / "train" / "workspace"
    with ThreadPoolExecutor() as pool:
        expired = pool.submit(expire, workspace, workspace / "experiments" / "workflow" / "long", "12345")
        jobs = dispatch("10", long, {"TRAINING_TIME_LIMIT_S": "12345"})
        expired.result()
    assert get_results(jobs) == expect("plan", "train", "continue"), jobs["train"].log
    unfinished = github.get_artifact("10", "unfinished-run")
    assert not is_finished(unfinished)
    assert any((unfinished / "checkpoints").iterdir())
    assert not github.get_artifact("10", "run").exists()
    assert "Stopped after" in jobs["train"].summary
    assert "continuation 1 of at most 10" in jobs["continue"].summary

    (inputs,) = github.dispatches
    assert {name: inputs[name] for name in long} == long
    begun, num_attestations = ask_git(repository, "rev-parse", "HEAD"), len(github.attestations)
    run_program(require_program("git"), "commit", "--quiet", "--allow-empty", "--message=Move on", cwd=repository)
    jobs = dispatch("11", inputs)
    assert get_results(jobs) == expect("plan", "train"), jobs["train"].log
    assert "resumed after step" in jobs["train"].log
    assert read_record(github.get_artifact("11", "run"))["code"]["commit"] == begun
    assert f"Not attested and not signed: this was trained at {begun}" in jobs["train"].summary
    assert len(github.attestations) == num_attestations

    jobs = dispatch("12", {**long, "run_name": "uninterrupted"})
    assert get_results(jobs)["attest"] == "success", jobs["train"].log
    assert "Not attested" not in jobs["train"].summary
    manifests = [read_manifest(github.get_artifact(run_id, "run")) for run_id in ("11", "12")]
    for digest in ("weights_digest", "chain_head"):
        assert manifests[0][digest] == manifests[1][digest]


def test_a_training_starts_from_a_committed_model_on_a_committed_data_set(
    first: dict[str, JobRun], github: GitHub, sample_dataset: Path, project_copy: Path, tmp_path: Path
) -> None:
    git, repository = require_program("git"), tmp_path / "repository"
    run_program(git, "clone", "--quiet", project_copy, repository, cwd=tmp_path)
    run_program(git, "lfs", "install", "--local", cwd=repository)
    shutil.copytree(sample_dataset, repository / "data" / "mine", ignore=shutil.ignore_patterns(".snapshots"))
    for name in ("wanted", "other"):
        shutil.copytree(github.get_artifact("1", "run"), repository / "experiments" / "kept" / name)
    run_program(git, "add", "--force", "data/mine", "experiments/kept", cwd=repository)
    run_program(git, "commit", "--quiet", "--message=Add data and models", cwd=repository)

    other = make_github(tmp_path / "github", repository)
    inputs = {**INPUTS, "dataset": "mine", "pretrained_model": "kept/wanted/model.pth", "num_epochs": "0"}
    runner = Runner(other, "training.yaml", tmp_path, run_id="1", inputs=inputs, environment={"IMAGE_NAME": IMAGE_NAME})
    train = runner.run()["train"]
    assert train.result == "success", train.log
    kept = train.workspace / "experiments" / "kept"
    assert (kept / "other" / "model.pth").read_bytes().startswith(b"version https://git-lfs"), "it was fetched, too"
    weights = [read_manifest(run)["weights_digest"] for run in (kept / "wanted", other.get_artifact("1", "run"))]
    assert weights[0] == weights[1]
    record = read_record(other.get_artifact("1", "run"))
    assert record["pretrained"]["path"] == "/experiments/kept/wanted/model.pth"
    assert record["execution"]["dataset_folder"] == "/data/mine"


@pytest.fixture(scope="module")
def server(docker: str) -> Iterator[tuple[Cluster, str]]:
    """A PostgreSQL, and the address that a container reaches it at."""
    words = [docker, "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}"]
    answer = subprocess.run(words, capture_output=True, text=True)
    gateway = (
        answer.stdout.strip() if answer.returncode == 0 else ""
    )  # an engine without one shares this host's network
    cluster = Cluster("-clisten_addresses=*") if gateway else Cluster()
    try:
        if gateway:
            with open(cluster.folder / "data" / "pg_hba.conf", "a") as rules:
                rules.write(f"host all all {gateway}/16 scram-sha-256\n")
        cluster.start()
        yield cluster, gateway or "127.0.0.1"
    finally:
        cluster.remove()


def test_a_training_takes_its_data_from_a_database(
    dispatch: Dispatch,
    server: tuple[Cluster, str],
    github: GitHub,
    sample_dataset: Path,
    tmp_path: Path,
) -> None:
    cluster, host = server
    (tmp_path / "home").mkdir()
    home = make_home_in(cluster, tmp_path, tmp_path / "home")
    version = ingest(sample_dataset, "shapes", home.access).version
    config = cluster.write_config(tmp_path / "db_connect.yaml", home.database, host=host, tls="disable").read_text()
    inputs = {**INPUTS, "run_name": "database", "database": "shapes", "verify": True}
    refused = dispatch("30", inputs, secrets={"DB_PASSWORD": PASSWORD})
    assert "the repository variable DB_CONNECT does not say where the database is" in refused["train"].log

    jobs = dispatch("31", inputs, {"DB_CONNECT": config}, {"DB_PASSWORD": PASSWORD})
    assert get_results(jobs)["verify"] == "success", jobs["train"].log + jobs["verify"].log
    assert jobs["verify"].summary.startswith("## Verification of workflow/database\n\n    IDENTICAL\n")
    artifact = github.get_artifact("31", "run")
    record = read_record(artifact)
    assert (record["data"]["database"], record["data"]["digest"]) == ("shapes@1", version.digest)
    assert version.digest == load_snapshot(sample_dataset).digest
    assert not (jobs["train"].workspace / "data" / "sample_dataset").exists()

    scheduled = dispatch("32", None, {"DB_CONNECT": config}, {"DB_PASSWORD": PASSWORD})
    assert "IDENTICAL" in scheduled["verify"].summary
    every = [*refused.values(), *jobs.values(), *scheduled.values()]
    assert not [job for job in every if PASSWORD in job.log or PASSWORD in job.summary]
    workspace = jobs["train"].workspace
    places = [
        path for top in (github.artifacts, workspace / "experiments", workspace / "data") for path in top.rglob("*")
    ]
    assert not [path for path in places if path.is_file() and PASSWORD.encode() in path.read_bytes()]
    for run_id in ("31", "32"):  # what follows may look for the newest published run
        github.change_run(run_id, conclusion="failure")


def test_gh_gets_its_token_from_the_environment(second: dict[str, JobRun], github: GitHub) -> None:
    assert github.calls
    for call in github.calls:
        assert call["token"] == TOKEN
        assert TOKEN not in " ".join(call["words"])


@pytest.mark.parametrize(("number", "status"), [("9", 0), ("10", 1)])
def test_a_run_is_continued_a_bounded_number_of_times(
    project_copy: Path, tmp_path: Path, number: str, status: int
) -> None:
    github = make_github(tmp_path / "github", project_copy)
    inputs = {**INPUTS, "instruction_set": "portable", "verify": "false", "publish": "false"}
    environment = {
        **{f"INPUT_{name.upper()}": str(value) for name, value in inputs.items()},
        "PATH": f"{github.folder / 'bin'}:{os.environ['PATH']}",
        "COMMIT": "0" * 40,
        "CONTINUATION_NUMBER": number,
        "MAX_CONTINUATIONS": "10",
        "GITHUB_REF_NAME": "main",
        "GITHUB_REPOSITORY": "somebody/image-classifier",
        "GITHUB_RUN_ID": "20",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }
    script = project_copy / ".github" / "scripts" / "continue_training.sh"
    result = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == status, result.stderr
    assert [call["continuation"] for call in github.dispatches] == [f"20:10:{'0' * 40}"] * (1 - status)
    assert result.stdout.startswith("::error::the run is not finished after 10 continuations") == bool(status)


HOSTILE = {
    "command substitution": "$(touch canary)",
    "backticks": "`touch canary`",
    "quotes": "a'; touch canary; echo '",
    "double quotes": 'a"; touch canary; echo "',
    "a second line": "a\ntouch canary",
    "a workflow command": "a\n::set-output name=x::y",
    "a percent sign": "%0A::error::x",
    "a way out": "../..",
    "a way out below": "a/../../b",
    "an absolute path": "/etc/passwd",
    "an option": "--privileged",
    "an expression": "${{ github.token }}",
    "very long": "a" * 5000,
    "another alphabet": "ａ",
    "a space": "a b",
    "a nul escape": "a\x01b",
}
FIELDS = (
    *(
        "experiment_name",
        "run_name",
        "dataset",
        "database",
        "recipe",
        "learning_rate",
        "momentum",
        "num_epochs",
        "num_workers",
    ),
    *("batch_size", "seed", "pretrained_model", "instruction_set", "continuation"),
)


@pytest.mark.parametrize("name", FIELDS)
def test_hostile_inputs_do_nothing_but_fail_with_a_message(name: str, project_copy: Path, tmp_path: Path) -> None:
    github = make_github(tmp_path / "github", project_copy)
    for number, value in enumerate(HOSTILE.values(), start=1):
        jobs = Runner(github, "training.yaml", tmp_path, run_id=str(number), inputs={**INPUTS, name: value}).run()
        assert get_results(jobs) == {job: "failure" if job == "plan" else "skipped" for job in jobs}, value
        (error,) = [line for line in jobs["plan"].log.splitlines() if line.startswith("::")]
        assert error.startswith(f"::error::the input {name} takes ")
        assert not list(tmp_path.rglob("canary"))
        assert len(error) < 500
    assert not github.calls and not github.uploads
