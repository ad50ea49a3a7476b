"""Threads and processes: on a busy machine, beside each other, on two hosts, and what many machines would take.

    sudo python -m benchmarks.scaling --dataset_folder DATA [--runs 3]

DATA holds real CIFAR-10. Recipe `quick` trains alone, and beside one and two processes that never sleep, with our
engine and with torch's autograd; in one process of two threads and two processes of one; and in two network namespaces
as two hosts, which only root can make, with 100 Mbit/s between them. One of them is cut off in the end. Time on more
machines is computed, not measured: from an epoch of `fast` here, the bytes of its gradients, and the speed of a
network. The seconds are those of the epochs alone.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import PROJECT, build_parser, load_result, measure_command, save_result, summarize, write_table
from image_classifier.model.catalog import build_classifier
from image_classifier.recipe import load_recipe
from image_classifier.training.shards import list_buffers

DOCUMENT = PROJECT / "docs" / "scaling.md"
NUM_IMAGES = 50_000
NETWORKS = {"1 Gbit/s, 0.2 ms": (1e9, 0.2e-3), "10 Gbit/s, 0.1 ms": (10e9, 0.1e-3)}
"""Bits a second and seconds one way."""
NUM_MACHINES = (1, 2, 4, 8, 16, 32, 64)
MOST_SHARDS = 64
"""Shards of the step that is computed for many machines; more machines than shards have nothing to do."""


HOSTS = {"image_classifier_1": "10.77.77.1", "image_classifier_2": "10.77.77.2"}
"""Network namespaces and their addresses."""
RATE = "100mbit"
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
"""Never sleeps, and ends with the benchmark, however that ends."""


@contextmanager
def keep_busy() -> Iterator[None]:
    """Run a process that never sleeps."""
    with subprocess.Popen([sys.executable, "-c", BUSY]) as process:
        try:
            yield
        finally:
            process.kill()


def measure_training(
    dataset_folder: Path, options: Sequence[str] = (), launcher: Sequence[str] = (sys.executable,)
) -> float:
    """Measure the seconds of the epochs of recipe `quick`."""
    with tempfile.TemporaryDirectory() as scratch:
        names = f"--experiments_folder {scratch} --experiment_name scaling --run_name run --recipe quick".split()
        command = [*launcher, "-m", "image_classifier.main", *names, "--dataset_folder", str(dataset_folder), *options]
        measure_command(command)
        return read_seconds(Path(scratch))


def read_seconds(experiments: Path) -> float:
    """Read the seconds of all epochs of a run."""
    lines = (experiments / "scaling" / "run" / "metrics.jsonl").read_text().splitlines()
    return sum(float(json.loads(line)["seconds"]) for line in lines)


def measure_busy(dataset_folder: Path, runs: int) -> dict[str, Any]:
    """Measure both engines alone and beside processes that never sleep: the seconds over those alone, in turn."""
    ratios: dict[str, list[float]] = {}
    for _ in range(runs):
        for engine in ("compiled", "eager"):
            alone = 0.0
            for num_busy in range(3):
                with ExitStack() as stack:
                    for _ in range(num_busy):
                        stack.enter_context(keep_busy())
                    seconds = measure_training(dataset_folder, ["--engine", engine])
                alone = alone or seconds
                ratios.setdefault(f"{engine}, {num_busy} busy", []).append(seconds / alone)
                print(f"{engine}, {num_busy} busy: {seconds:.1f} s, {seconds / alone:.2f}", flush=True)
    return {name: summarize(values) for name, values in ratios.items() if "0 busy" not in name}


def measure_ranks(dataset_folder: Path, runs: int) -> dict[str, Any]:
    """Measure one process of two threads and two of one: the speed of these over that of the one, in turn."""
    ratios = []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for _ in range(runs):
        one = measure_training(dataset_folder, ["--num_threads", "2"])
        two = measure_training(dataset_folder, ["--num_threads", "1"], torchrun)
        ratios.append(one / two)
        print(f"one process {one:.1f} s, two {two:.1f} s, {ratios[-1]:.2f}", flush=True)
    return summarize(ratios)


@contextmanager
def make_hosts() -> Iterator[None]:
    """Make two network namespaces that are joined by a wire of RATE."""

    def call(words: str) -> None:
        subprocess.run(words.split(), check=True)

    one, other = HOSTS
    try:
        for name in HOSTS:
            call(f"ip netns add {name}")
        call(f"ip link add wire netns {one} type veth peer name wire netns {other}")
        for name, address in HOSTS.items():
            call(f"ip -n {name} link set lo up")
            call(f"ip -n {name} addr add {address}/24 dev wire")
            call(f"ip -n {name} link set wire up")
            call(f"tc -n {name} qdisc add dev wire root tbf rate {RATE} burst 64kb latency 400ms")
        yield
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def build_host_command(host: str, dataset_folder: Path, experiments: Path) -> list[str]:
    """Build the command that trains `quick` on one of the hosts, in a process of one thread."""
    first = next(iter(HOSTS.values()))
    command = f"ip netns exec {host} env GLOO_SOCKET_IFNAME=wire {sys.executable} -m torch.distributed.run"
    command += " --nnodes 2 --nproc_per_node 1"
    command += f" --rdzv_backend c10d --rdzv_id scaling --rdzv_endpoint {first}:29400 --local_addr {HOSTS[host]}"
    command += f" --rdzv_conf is_host={int(HOSTS[host] == first)}"
    command += f" -m image_classifier.main --experiments_folder {experiments} --experiment_name scaling --run_name run"
    return f"{command} --recipe quick --num_threads 1 --dataset_folder {dataset_folder}".split()


def measure_hosts(dataset_folder: Path, runs: int) -> dict[str, Any]:
    """Measure two hosts over two processes of one machine, and how long they last when one is cut off."""
    ratios = []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for _ in range(runs):
        beside = measure_training(dataset_folder, ["--num_threads", "1"], torchrun)
        with make_hosts(), tempfile.TemporaryDirectory() as scratch:
            commands = [build_host_command(host, dataset_folder, Path(scratch)) for host in HOSTS]
            started = [subprocess.Popen(each, cwd=PROJECT, stderr=subprocess.PIPE, text=True) for each in commands]
            said = [process.communicate()[1] for process in started]
            if any(process.returncode for process in started):
                sys.exit("\n".join(said))
            apart = read_seconds(Path(scratch))
        ratios.append(apart / beside)
        print(f"two processes {beside:.1f} s, on two hosts {apart:.1f} s, {ratios[-1]:.2f}", flush=True)
    with make_hosts(), tempfile.TemporaryDirectory() as scratch:
        commands = [build_host_command(host, dataset_folder, Path(scratch)) for host in HOSTS]
        started = [subprocess.Popen(each, cwd=PROJECT, stderr=subprocess.PIPE, text=True) for each in commands]
        chain = Path(scratch) / "scaling" / "run" / "digests.jsonl"
        while not chain.exists() or not chain.read_text():
            time.sleep(0.1)
        subprocess.run(["ip", "-n", next(iter(HOSTS)), "link", "set", "wire", "down"], check=True)
        cut_off = time.perf_counter()
        lines = [read_error(process) for process in started]
        seconds = time.perf_counter() - cut_off
        for process in started:  # torchrun itself waits for minutes where its own store was on the other host
            process.kill()
    print(f"ended {seconds:.0f} s after one was cut off: {lines}", flush=True)
    return {"ratio": summarize(ratios), "seconds_after_cut": round(seconds, 1), "said": lines}


def read_error(process: subprocess.Popen[str]) -> str:
    """Wait for the line with which a training ends."""
    assert process.stderr is not None
    return next(line.strip() for line in process.stderr if line.startswith("error: "))


def compute_many(epoch_seconds: float) -> dict[str, Any]:
    """Compute the seconds of an epoch of `fast` on many machines, and how many of one machine's hours it costs.

    A process sends what it added to each of the others: to the next one in a ring, which hands it on.
    """
    settings = load_recipe("fast")
    classifier = build_classifier(
        settings["model"], 10, input_mean=(0.5,) * 3, input_std=(0.25,) * 3, seed=0, image_size=32
    )
    sent = [*classifier.parameters(), *list_buffers(classifier)]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in sent)
    num_steps = NUM_IMAGES // settings["batch_size"]
    rows = []
    for machines in NUM_MACHINES:
        share = math.ceil(MOST_SHARDS / machines) / MOST_SHARDS
        seconds = {
            name: epoch_seconds * share + num_steps * (machines - 1) * (num_bytes * 8 / bits + delay)
            for name, (bits, delay) in NETWORKS.items()
        }
        cost = {name: machines * value / epoch_seconds for name, value in seconds.items()}
        rows.append({"machines": machines, "seconds": seconds, "cost": cost})
    return {"bytes_of_a_step": num_bytes, "epoch_seconds": epoch_seconds, "rows": rows}


def build_table(result: dict[str, Any]) -> str:
    """Build what docs/scaling.md says of the costs."""
    lines = ["| training time of `quick` beside busy processes | one | two |", "|---|---|---|"]
    for engine, title in (("compiled", "our engine"), ("eager", "torch's autograd")):
        cells = (_describe(result["busy"][f"{engine}, {number} busy"]) for number in (1, 2))
        lines.append(f"| {title}, relative to an idle machine | " + " | ".join(cells) + " |")
    ranks, many = result["ranks"], result["many"]
    lines += [
        "",
        f"Two processes with one thread each reach {_describe(ranks)} times the speed of one process with two threads.",
        "",
        f"Two processes on two hosts with {RATE.removesuffix('mbit')} Mbit/s between them take "
        f"{_describe(result['hosts']['ratio'])} times as long as two processes on one host with the same cores. "
        f"After one host was cut off, the run stopped within {result['hosts']['seconds_after_cut']:.0f} s.",
        "",
        f"An epoch of `fast` takes {many['epoch_seconds']:.1f} s on one machine of {result['cores']} cores. A process "
        f"sends {many['bytes_of_a_step'] / 1e6:.1f} MB per step. The table estimates the time of an epoch on several "
        f"such "
        f"machines with {MOST_SHARDS} shards, from these figures and the network's speed. It is not measured:",
        "",
        "| machines | " + " | ".join(f"{name}: seconds | cost" for name in NETWORKS) + " |",
        "|---" * (1 + 2 * len(NETWORKS)) + "|",
    ]
    for row in many["rows"]:
        cells = (f"{row['seconds'][name]:.1f} | {row['cost'][name]:.1f}" for name in NETWORKS)
        lines.append(f"| {row['machines']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + (
        f"\n\nThe cost is in machine hours, relative to one machine. Measured on {result['cores']} cores of an "
        f"{result['processor']}, in alternating runs.\n"
    )


def _describe(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.2f} ({figure['least']:.2f} to {figure['most']:.2f})"


def main() -> None:
    """Measure, save the figures and write them into the document."""
    parser = build_parser(__doc__)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    fast = load_result("time_to_accuracy_native")["runs"]["trainer"]
    epochs = load_recipe("fast")["num_epochs"]
    epoch_seconds = sum(run["training_seconds"] for run in fast) / len(fast) / epochs
    save_result(
        "scaling",
        {
            "ranks": measure_ranks(arguments.dataset_folder, arguments.runs),
            "hosts": measure_hosts(arguments.dataset_folder, arguments.runs),
            "busy": measure_busy(arguments.dataset_folder, arguments.runs),
            "many": compute_many(epoch_seconds),
        },
    )
    write_table(DOCUMENT, "scaling", build_table(load_result("scaling")))


if __name__ == "__main__":
    main()
