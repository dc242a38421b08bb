"""The launchers against stand-ins for gcloud, sbatch, kubectl and the study, which record calls and fail on demand."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "slurm.sbatch", "slurm.sh", "tpu_vm.sh", "common.sh", "kubernetes/launch.sh")
STUDY = ("--", "--config=a config.py", "--workdir=runs/it's", '--config.note=a "b"')
STUB = f"""#!{sys.executable}
import fcntl, json, pathlib, sys, time
folder = pathlib.Path({{folder!r}})
call = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with (folder / "calls.jsonl").open("a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # several processes may be started at once
    file.write(json.dumps(call) + "\\n")
    file.flush()
    answers = json.loads((folder / "answers.json").read_text())
    fitting = [answer for answer in answers if answer["when"] in " ".join(call) and answer["times"]][:1]
    for answer in fitting:
        answer["times"] -= 1
        (folder / "answers.json").write_text(json.dumps(answers))
for answer in fitting:
    time.sleep(answer["after"])
    print(answer["out"])
    print(answer["err"], file=sys.stderr)
    sys.exit(answer["code"])
"""


class World:
    """A folder of stand-ins that comes first in PATH."""

    def __init__(self, folder):
        self.folder = folder
        self.answers = []
        stub = folder / "stub"
        stub.write_text(STUB.replace("{folder!r}", repr(str(folder))))
        stub.chmod(0o755)
        (folder / "bin").mkdir()
        for name in ("gcloud", "sbatch", "kubectl", "srun", "scontrol", "python3"):
            (folder / "bin" / name).symlink_to(stub)

    def answer(self, when, out="", *, err="", code=0, times=99, after=0.0):
        """What a call that contains some text gives, the first answer that fits before later ones."""
        self.answers.append(
            {"when": when, "out": out, "err": err, "code": code, "times": times, "after": after}
        )

    @property
    def environment(self):
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "POLL_S": "0", "TRIES": "3", "GRACE_S": "1", "HOME": str(self.folder)}
        return {**{key: value for key, value in os.environ.items() if not key.startswith("SLURM")}, **own}

    def run(self, script, *arguments, **more):
        (self.folder / "answers.json").write_text(json.dumps(self.answers))
        return subprocess.run(
            ["bash", str(LAUNCH / script), *arguments], env={**self.environment, **more}, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip

    @property
    def calls(self):
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def made(self, text):
        return [call for call in self.calls if text in " ".join(call)]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_to_say(script):
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    said = subprocess.run([shellcheck, "-x", str(LAUNCH / script)], cwd=ROOT, capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "")


TPU = ("--name=dapt", "--zone=us-west4-a", "--project=lab", "--spot")
DRY = {
    "local.sh": (("--processes=2",), ["python3"]),
    "slurm.sh": (("--gpus=4", "--time=1-00:00"), ["sbatch", "srun"]),
    "tpu_vm.sh": (("run", *TPU), ["gcloud"]),
    "kubernetes/launch.sh": (("run", "--name=dapt", "--image=registry/dapt:1"), ["kubectl"]),
}


@pytest.mark.parametrize("script", DRY)
def test_a_dry_run_prints_the_commands_and_calls_nothing(world, script):
    arguments, programs = DRY[script]
    ended = world.run(script, *arguments, "--dry_run", *STUDY)
    assert ended.returncode == 0, ended.stderr
    assert world.calls == []
    for program in programs:
        assert any(program in line for line in (ended.stdout + ended.stderr).splitlines())
    if script in ("local.sh", "slurm.sh"):  # what is printed can be pasted: the flags are the same words
        (*_, line) = ended.stdout.splitlines()
        assert shlex.split(line)[-3:] == list(STUDY[1:])


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("local.sh", ["--procs=2"], "unknown flag --procs=2; expected --dry_run, --processes=N"),
        ("local.sh", [], "no flags of a study"),
        ("slurm.sh", ["--gpu=2"], "unknown flag --gpu=2"),
        ("slurm.sh", ["--gpus=2"], "no flags of a study"),
        ("tpu_vm.sh", ["--name=a", "--zone=b"], "no action; expected create, setup, run, tail or delete"),
        ("tpu_vm.sh", ["run", "--name=a"], "no --name or no --zone"),
        ("tpu_vm.sh", ["run", "--name=a", "--zone=b"], "no flags of a study"),
        ("kubernetes/launch.sh", ["run", "--name=Big"], "expected lower-case letters"),
        ("kubernetes/launch.sh", ["run", "--name=a", "--platform=vms"], "expected tpu-gke, gpu-gke or gpu"),
        ("kubernetes/launch.sh", ["run", "--name=a"], "no --image"),
        ("local.sh", ["--processes=0", *STUDY], "--processes is '0'; expected a whole number from 1"),
        ("local.sh", ["--restarts=many", *STUDY], "--restarts is 'many'; expected a whole number from 0"),
        ("local.sh", ["--port=08", *STUDY], "--port is '08'; expected a whole number from 1"),
        ("tpu_vm.sh", ["run", "--name=a", "--zone=b", "--restarts=many", *STUDY], "--restarts is 'many'"),
        ("kubernetes/launch.sh", ["run", "--name=a", "--hosts=two"], "--hosts is 'two'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(world, script, arguments, words):
    ended = world.run(script, *arguments)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert words in ended.stderr
    assert world.calls == []


# ---- one machine
# --------------------------------------------------------------------------------------------------


def test_locally_a_study_that_was_told_to_stop_is_started_again_and_one_with_a_mistake_is_not(world):
    world.answer("dapt_jax.main", code=75, times=2)
    world.answer("dapt_jax.main", code=137, times=1)
    world.answer("dapt_jax.main", code=0)
    ended = world.run("local.sh", *STUDY)
    assert ended.returncode == 0
    assert world.calls == [["python3", "-m", "dapt_jax.main", *STUDY[1:]]] * 4
    world.answers = [world.answers[0] | {"code": 2, "times": 9}]
    assert world.run("local.sh", *STUDY).returncode == 2
    assert len(world.calls) == 5


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch"])
def test_a_user_without_a_home_runs_a_study_too(world, script):
    """As in a container whose user has no entry; where compiled programs are then kept is the study's matter."""
    world.answer("dapt_jax.main", code=0)
    (world.folder / "answers.json").write_text(json.dumps(world.answers))
    environment = {
        name: value for name, value in world.environment.items() if name not in ("HOME", "XDG_CACHE_HOME")
    }
    flags = STUDY if script == "local.sh" else STUDY[1:]
    ended = subprocess.run(
        ["bash", str(LAUNCH / script), *flags], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "\n")
    assert len(world.calls) == 1


def test_locally_restarts_have_an_end(world):
    world.answer("dapt_jax.main", code=75)
    ended = world.run("local.sh", "--restarts=2", *STUDY)
    assert ended.returncode == 75
    assert "exit code 75 after 2 restarts: no more of them" in ended.stderr
    assert len(world.calls) == 3


def test_locally_a_process_that_dies_ends_the_others(world):
    """The others would wait for it for ever; whatever they do about SIGTERM, they are gone soon."""
    world.answer("dapt_jax.main", code=137, times=1, after=0.5)
    world.answer("dapt_jax.main", code=0, times=2, after=50.0)
    world.answer("dapt_jax.main", code=2)
    began = time.monotonic()
    ended = world.run("local.sh", "--processes=3", "--restarts=1", *STUDY)
    assert time.monotonic() - began < 20
    assert "the other 2 are told to save and stop" in ended.stderr
    assert "starting again (1 of 1)" in ended.stderr
    assert ended.returncode == 2


def test_locally_a_signal_is_handed_on_and_not_followed_by_a_restart(world):
    stub = world.folder / "bin" / "python3"
    stub.unlink()
    stub.write_text(
        f"#!/usr/bin/env bash\ntrap 'echo told > {world.folder}/told; exit 75' TERM\n"
        f"touch {world.folder}/ready\nwhile :; do sleep 0.05; done\n"
    )
    stub.chmod(0o755)
    process = subprocess.Popen(["bash", str(LAUNCH / "local.sh"), *STUDY], env=world.environment)
    deadline = time.monotonic() + 20
    while not (world.folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert (world.folder / "told").exists()


# ---- Slurm --------------------------------------------------------------------------------------------------------


def test_a_job_that_was_told_to_stop_goes_back_into_the_queue(world):
    world.answer("srun", code=75)
    ended = world.run("slurm.sbatch", *STUDY[1:], SLURM_JOB_ID="7")
    assert ended.returncode == 0
    assert world.calls[0][-5:] == ["-m", "dapt_jax.main", *STUDY[1:]]
    assert world.calls[-1] == ["scontrol", "requeue", "7"]


@pytest.mark.parametrize(("code", "restarts"), [(2, "0"), (75, "100")])
def test_a_job_with_a_mistake_or_too_many_restarts_ends(world, code, restarts):
    world.answer("srun", code=code)
    ended = world.run("slurm.sbatch", *STUDY[1:], SLURM_JOB_ID="7", SLURM_RESTART_COUNT=restarts)
    assert ended.returncode == code
    assert not world.made("scontrol")
    assert len(ended.stderr.strip().splitlines()) == 1


def test_the_notice_of_a_job_reaches_its_tasks(world):
    stub = world.folder / "bin" / "srun"
    stub.unlink()
    stub.write_text(
        f"#!/usr/bin/env bash\ntrap 'sleep 0.3; exit 75' TERM\ntouch {world.folder}/ready\nwhile :; do sleep 0.05; done\n"
    )
    stub.chmod(0o755)
    (world.folder / "answers.json").write_text("[]")
    command = ["bash", str(LAUNCH / "slurm.sbatch"), *STUDY[1:]]
    process = subprocess.Popen(
        command, env={**world.environment, "SLURM_JOB_ID": "7"}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 20
    while not (world.folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert world.made("scontrol requeue 7")


def test_submitting_is_tried_again_where_slurm_is_busy_and_only_there(world):
    world.answer(
        "sbatch",
        err="sbatch: error: Batch job submission failed: Socket timed out on send/recv",
        code=1,
        times=2,
    )
    world.answer("sbatch", "4711;cluster")
    ended = world.run("slurm.sh", "--gpus=2", *STUDY)
    assert ended.returncode == 0
    assert "job 4711" in ended.stderr
    assert len(world.calls) == 3
    world.answers = []
    world.answer("sbatch", err="sbatch: error: QOSMaxSubmitJobPerUserLimit", code=1)
    ended = world.run("slurm.sh", "--gpus=2", *STUDY)
    assert ended.returncode == 1
    assert (
        ended.stderr.splitlines()[-1] == "slurm.sh: not submitted: sbatch: error: QOSMaxSubmitJobPerUserLimit"
    )
    assert len(world.calls) == 4


# ---- TPU VMs
# ------------------------------------------------------------------------------------------------------

GONE = "ERROR: (gcloud) NOT_FOUND: no such resource"


def test_a_tpu_is_asked_for_set_up_and_run_on(world):
    world.answer("describe", err=GONE, code=1, times=1)
    world.answer("describe", "WAITING_FOR_RESOURCES", times=2)
    world.answer("describe", "ACTIVE")
    world.answer("cat ~/ended", "running\n0", times=2)
    world.answer("cat ~/ended", "0\n0")
    ended = world.run("tpu_vm.sh", "run", *TPU, *STUDY)
    assert ended.returncode == 0, ended.stderr
    (create,) = world.made("queued-resources create")
    for flag in (
        "--node-id=dapt",
        "--zone=us-west4-a",
        "--project=lab",
        "--spot",
        "--accelerator-type=v5litepod-8",
    ):
        assert flag in create
    assert len(world.made("describe")) == 4
    assert len(world.made("scp")) == 1
    (start,) = world.made("setsid")
    assert "--worker=all" in start
    command = start[-1].removeprefix("--command=")
    inner = shlex.split(command.partition("bash -c ")[2].partition(" >> ")[0])[0]
    flags = shlex.split(inner.partition("dapt_jax.main ")[2].partition(";")[0])
    assert flags == [
        "--config.runtime.multi_process=on",
        *STUDY[1:],
    ]  # the workers find each other by the TPU's metadata
    assert not world.made("delete")


def test_a_second_setup_of_a_tpu_runs_the_checkout_as_it_is_now_and_keeps_what_studies_wrote(world):
    """scp to a folder that is there copies into it."""
    checkout, machine = world.folder / "a checkout", world.folder / "machine"
    shutil.copytree(LAUNCH, checkout / "launch")
    package = checkout / "dapt_jax"
    package.mkdir()
    for name in ("venv/bin/pip", "dapt_jax/runs/results.jsonl"):
        (machine / name).parent.mkdir(parents=True)
        (machine / name).write_text("#!/usr/bin/env bash\n")
        (machine / name).chmod(0o755)
    gcloud = world.folder / "bin" / "gcloud"
    gcloud.unlink()
    gcloud.write_text(
        f"#!/usr/bin/env bash\nexport HOME={machine}\ncd ~ || exit\n"
        'if [[ $4 == scp ]]; then cp -r "$6" "${7#*:}"; exit; fi\n'
        'for last; do :; done; bash -c "${last#--command=}"\n'
    )
    gcloud.chmod(0o755)
    (world.folder / "answers.json").write_text("[]")
    for version, module in enumerate(("old.py", "new.py")):
        for each in package.iterdir():
            each.unlink()
        (package / module).write_text(f"VERSION = {version}")
        script = ["bash", str(checkout / "launch" / "tpu_vm.sh"), "setup", *TPU]
        ended = subprocess.run(script, env=world.environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        assert [path.name for path in (machine / "dapt_jax" / "dapt_jax").iterdir()] == [module]
    assert (machine / "dapt_jax" / "runs" / "results.jsonl").exists()


def test_a_tpu_that_is_taken_away_is_asked_for_again(world):
    world.answer("describe", "ACTIVE", times=1)  # at the start
    world.answer("cat ~/ended", "running", times=1)
    world.answer("cat ~/ended", code=255, times=1)  # its connection is lost with it
    world.answer("describe", "SUSPENDED", times=2)
    world.answer("describe", "ACTIVE")
    world.answer("cat ~/ended", "0")
    ended = world.run("tpu_vm.sh", "run", *TPU, *STUDY)
    assert ended.returncode == 0, ended.stderr
    assert "dapt was taken away" in ended.stderr
    assert len(world.made("queued-resources delete dapt")) == 1
    assert "--force" in world.made("queued-resources delete")[0]
    assert len(world.made("queued-resources create")) == 1
    assert len(world.made("scp")) == 2
    assert len(world.made("setsid")) == 2


def test_a_study_that_saved_and_stopped_on_a_tpu_is_started_again_there(world):
    world.answer("describe", "ACTIVE")
    world.answer("cat ~/ended", "75\n0", times=1)
    world.answer("cat ~/ended", "0\n0")
    ended = world.run("tpu_vm.sh", "run", *TPU, *STUDY)
    assert ended.returncode == 0
    assert len(world.made("setsid")) == 2
    assert len(world.made("scp")) == 1
    assert "starting again (1 of 100)" in ended.stderr


def test_a_mistake_on_a_tpu_is_not_tried_again(world):
    world.answer("describe", "ACTIVE")
    world.answer("cat ~/ended", "running\n2")
    ended = world.run("tpu_vm.sh", "run", *TPU, *STUDY)
    assert ended.returncode == 2
    assert len(world.made("setsid")) == 1


def test_a_lost_connection_does_not_end_the_study(world):
    world.answer("describe", "ACTIVE")
    world.answer("cat ~/ended", code=255, times=2)
    world.answer("cat ~/ended", "0")
    ended = world.run("tpu_vm.sh", "run", *TPU, *STUDY)
    assert ended.returncode == 0
    assert ended.stderr.count("the study goes on without this connection") == 2
    assert len(world.made("setsid")) == 1


def test_a_connection_that_stays_lost_is_one_clear_line(world):
    world.answer("describe", "ACTIVE")
    world.answer("cat ~/ended", code=255)
    ended = world.run("tpu_vm.sh", "run", *TPU, *STUDY)
    assert ended.returncode == 1
    assert "no answer from dapt: look with" in ended.stderr.splitlines()[-1]


def test_without_quota_there_is_one_line_and_no_second_try(world):
    world.answer("create", err="ERROR: RESOURCE_EXHAUSTED: Quota limit has been exceeded.", code=1)
    ended = world.run("tpu_vm.sh", "create", *TPU)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert (
        line
        == "tpu_vm.sh: no TPU v5litepod-8 in us-west4-a: ERROR: RESOURCE_EXHAUSTED: Quota limit has been exceeded."
    )
    assert len(world.calls) == 1


def test_a_gcloud_that_times_out_is_tried_again(world):
    world.answer("create", err="ERROR: HttpError 503: deadline exceeded", code=1, times=2)
    world.answer("describe", "ACTIVE")
    assert world.run("tpu_vm.sh", "create", *TPU).returncode == 0
    assert len(world.made("create")) == 3


def test_a_tpu_that_does_not_come_is_one_line(world):
    world.answer("describe", "FAILED")
    ended = world.run("tpu_vm.sh", "create", *TPU)
    assert ended.returncode == 1
    assert "the request for dapt is FAILED: delete it" in ended.stderr
    world.answers = []
    world.answer("describe", "WAITING_FOR_RESOURCES")
    ended = world.run("tpu_vm.sh", "create", *TPU, WAIT_S="0")
    assert "no TPU v5litepod-8 in us-west4-a within 0 s" in ended.stderr


# ---- Kubernetes
# ---------------------------------------------------------------------------------------------------


def manifest(world, *arguments):
    yaml = pytest.importorskip("yaml")
    ended = world.run(
        "kubernetes/launch.sh",
        "run",
        "--dry_run",
        "--name=dapt",
        "--image=registry/dapt:1",
        *arguments,
        *STUDY,
    )
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if not line.startswith("kubectl")]
    return yaml.safe_load("\n".join(lines))


@pytest.mark.parametrize(
    ("platform", "resource", "selected"),
    [
        (
            "tpu-gke",
            "google.com/tpu",
            {"gke-tpu-accelerator": "tpu-v5-lite-podslice", "gke-tpu-topology": "2x4"},
        ),
        ("gpu-gke", "nvidia.com/gpu", {"gke-accelerator": "nvidia-l4"}),
        ("gpu", "nvidia.com/gpu", {}),
    ],
)
def test_a_manifest_is_a_jobset_that_restarts_what_was_interrupted(world, platform, resource, selected):
    made = manifest(world, f"--platform={platform}", "--hosts=3", "--chips=4", "--claim=disk")
    assert (made["apiVersion"], made["kind"], made["metadata"]["name"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
        "dapt",
    )
    (rule,) = made["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (workers,) = made["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 3
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    codes, disrupted = job["podFailurePolicy"]["rules"]
    assert codes["action"] == disrupted["action"] == "FailJob"
    assert codes["onExitCodes"] == {"containerName": "study", "operator": "In", "values": [os.EX_TEMPFAIL]}
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # Kubernetes takes a podFailurePolicy with nothing else
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert {
        key.removeprefix("cloud.google.com/"): value for key, value in pod.get("nodeSelector", {}).items()
    } == selected
    (container,) = pod["containers"]
    assert container["args"] == list(STUDY[1:])
    assert container["resources"]["limits"] == {resource: 4}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "disk"
    environment = {each["name"]: each.get("value") for each in container["env"]}
    if platform != "tpu-gke":
        assert environment["JAX_COORDINATOR_ADDRESS"] == "dapt-workers-0-0.dapt:12355"
        assert environment["JAX_NUM_PROCESSES"] == "3"
    assert "{" not in json.dumps(made).replace('{"', "").replace("{}", "")


APPLIED = ("run", "--name=dapt", "--image=registry/dapt:1", *STUDY)


def test_a_jobset_is_applied_and_waited_for(world):
    world.answer("Completed", "", times=2)
    world.answer("Completed", "True")
    ended = world.run("kubernetes/launch.sh", *APPLIED)
    assert ended.returncode == 0, ended.stderr
    assert len(world.made("apply -f")) == 1


def test_a_jobset_that_fails_or_is_not_taken_or_cannot_be_asked_about_is_one_line(world):
    world.answer('"Failed"', "True")
    ended = world.run("kubernetes/launch.sh", *APPLIED)
    assert ended.returncode == 1
    assert "the study failed; see" in ended.stderr
    world.answers = []
    world.answer("apply", err="exceeded quota", code=1)
    ended = world.run("kubernetes/launch.sh", *APPLIED)
    assert ended.returncode == 1
    assert "the manifest was not taken" in ended.stderr.splitlines()[-1]
    world.answers = []
    world.answer("get jobset", err="Unable to connect to the server: timeout", code=1)
    ended = world.run("kubernetes/launch.sh", *APPLIED)
    assert ended.returncode == 1
    assert "no answer from the cluster; the same command goes on watching" in ended.stderr.splitlines()[-1]
