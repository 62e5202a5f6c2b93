"""The script that Slurm gets: its options, its words, and what it does when its processes end or signals come."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from titans_launch.cli import main

LAYOUT = ("cluster=slurm", "data=synthetic", "parallel.tensor=1", "training.micro_batch_size=1")
STAND_INS = {
    # One line of `plan` for each call: the exit code, after a signal to the script where there is one.
    "srun": """\
#!/bin/bash
here=$(dirname "$0")
printf '%s\\0' "$TORCHELASTIC_RESTART_COUNT" "$@" >"$here/call-$(ls "$here" | grep -c call-)"
IFS=: read -r code signal <<<"$(sed -n "$(ls "$here" | grep -c call-)p" "$here/plan")"
if [ -n "$signal" ]; then
  kill -CONT "$PPID" && kill -"$signal" "$PPID"
  until [ -e "$here/../runs/mine/STOP" ]; do read -rt 0.02 <> <(:); done
fi
exit "$code"
""",
    "scontrol": """\
#!/bin/bash
if [ "$1" = show ]; then echo node1; else echo "$*" >>"$(dirname "$0")/told"; fi
""",
    "squeue": "#!/bin/bash\n",
    "sleep": "#!/bin/bash\n",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rendered(here: Path, *arguments: str, name: str = "mine") -> Path:
    """The script of a dry run."""
    assert main(["submit", *LAYOUT, *arguments, f"name='{name}'", "--dry-run"]) == 0
    return here / "runs" / name / "submit" / "job.sbatch"


def options(script: Path) -> list[str]:
    """What the script says to sbatch, but for what is the same for all."""
    common = ("--job-name", "--output", "--open-mode", "--signal", "--time")
    lines = [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line) if not word.startswith(common)]


class Played:
    """The script, run with stand-ins for Slurm's commands; `plan` is what each call of srun does."""

    def __init__(self, here: Path, script: Path, plan: str = "0", **environment: str) -> None:
        self.bin = here / "bin"
        shutil.rmtree(self.bin, ignore_errors=True)
        self.bin.mkdir()
        for name, text in STAND_INS.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        (self.bin / "plan").write_text("\n".join(plan.split()) + "\n")
        slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NAME": "mine", **environment}
        path = f"{self.bin}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", script], env={**os.environ, "PATH": path, **slurm}, capture_output=True, text=True, timeout=30
        )
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr

    @property
    def calls(self) -> list[list[str]]:
        """The words of each call of srun, after the number of the attempt."""
        found = sorted(self.bin.glob("call-*"), key=lambda path: int(path.name[5:]))
        return [path.read_text().split("\0")[:-1] for path in found]

    @property
    def is_requeued(self) -> bool:
        return (self.bin / "told").exists() and (self.bin / "told").read_text() == "requeue 4711\n"


def test_unset_options_are_absent(here: Path) -> None:
    assert options(rendered(here)) == ["--nodes=1", "--ntasks-per-node=1", "--requeue"]


def test_options_have_the_names_that_slurm_gives_them(here: Path) -> None:
    (here / "runs" / "mine").mkdir(parents=True)
    (here / "runs" / "mine" / "exclude.txt").write_text("n7.example.org\nn3\n")
    script = rendered(
        here,
        *("cluster=slurm_h100", "cluster.nodes=2", "parallel.data=16", "cluster.memory=900G", "cluster.queue=big"),
        *("cluster.account=physics", "cluster.slurm.qos=high", "cluster.slurm.constraint='a&b'"),
        *("cluster.slurm.reservation=r1", "cluster.slurm.exclude=n1", "cluster.slurm.dependency=singleton"),
        *("cluster.slurm.mail_type=END", "cluster.slurm.mail_user=me@example.org", "cluster.max_requeues=0"),
        *("cluster.slurm.extra=['--switches=1']", "cluster.slurm.setup=['module load cuda']"),
        *("cluster.slurm.srun=['--mpi=none']", "training.global_batch_size=128"),
    )
    assert options(script) == [
        *("--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=12", "--gpus-per-node=8", "--mem=900G"),
        *("--partition=big", "--account=physics", "--qos=high", "--constraint=a&b", "--reservation=r1"),
        *("--exclude=n1,n7,n3", "--dependency=singleton", "--mail-type=END", "--mail-user=me@example.org"),
        *("--exclusive", "--no-requeue", "--switches=1"),
    ]
    text = script.read_text()
    assert "#SBATCH --signal=B:USR1@300\n" in text and "#SBATCH --open-mode=append\n" in text
    assert text.index("\nmodule load cuda\n") < text.index("srun ")


@pytest.mark.parametrize("key", ["account", "slurm.extra"])
def test_an_option_cannot_break_out_of_its_line(here: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    value = "a\nb" if key == "account" else "['--a\nb']"
    assert main(["submit", *LAYOUT, f'cluster.{key}="{value}"' if key == "account" else f"cluster.{key}={value}"]) == 2
    assert "'a\\nb' is more than one line" in capsys.readouterr().err.replace("--a", "a")


def test_a_command_that_is_no_training_is_not_told_to_save(here: Path) -> None:
    assert "--signal" not in rendered(here, "--command=parallel-check").read_text()


def test_srun_starts_one_task_for_each_process_and_each_has_its_log(here: Path) -> None:
    played = Played(here, rendered(here, "cluster.nodes=2", "parallel.data=4", "cluster.cpus_per_process=3"))
    (call,) = played.calls
    assert {"--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=3", "--kill-on-bad-exit=0"} < {*call}
    assert f"--output={here}/runs/mine/logs/mine-4711-%t.out" in call and "--open-mode=append" in call
    assert call[call.index("train") - 2 : call.index("train")] == ["-m", "titans_launch"]


def test_a_torchrun_gets_the_cores_of_all_its_processes(here: Path) -> None:
    script = rendered(
        here, "cluster.nodes=2", "parallel.data=8", "cluster.cpus_per_process=3", "cluster.slurm.launcher=torchrun"
    )
    assert options(script)[:3] == ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=12"]


def test_words_arrive_as_they_were_typed(here: Path) -> None:
    odd = 'it\'s 100% $(touch owned) `touch owned` "a" *'
    script = rendered(here, "+cluster.environment.WHAT='$(touch owned); \\'x'", name=odd.replace("'", "\\'"))
    script = here / "runs" / odd / "submit" / "job.sbatch"
    played = Played(here, script)
    assert played.code == 0, played.err
    assert played.calls[0][-1] == "hydra.run.dir='" + str(here / "runs" / odd).replace("'", "\\'") + "'"
    assert not list(here.rglob("owned"))
    log = f"{here}/runs/{odd}".replace("%", "%%")
    assert f"#SBATCH --output={shlex.quote(f'{log}/logs/%x-%j.out')}\n" in script.read_text()
    assert f"--output={log}/logs/mine-4711-%t.out" in played.calls[0]


@pytest.mark.parametrize(
    ("container", "image", "words"),
    [
        (
            "pyxis",
            "nvcr.io#nvidia/pytorch:25.06-py3",
            [
                "--container-image=nvcr.io#nvidia/pytorch:25.06-py3",
                "--container-mounts={here}:{here},/scratch:/scratch,/datasets:/data",
                "--container-workdir={here}",
                "titans-dist",
            ],
        ),
        (
            "apptainer",
            "/images/titans.sif",
            [
                *("apptainer", "exec", "--bind", "{here}:{here}", "--bind", "/scratch:/scratch"),
                *("--bind", "/datasets:/data", "--pwd", "{here}", "/images/titans.sif", "titans-dist"),
            ],
        ),
    ],
)
def test_in_a_container_the_folders_have_the_same_places(
    here: Path, container: str, image: str, words: list[str]
) -> None:
    mounts = "cluster.mounts=['/scratch','/datasets:/data']"
    script = rendered(here, f"cluster.image='{image}'", f"cluster.slurm.container={container}", mounts)
    call = Played(here, script).calls[0]
    expected = [word.format(here=here) for word in words]
    assert [word for word in call[: call.index("train")] if word in expected] == expected
    assert "PYTHONPATH" not in script.read_text()


def test_data_is_prepared_first_where_it_needs_to_be(here: Path) -> None:
    played = Played(here, rendered(here, "data=stdlib"), "0 0")
    prepare, train = played.calls
    assert prepare[1:3] == ["--nodes=1", "--ntasks=1"] and "prepare" in prepare and "train" in train
    assert prepare[prepare.index("prepare") + 1 :] == train[train.index("train") + 1 :]


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The current folder of a run `mine`, whose script many tests play."""
    folder = tmp_path_factory.mktemp("two")
    with contextlib.chdir(folder):
        rendered(folder, "cluster.nodes=2", "parallel.data=2", "cluster.max_requeues=2")
    return folder


@pytest.mark.parametrize(
    ("plan", "code", "attempts", "is_requeued"),
    [
        ("0", 0, 1, False),
        ("1 0", 0, 2, False),  # a process has died
        ("137 1 1 1", 1, 4, False),  # cluster.max_restarts=3
        ("2", 2, 1, False),  # a configuration error
        ("1 4", 4, 2, False),
        ("5", 5, 1, False),
        ("3", 3, 1, False),  # the user's own STOP file, or training.max_minutes
        ("3:USR1", 0, 1, True),
        ("1:USR1", 0, 1, True),  # died while it saved
        ("0:USR1", 0, 1, False),  # was done anyway
        ("2:USR1", 2, 1, False),
        ("3:TERM", 3, 1, False),  # canceled, or Slurm requeues it itself
        ("1:TERM", 1, 1, False),
    ],
)
def test_what_follows_from_how_the_processes_end(
    of_two_processes: Path, plan: str, code: int, attempts: int, is_requeued: bool
) -> None:
    run = of_two_processes / "runs" / "mine"
    (run / "STOP").touch()  # of an earlier start
    played = Played(of_two_processes, run / "submit" / "job.sbatch", plan)
    assert (played.code, len(played.calls), played.is_requeued) == (code, attempts, is_requeued), played.out
    assert [call[0] for call in played.calls] == [str(number) for number in range(attempts)]
    assert not (run / "STOP").exists()


@pytest.mark.parametrize(
    ("plan", "environment", "code", "is_requeued", "sentence"),
    [
        ("3:USR1", {"SLURM_RESTART_COUNT": "1"}, 0, True, "ends with 3 and is requeued"),
        ("3:USR1", {"SLURM_RESTART_COUNT": "2"}, 3, False, "ends with 3 and is not requeued: cluster.max_requeues=2"),
        # Slurm itself has requeued it once more.
        ("0", {"SLURM_RESTART_COUNT": "3"}, 1, False, "was requeued more than cluster.max_requeues=2 times"),
    ],
)
def test_requeues_are_for_the_time_limit_and_are_counted(
    of_two_processes: Path, plan: str, environment: dict[str, str], code: int, is_requeued: bool, sentence: str
) -> None:
    script = of_two_processes / "runs" / "mine" / "submit" / "job.sbatch"
    played = Played(of_two_processes, script, plan, **environment)
    assert (played.code, played.is_requeued) == (code, is_requeued)
    assert sentence in played.out


@pytest.mark.parametrize(
    ("left", "code", "is_requeued", "sentence"),
    [(400, 0, True, "ends with 3 and is requeued"), (4000, 3, False, "was asked to stop, and has saved")],
)
def test_processes_that_stop_because_the_time_is_nearly_over_are_requeued(
    of_two_processes: Path, left: int, code: int, is_requeued: bool, sentence: str
) -> None:
    """They stop by themselves when a save takes longer than the seconds that are left."""
    script = of_two_processes / "runs" / "mine" / "submit" / "job.sbatch"
    played = Played(of_two_processes, script, "3", SLURM_JOB_END_TIME=f"{time.time() + left:.0f}")
    assert (played.code, played.is_requeued) == (code, is_requeued)
    assert sentence in played.out


def test_a_task_of_an_array_requeues_itself_and_not_the_array(here: Path) -> None:
    script = rendered(here, 'submit.array=["training.seed=1","training.seed=2"]')
    (here / "runs" / "mine-1").mkdir()
    array = {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "1"}
    (here / "runs" / "mine").joinpath("STOP").touch()
    played = Played(here, script, "3:USR1", **array)
    assert (played.bin / "told").read_text() == "requeue 4711_1\n"
    assert played.calls[0][-3:] == ["training.seed=2", "name='mine-1'", f"hydra.run.dir='{here}/runs/mine-1'"]
