"""The script that Slurm gets: `templates/job.sbatch` with the options and the description of one job filled in."""

from __future__ import annotations

import shlex
import string
import sys
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from titans_dist.config import ConfigError
from titans_dist.config.machines import on_ray
from titans_launch import names
from titans_launch.doctor import EXCLUDE
from titans_launch.schedulers import slurm_array, snapshot
from titans_launch.schedulers.job import Job

LONGEST_WAIT_S = 65533

_EACH_NODE = 'trap "" USR1; export PET_NODE_RANK=$SLURM_NODEID; exec "$@"'
"""What a task does that is the torchrun of a node: torchrun would die of USR1, which is for the processes."""

_EACH_RAY = r"""
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # of what ends, nothing is left to be done
start() {
  @@ray start "$@" --num-cpus="$SLURM_CPUS_ON_NODE" --disable-usage-stats --block \
    >"$run/logs/ray-$SLURM_JOB_ID-$SLURM_NODEID.out" 2>&1 &
  ray=$!
}
lives() { (: <"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; }
if [ "$SLURM_NODEID" != 0 ]; then
  until lives || [ "$SECONDS" -gt 300 ]; do sleep 1; done
  start --address="$MASTER_ADDR:$MASTER_PORT"
  while lives; do sleep 1; done # by itself Ray would wait for its first node for minutes
  kill "$ray"
  wait "$ray"
  exit 0
fi
start --head --port="$MASTER_PORT" --include-dashboard=false
until lives; do
  kill -0 "$ray" 2>/dev/null || exit 1
  sleep 0.2
done
# The driver is no rank of a layout, though srun has started it beside others.
RAY_ADDRESS="$MASTER_ADDR:$MASTER_PORT" env -u SLURM_NTASKS "$@"
code=$?
kill "$ray"
wait "$ray"
exit $code
"""
"""What a task does where Ray's workers are: one Ray on all nodes, which ends with the driver on the first of them."""
_RAY_TOKEN = "export run RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')"
"""Others on these nodes must not be able to run anything in this Ray; the token is new in each start."""


class _Template(string.Template):
    delimiter = "@@"


def script(job: Job) -> str:
    """The text of the script. Raises ConfigError for values that Slurm or a container would misread."""
    text = resources.files("titans_launch.schedulers").joinpath("templates", "job.sbatch").read_text()
    return _Template(text).substitute(options="\n".join(_options(job)), settings="\n".join(_settings(job)))


def task_names(job: Job) -> list[str]:
    """The names of the runs of an array."""
    return [f"{job.config.name}-{number}" for number, _ in enumerate(job.config.submit.array)]


def task_folder(run_dir: Path, number: int | str) -> Path:
    """Run folder of one task of an array."""
    return run_dir.with_name(f"{run_dir.name}-{number}")


def _options(job: Job) -> list[str]:
    cluster, slurm = job.config.cluster, job.config.cluster.slurm
    gpus = cluster.gpus_per_node or None
    is_array = bool(job.config.submit.array)
    log_of = str(task_folder(job.run_dir, "%a") if is_array else job.run_dir)
    options: list[tuple[str, str | int | None]] = [
        ("job-name", job.name),
        ("nodes", job.nodes),
        ("ntasks-per-node", _tasks(job)),
        ("cpus-per-task", _cpus(job)),
        ("gpus-per-node", gpus if slurm.gres is None else None),
        ("gres", slurm.gres),
        ("mem", cluster.memory),
        ("time", cluster.time),
        ("partition", cluster.queue),
        ("account", cluster.account),
        ("qos", slurm.qos),
        ("constraint", slurm.constraint),
        ("reservation", slurm.reservation),
        ("nodelist", slurm.nodelist),
        ("exclude", _excluded(job)),
        ("dependency", slurm.dependency),
        ("array", f"0-{len(job.config.submit.array) - 1}" if is_array else None),
        ("mail-type", slurm.mail_type),
        ("mail-user", slurm.mail_user),
        ("signal", f"B:USR1@{cluster.grace_s}" if job.command == "train" else None),
        ("output", f"{_pattern(log_of, '%a' if is_array else '')}/logs/%x-%j.out"),
        ("open-mode", "append"),
    ]
    extra = [_one_line("cluster.slurm.extra", option) for option in slurm.extra]
    flags = ["exclusive"] if slurm.exclusive else []
    flags.append("requeue" if cluster.max_requeues else "no-requeue")
    lines = [f"--{name}={shlex.quote(_one_line(name, str(value)))}" for name, value in options if value is not None]
    return [f"#SBATCH {line}" for line in (*lines, *(f"--{flag}" for flag in flags), *extra)]


def _settings(job: Job) -> list[str]:
    cluster, slurm = job.config.cluster, job.config.cluster.slurm
    wait_s = min(cluster.timeout_s + cluster.grace_s, LONGEST_WAIT_S)
    lines = [
        _variable("command", job.command),
        _variable("launcher", slurm.launcher),
        _variable("nodes", job.nodes),
        _variable("tasks_per_node", _tasks(job)),
        _variable("max_requeues", cluster.max_requeues),
        _variable("max_restarts", _restarts(job)),
        _variable("grace_s", cluster.grace_s),
        _variable("wait_s", wait_s),
        _variable("folder", job.folder),
        *_runs(job),
        _variable("prepares", "yes" if _needs_preparing(job) else ""),
        _array("program", _program(job)),
        _array("srun_options", [f"--cpus-per-task={cpus}" for cpus in [_cpus(job)] if cpus] + _pyxis(job) + slurm.srun),
        _array("each_task", _each_task(job)),
        *(f"export {_variable(key, value)}" for key, value in _environment(job).items()),
        *([_RAY_TOKEN] if on_ray(job.config) else []),
        *slurm.setup,
    ]
    return lines


def _runs(job: Job) -> list[str]:
    """Name, run folder and arguments; in an array those of each task."""
    tasks = job.config.submit.array
    if not tasks:
        return [
            _variable("name", job.config.name),
            _variable("run", job.run_dir),
            _array("words", job.words(job.run_dir)),
        ]
    lines = ["case $SLURM_ARRAY_TASK_ID in"]
    for number, (name, overrides) in enumerate(zip(task_names(job), tasks, strict=True)):
        folder = task_folder(job.run_dir, number)
        words = [*job.arguments, *slurm_array.words(overrides), f"name={names.quote(name)}", names.place(folder)]
        lines += [
            f"{number})",
            *(f"  {line}" for line in (_variable("name", name), _variable("run", folder), _array("words", words))),
            "  ;;",
        ]
    return [*lines, "esac"]


def _environment(job: Job) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(job.config.cluster.threads), **job.config.cluster.environment}
    if job.code is not None and job.config.cluster.image is None:
        environment["PYTHONPATH"] = snapshot.python_path(job.code)
    return environment


def _each_task(job: Job) -> list[str]:
    """What stands before the program."""
    if on_ray(job.config):
        text = _Template(_EACH_RAY).substitute(ray=shlex.join(_program(job, "ray", "ray.scripts.scripts")))
    elif job.config.cluster.slurm.launcher == "torchrun":
        text = _EACH_NODE
    else:
        return []
    return ["bash", "-c", text, "titans-dist"]


def _program(job: Job, name: str = "titans-dist", module: str = "titans_launch") -> list[str]:
    """How a program is started: by its module here, by its name in an image."""
    cluster = job.config.cluster
    if cluster.image is None:
        return [sys.executable, "-m", module]
    if cluster.slurm.container == "pyxis":
        return [name]
    gpus = ["--nv"] if cluster.gpus_per_node else []
    binds = [word for mount in _mounts(job) for word in ("--bind", mount)]
    return ["apptainer", "exec", *gpus, *binds, "--pwd", str(job.folder), cluster.image, name]


def _pyxis(job: Job) -> list[str]:
    cluster = job.config.cluster
    if cluster.image is None or cluster.slurm.container != "pyxis":
        return []
    return [
        f"--container-image={cluster.image}",
        f"--container-mounts={','.join(_mounts(job))}",
        f"--container-workdir={job.folder}",
    ]


def _mounts(job: Job) -> list[str]:
    """FROM:TO of everything that a container sees of its node: what the job names has the same place in it."""
    own = [job.folder, *([] if job.run_dir.is_relative_to(job.folder) else [job.run_dir.parent])]
    for path in own:
        if set(str(path)) & set(":,"):
            raise ConfigError(
                f"{path} cannot be mounted in a container because of its : or ,; use a folder without them"
            )
    mounts = [f"{path}:{path}" for path in own]
    return mounts + [mount if ":" in mount else f"{mount}:{mount}" for mount in job.config.cluster.mounts]


def _needs_preparing(job: Job) -> bool:
    from titans_launch.prepare import READY_MADE

    return job.command == "train" and job.config.data.format not in READY_MADE


def _tasks(job: Job) -> int:
    """Tasks of each node."""
    return 1 if job.config.cluster.slurm.launcher == "torchrun" or on_ray(job.config) else job.per_node


def _cpus(job: Job) -> int | None:
    """Cores of each task; a torchrun, and a Ray, needs those of all its processes."""
    cpus = job.config.cluster.cpus_per_process
    if on_ray(job.config):
        return None if cpus is None else job.per_node * cpus
    if job.config.cluster.slurm.launcher == "torchrun":
        return job.per_node * (cpus or 1)
    return cpus


def _restarts(job: Job) -> int:
    """How often the script starts all processes again. One that is alone has a launcher of its own, which does that."""
    is_alone = job.nodes * _tasks(job) == 1 and job.config.cluster.slurm.launcher == "srun"
    return job.config.cluster.max_restarts if job.command == "train" and not is_alone else 0


def _excluded(job: Job) -> str | None:
    found = job.run_dir / EXCLUDE
    # Slurm knows nodes by their short names.
    bad = [line.strip().partition(".")[0] for line in found.read_text().splitlines()] if found.exists() else []
    return ",".join(filter(None, [job.config.cluster.slurm.exclude, *dict.fromkeys(bad)])) or None


def _pattern(path: str, kept: str) -> str:
    """`path` in a name of a log, where Slurm replaces what begins with %, but for `kept`."""
    if "\\" in path:
        raise ConfigError(f"{path} has a backslash, with which Slurm does not find its logs; use a name without one")
    escaped = path.replace("%", "%%")
    return f"{escaped.removesuffix(kept.replace('%', '%%'))}{kept}" if kept else escaped


def _one_line(name: str, value: str) -> str:
    if "\n" in value:
        raise ConfigError(f"{name}={value!r} is more than one line, but an option of sbatch is one; remove the break")
    return value


def _variable(name: str, value: object) -> str:
    return f"{name}={shlex.quote(str(value))}"


def _array(name: str, words: Iterable[str]) -> str:
    return f"{name}=({shlex.join(list(words))})"
