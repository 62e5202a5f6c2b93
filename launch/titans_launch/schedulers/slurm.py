"""Slurm as a scheduler, through its own commands: sbatch, squeue, scancel, scontrol, sinfo and sacct."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from titans_dist.config import ConfigError, UserError
from titans_launch.schedulers import slurm_array, slurm_script
from titans_launch.schedulers.job import Job, State, Submission
from titans_launch.schedulers.show import follow_files

SCRIPT = "job.sbatch"
STOP_TIMEOUT_S = 900.0
"""Seconds that a job gets to save and end before Slurm is told to kill it."""
LOOK_S = 2.0
"""Seconds between two questions to Slurm, which answers those of all its users one after the other."""

_OVER = [
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
]
_RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING", "SUSPENDED")
_UNUSABLE = ("down", "drain", "fail", "maint", "reserved", "unknown")
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Of whatever started this process; sbatch hands the environment on."""


class Slurm:
    """A job is known by its number, a task of an array by NUMBER_TASK."""

    def render(self, job: Job) -> dict[str, str]:
        return {SCRIPT: slurm_script.script(job)}

    def check(self, job: Job) -> None:
        slurm_array.check(job)
        _check_image(job)
        done = _call(["sbatch", "--test-only"], text=slurm_script.script(job), folder=job.folder)
        if done.returncode == 0:
            return
        said = _said(done)
        if "node configuration" in said and _waits_for_nodes(job):
            return
        raise ConfigError(f"Slurm refuses the job: {said}; {_mend(said, job)}")

    def submit(self, job: Job, files: list[Path]) -> list[str]:
        tasks = range(len(job.config.submit.array))
        for number in tasks:
            (slurm_script.task_folder(job.run_dir, number) / "logs").mkdir(parents=True, exist_ok=True)
        ids: list[str] = []
        for _ in range(job.config.submit.chain):
            after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
            done = _call(["sbatch", "--parsable", *after, str(files[0])], folder=job.folder)
            if done.returncode:
                if ids:
                    _call(["scancel", *ids])
                raise UserError(f"Slurm refuses the job: {_said(done)}; nothing was submitted")
            ids.append(done.stdout.strip().partition(";")[0])
        return [f"{ids[0]}_{number}" for number in tasks] or ids

    def states(self, submission: Submission) -> list[State]:
        fields = "JobArrayID:|,State:|,RestartCnt:|,NodeList:|,Reason:|"
        wanted = ["--states=all", f"--jobs={','.join(submission.ids)}"]
        done = _call(["squeue", "--noheader", "--array", *wanted, f"--Format={fields}"])
        if done.returncode and "Invalid job id" not in done.stderr:
            raise UserError(f"Slurm does not answer: {_said(done)}; try again later")
        rows = [line.split("|") for line in done.stdout.splitlines() if done.returncode == 0]
        known = {id: _state(id, word, restarts, nodes, reason) for id, word, restarts, nodes, reason, *_ in rows}
        forgotten = [id for id in submission.ids if id not in known]
        known |= _accounted(forgotten)
        return [known[id] for id in submission.ids if id in known]

    def logs(self, submission: Submission, follow: bool) -> None:
        def goes_on() -> bool:
            return any(not state.is_over for state in self.states(submission))

        follow_files([path for id in submission.ids for path in _logs(submission, id)], goes_on if follow else None)

    def cancel(self, submission: Submission) -> None:
        left = self._left(submission)
        # Those that wait first, or one of a chain would begin.
        waiting = [state.id for state in left if state.state not in _RUNNING]
        running = [state.id for state in left if state.state in _RUNNING]
        _tell("scancel", waiting)
        # The script lets the processes save. Slurm itself would kill them after some seconds (KillWait).
        for id in running:
            _call(["scancel", "--batch", "--signal=TERM", id])
        if not self._ends(submission, STOP_TIMEOUT_S):
            _tell("scancel", [state.id for state in self.states(submission) if not state.is_over])

    def requeue(self, submission: Submission) -> None:
        states = self.states(submission)
        if not states:
            raise UserError(
                f"Slurm knows {', '.join(submission.ids)} no longer; titans-dist submit starts {submission.name} again"
            )
        running = [state.id for state in states if state.state in _RUNNING]
        if not running and not all(state.is_over for state in states):
            raise UserError(f"{submission.name} waits already, so there is nothing to requeue")
        if running:
            for id in running:
                _tell("scancel", ["--batch", "--signal=USR1", id])
        else:
            _tell("scontrol", ["requeue", states[-1].id])

    def _left(self, submission: Submission) -> list[State]:
        left = [state for state in self.states(submission) if not state.is_over]
        if not left:
            raise UserError(f"{submission.name} does not run any more, so there is nothing to cancel")
        return left

    def _ends(self, submission: Submission, timeout_s: float) -> bool:
        """Whether all jobs end in time."""
        deadline = time.monotonic() + timeout_s
        while any(not state.is_over for state in self.states(submission)):
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_S)
        return True


def scheduler(backend: str) -> Slurm:
    """The only one there is."""
    return Slurm()


def _call(
    arguments: Sequence[str], text: str | None = None, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in _FOREIGN}
    try:
        return subprocess.run(
            arguments, input=text, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UserError(
            f"there is no {arguments[0]} on this machine, so Slurm cannot be asked; run this on a login node of the "
            "cluster, or use cluster=local"
        ) from None


def _tell(command: str, arguments: list[str]) -> None:
    """Have Slurm do something; nothing without arguments."""
    if not arguments:
        return
    done = _call([command, *arguments])
    if done.returncode:
        raise UserError(f"Slurm refuses {command} {' '.join(arguments)}: {_said(done)}")


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that is no advice on usage, without the name of the program."""
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("Try ")]
    last = lines[-1] if lines else f"exit code {done.returncode}"
    for prefix in ("sbatch: ", "scancel: ", "squeue: ", "error: ", "fatal: ", "allocation failure: "):
        last = last.removeprefix(prefix)
    return last.strip()


def _state(id: str, word: str, restarts: str, nodes: str, reason: str) -> State:
    parts = [nodes, reason if reason not in ("None", "") else ""]
    if restarts not in ("0", ""):
        parts.append(f"requeued {restarts} time{'s' * (restarts != '1')}")
    return State(id, word, word in _OVER, ", ".join(filter(None, parts)))


def _accounted(ids: list[str]) -> dict[str, State]:
    """What the accounting still knows of jobs that the controller has forgotten; not every site has one."""
    if not ids:
        return {}
    try:
        done = _call(
            ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(ids)}", "--format=JobID,State"]
        )
    except UserError:
        return {}
    rows = [line.split("|") for line in done.stdout.splitlines() if done.returncode == 0]
    # "CANCELLED by 1000"
    return {id: State(id, state.split()[0], True, "from the accounting") for id, state in rows if id in ids and state}


def _logs(submission: Submission, id: str) -> list[Path]:
    """Of the script and of the first task."""
    run_dir = Path(submission.run_dir)
    _, is_task, number = id.partition("_")
    folder = (slurm_script.task_folder(run_dir, number) if is_task else run_dir) / "logs"
    return [folder / f"{submission.name}-{id}.out", folder / f"{submission.name}-{id}-0.out"]


def _check_image(job: Job) -> None:
    """Refuse the file of a container that is not there."""
    image = job.config.cluster.image
    if image is not None and image.endswith((".sqsh", ".sif")) and not (job.folder / image).exists():
        raise ConfigError(f"cluster.image={image} is not there; give the path of an image that all nodes see")


def _waits_for_nodes(job: Job) -> bool:
    """Whether the partition would do if all its nodes were up: then the job may well wait for them."""
    rows = _sinfo(job, "%D|%T")
    total = sum(int(count) for count, _ in rows)
    return total >= job.nodes and any(word in state for _, state in rows for word in _UNUSABLE)


def _sinfo(job: Job, columns: str) -> list[list[str]]:
    partition = job.config.cluster.queue
    where = [f"--partition={partition}"] if partition else []
    done = _call(["sinfo", "--noheader", *where, f"--format={columns}|%P"])
    rows = [line.split("|") for line in done.stdout.splitlines()]
    # The default one has a star.
    return [row[:-1] for row in rows if partition or row[-1].endswith("*")]


def _mend(said: str, job: Job) -> str:
    cluster = job.config.cluster
    mends: dict[str, Callable[[], str]] = {
        "partition": lambda: f"cluster.queue={cluster.queue}, and there are {', '.join(_partitions())}",
        "node configuration": lambda: (
            f"the job asks for cluster.nodes={job.nodes}, and the partition has {_described_nodes(job)}"
        ),
        "account": lambda: f"choose another cluster.account than {cluster.account}, or another cluster.slurm.qos",
        "qos": lambda: f"choose another cluster.slurm.qos than {cluster.slurm.qos}",
        "feature": lambda: f"choose another cluster.slurm.constraint than {cluster.slurm.constraint}",
        "reservation": lambda: f"choose another cluster.slurm.reservation than {cluster.slurm.reservation}",
        "node name": lambda: "look at cluster.slurm.nodelist, cluster.slurm.exclude and exclude.txt in the run folder",
        "option": lambda: "look at cluster.slurm.extra",
    }
    for word, mend in mends.items():
        if word in said.lower():
            return mend()
    return "change what it names; titans-dist submit --dry-run shows the script"


def _partitions() -> list[str]:
    return _call(["sinfo", "--noheader", "--format=%R"]).stdout.split()


def _described_nodes(job: Job) -> str:
    rows = _sinfo(job, "%D|%c|%m|%G")
    each = [f"{nodes} with {cpus} CPUs, {memory} MB and {gres}" for nodes, cpus, memory, gres in rows]
    return " and ".join(each).replace("(null)", "no GPUs") or "no nodes"
