"""Starts the cluster of docker-compose.yml for real, uses it, breaks it, and takes it down.

Needs a Docker engine, docker-compose (1.29 or v2), and, unless BASE names an image that is
there, debootstrap and root to make one.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DEPENDENCIES = HERE / "build" / "dependencies"
PACKAGE = HERE / "build" / "package"
BASE = os.environ.get("BASE", "expert-mesh-base")
SUITE = "bookworm"
NUM_WORKERS = 16
PROMPT = "In the beginning God created"
START_TIMEOUT_S = 240.0
FOLLOW_TIMEOUT_S = 90.0


BEGAN_S = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN_S:5.1f} s] {text}", flush=True)


def run(*command: str | Path, **kwargs: Any) -> str:
    """Standard output of a command; a failure ends the test with its standard error."""
    kwargs.setdefault("timeout", 300)
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **kwargs)
    if done.returncode:
        words = " ".join(map(str, command[:6]))
        raise SystemExit(f"{words} ... failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def wait_until(what: str, holds: Callable[[], bool], timeout_s: float) -> None:
    """Poll twice a second until it holds."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline_s:
            raise SystemExit(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.5)
    say(what)


def make_wheels() -> None:
    """All that the image installs, fetched here, where there is a package index."""
    for folder in (DEPENDENCIES, PACKAGE):
        shutil.rmtree(folder, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        # A copy, since setuptools leaves a build folder in the tree that it builds.
        ignored = shutil.ignore_patterns(".*", "build", "models", "tests", "compose", "*.egg-info")
        shutil.copytree(ROOT, source, ignore=ignored)
        run(*pip, "wheel", "--no-deps", "--wheel-dir", PACKAGE, source)
    (ours,) = PACKAGE.iterdir()
    constraints = ROOT / "constraints.txt"
    run(*pip, "download", "--only-binary=:all:", "--dest", DEPENDENCIES, "-c", constraints, ours)
    (DEPENDENCIES / ours.name).unlink()


def make_base_image() -> None:
    """A minimal Debian with Python, unless BASE is there already."""
    if subprocess.run(["docker", "image", "inspect", BASE], capture_output=True).returncode == 0:
        return
    say(f"no image {BASE}: making one of Debian {SUITE}")
    with tempfile.TemporaryDirectory() as scratch:
        packages = "python3,python3-venv,ca-certificates"
        run("debootstrap", "--variant=minbase", f"--include={packages}", SUITE, scratch)
        with subprocess.Popen(["tar", "-C", scratch, "-c", "."], stdout=subprocess.PIPE) as tar:
            run("docker", "import", "-", BASE, stdin=tar.stdout)


def check_python_versions() -> None:
    """The wheels are for this interpreter's version, so the image must have the same."""
    show = "import sys; print(*sys.version_info[:2], sep='.')"
    theirs = run("docker", "run", "--rm", "--network=none", BASE, "python3", "-c", show).strip()
    ours = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if theirs != ours:
        raise SystemExit(
            f"{BASE} has Python {theirs}, the wheels are for {ours}: name another BASE"
        )


class Cluster:
    """One project of docker-compose, under a name and a port that nobody else has."""

    def __init__(self) -> None:
        self.name = f"expert-mesh-test-{os.getpid()}"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        tool = ("docker-compose",) if shutil.which("docker-compose") else ("docker", "compose")
        self._compose = (*tool, "-p", self.name, "-f", str(HERE / "docker-compose.yml"))
        self._environ = {**os.environ, "PORT": str(self.port), "BASE": BASE}

    def compose(self, *words: str, timeout: float = 300) -> str:
        return run(*self._compose, *words, env=self._environ, timeout=timeout)

    def ids(self, service: str = "") -> list[str]:
        """Containers of a service, or of all; those that have ended too."""
        filters = ["--filter", f"label=com.docker.compose.project={self.name}"]
        if service:
            filters += ["--filter", f"label=com.docker.compose.service={service}"]
        return run("docker", "ps", "-aq", *filters).split()

    def all_are(self, health: str, containers: list[str]) -> bool:
        found = run("docker", "inspect", "-f", "{{.State.Health.Status}}", *containers)
        return set(found.split()) == {health}

    def status(self) -> dict[str, Any]:
        """From inside: placement's port is not published."""
        answer = self.compose(
            "exec",
            "-T",
            "placement",
            "expert-mesh",
            "status",
            "--target",
            "placement:50050",
            "--json",
        )
        return dict(json.loads(answer))

    def scale(self, num_workers: int) -> None:
        words = ("up", "-d", "--no-recreate", "--scale", f"worker={num_workers}")
        self.compose(*words, timeout=600)

    def has_workers(self, count: int) -> bool:
        """That many, all that there should be, and every expert on them."""
        status = self.status()
        return len(status["workers"]) == count and bool(status["complete"])

    def generate(self) -> str:
        """From this host, through the published port."""
        command = Path(sys.executable).with_name("expert-mesh")
        target = f"127.0.0.1:{self.port}"
        words = ("--prompt", PROMPT, "--max-tokens", "32", "--temperature", "0", "--json")
        return str(json.loads(run(command, "generate", "--target", target, *words))["text"])

    def leftovers(self) -> list[str]:
        label = f"label=com.docker.compose.project={self.name}"
        return self.ids() + run("docker", "network", "ls", "-q", "--filter", label).split()


def grow_and_shrink(cluster: Cluster, text: str) -> None:
    """Two workers more, then back to as many as there were, while requests run."""
    stopping = threading.Event()

    def keep_asking() -> int:
        num_answers = 0
        while not stopping.is_set():
            answer = cluster.generate()
            if answer != text:
                raise SystemExit(f"another answer while scaling: {answer!r}")
            num_answers += 1
        return num_answers

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(keep_asking)
        try:
            for num_workers in (NUM_WORKERS + 2, NUM_WORKERS):
                cluster.scale(num_workers)
                wait_until(
                    f"scaled to {num_workers} workers",
                    lambda n=num_workers: cluster.has_workers(n),
                    FOLLOW_TIMEOUT_S,
                )
        finally:
            stopping.set()
        say(f"{asking.result()} answers meanwhile, all the same")


def use_and_break(cluster: Cluster) -> None:
    gateway, placement = cluster.ids("gateway")[0], cluster.ids("placement")[0]
    everyone = cluster.ids()
    wait_until(
        f"all {len(everyone)} containers are healthy",
        lambda: cluster.all_are("healthy", everyone),
        START_TIMEOUT_S,
    )
    for container in (gateway, placement):
        user = run("docker", "exec", container, "id", "-u").strip()
        if user == "0":
            raise SystemExit("a container runs as root")
    text = cluster.generate()
    say(f"generated from the host: {PROMPT}{text!r}")

    grow_and_shrink(cluster, text)

    victim = cluster.ids("worker")[0]
    run("docker", "kill", victim)
    say(f"killed the worker container {victim[:12]}")

    def plan_has_a_hole() -> bool:
        status = cluster.status()
        return len(status["workers"]) == NUM_WORKERS - 1 and not status["complete"]

    wait_until("the plan lost the worker's experts", plan_has_a_hole, FOLLOW_TIMEOUT_S)
    wait_until(
        "placement's and the gateway's health say so",
        lambda: cluster.all_are("unhealthy", [placement, gateway]),
        FOLLOW_TIMEOUT_S,
    )
    run("docker", "start", victim)
    say("started it again")
    wait_until("the plan is complete", lambda: bool(cluster.status()["complete"]), FOLLOW_TIMEOUT_S)
    wait_until(
        "all containers are healthy",
        lambda: cluster.all_are("healthy", everyone),
        FOLLOW_TIMEOUT_S,
    )
    again = cluster.generate()
    if again != text:
        raise SystemExit(f"another answer after the restart: {again!r}")
    say("generated the same again")


def main() -> None:
    run("docker", "info", timeout=20)
    make_base_image()
    check_python_versions()
    make_wheels()
    say("the wheels are there")
    cluster = Cluster()
    cluster.compose("build", "placement", timeout=900)
    say("the image is built")
    try:
        cluster.scale(NUM_WORKERS)
        say(f"started placement, {NUM_WORKERS} workers and a gateway")
        use_and_break(cluster)
    except BaseException:
        print(cluster.compose("ps"), cluster.compose("logs", "--tail=5"), sep="\n")
        raise
    finally:
        cluster.compose("down", "--volumes", "--remove-orphans", "--timeout", "20")
    if left := cluster.leftovers():
        raise SystemExit(f"left behind: {left}")
    say("taken down, nothing left")


if __name__ == "__main__":
    main()
