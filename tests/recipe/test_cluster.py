"""Work on a Dask cluster: its configuration, and that results are those of this machine."""

import json
import sys
import types
from pathlib import Path

import process_stubs
import pytest
import yaml

from espnet_kv.errors import UserError
from espnet_kv.recipe import cluster, cluster_config, cluster_worker
from espnet_kv.recipe.jobs import Job, run_jobs
from espnet_kv.recipe.pool import CLUSTER, parallel_map

REPO = Path(__file__).parents[2]
EXAMPLES = sorted((REPO / "conf/cluster").glob("*.yaml"))
SLURM = {"n_workers": 2, "cores": 4, "memory": "8GB"}


def read(tmp_path: Path, kind: str, **options) -> cluster_config.Options:
    file = tmp_path / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(options))
    return cluster_config.read(kind, file)


@pytest.fixture
def asyncssh(monkeypatch):
    """As if it were installed."""
    monkeypatch.setitem(sys.modules, "asyncssh", types.ModuleType("asyncssh"))


class TestConfiguration:
    @pytest.mark.parametrize("file", EXAMPLES, ids=lambda path: path.stem)
    def test_the_examples_are_understood(self, file, asyncssh):
        assert cluster_config.read(file.stem, file).wait > 0

    def test_there_is_an_example_of_each_sort(self):
        assert {path.stem for path in EXAMPLES} == {"local", "pbs", "slurm", "ssh"}

    @pytest.mark.parametrize("kind", cluster_config.CLASSES)
    def test_an_unknown_key_is_named_with_its_file(self, kind, tmp_path, asyncssh):
        with pytest.raises(UserError, match=rf"{kind}\.yaml: n_wrokers: unknown key of --cluster"):
            read(tmp_path, kind, n_wrokers=2)

    @pytest.mark.parametrize(
        ("kind", "options", "said"),
        [
            ("slurm", {"cores": 4, "memory": "8GB"}, "n_workers is missing"),
            ("slurm", {"n_workers": 2, "memory": "8GB"}, "You must specify how much cores"),
            ("slurm", SLURM | {"n_workers": 0}, "n_workers 0: not a whole number of 1 or more"),
            ("slurm", SLURM | {"memory": "much"}, "much"),
            ("slurm", SLURM | {"wait": 0}, "wait 0: not a number of seconds"),
            ("slurm", SLURM | {"adapt": 3}, "adapt: write {minimum: 0, maximum: 8}"),
            (
                "slurm",
                SLURM | {"adapt": {"minimum": 4, "maximum": 2}},
                "adapt: maximum 2: not a whole number of 4 or more",
            ),
            ("slurm", SLURM | {"gpus": 2, "processes": 2}, "gpus: several workers"),
            ("slurm", SLURM | {"job_cls": "x"}, "job_cls: unknown key"),
            ("local", {"n_workers": 2, "gpus": 1}, "gpus: several workers"),
            ("local", {"processes": False}, "processes: unknown key"),
            ("local", {"threads_per_job": "all"}, "threads_per_job all: not a whole number"),
            ("ssh", {"n_workers": 2}, "n_workers: unknown key"),
        ],
    )
    def test_a_wrong_value_is_told_in_one_line(self, kind, options, said, tmp_path, asyncssh):
        with pytest.raises(UserError) as told:
            read(tmp_path, kind, **options)
        assert f"{kind}.yaml: {said}" in str(told.value) or said == "much" in str(told.value)
        assert "\n" not in str(told.value)

    @pytest.mark.parametrize(
        ("kind", "missing"),
        [("local", "distributed"), ("slurm", "dask_jobqueue"), ("ssh", "asyncssh")],
    )
    def test_without_the_extra_one_line_says_how_to_install_it(self, kind, missing, monkeypatch):
        monkeypatch.setitem(sys.modules, missing, None)
        told = rf"^--cluster {kind} needs {missing}: pip install espnet_kv\[cluster\]$"
        with pytest.raises(UserError, match=told):
            cluster.read({"cluster": kind, "cluster_config": None})

    def test_a_file_goes_with_a_kind(self):
        with pytest.raises(UserError, match="--cluster_config goes with --cluster"):
            cluster.read({"cluster": None, "cluster_config": Path("slurm.yaml")})
        assert cluster.read({"cluster": None, "cluster_config": None}) is None

    def test_no_command_of_the_scheduler(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match="--cluster slurm needs the command sbatch"):
            read(tmp_path, "slurm", **SLURM).start()

    def test_the_script_of_a_slurm_job(self, tmp_path, monkeypatch):
        from dask_jobqueue import SLURMCluster

        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", "lib")
        given = yaml.safe_load((REPO / "conf/cluster/slurm.yaml").read_text())
        given = {key: value for key, value in given.items() if key not in cluster_config.OWN}
        del given["processes"]
        given |= {"account": "speech", "job_extra_directives": ["--gres=gpu:2"]}
        with SLURMCluster(**cluster_config.arguments("slurm", given, 2)) as made:
            script = made.job_script().splitlines()
        wanted = ["-p batch", "-A speech", "--cpus-per-task=8", "--mem=30G", "-t 24:00:00"]
        for directive in [*wanted, "--gres=gpu:2"]:
            assert f"#SBATCH {directive}" in script
        start = script.index(f"cd {tmp_path}")
        assert script[start + 1] == f"export PYTHONPATH={tmp_path}/lib"
        assert script[-1].startswith(f"{sys.executable} -m distributed.cli.dask_worker tcp://")
        assert "--nthreads 8 " in script[-1] and "--nworkers" not in script[-1]
        assert "--resources GPU=2" in script[-1]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Two workers of this machine."""
    folder = tmp_path_factory.mktemp("cluster")
    made = cluster.Cluster(read(folder, "local", n_workers=2, threads_per_worker=1), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{REPO}:{Path(process_stubs.__file__).parent}")
        yield made
    made.close()


@pytest.fixture
def on_workers(local, tmp_path, monkeypatch):
    """Within the test the work goes to these workers."""
    monkeypatch.setattr(local, "_place", tmp_path)
    monkeypatch.chdir(tmp_path)
    with cluster.used_in(3, local):
        yield


def stub(name: str, *arguments: str, **options) -> Job:
    return Job(name, process_stubs.__name__, arguments, Path(f"logs/{name}.log"), **options)


@pytest.mark.usefixtures("on_workers")
class TestWork:
    @pytest.mark.parametrize("nj", [1, 3])
    def test_results_come_in_order(self, nj):
        numbers = list(range(50))
        assert list(parallel_map(process_stubs.square, numbers, nj)) == [n * n for n in numbers]

    def test_an_exception_is_told_after_the_results_before_it(self):
        results = []
        with pytest.raises(UserError, match=r"^ValueError: three is one too many$"):
            for result in parallel_map(process_stubs.fail_at_three, range(40), 2):
                results.append(result)
        assert results == [0, 1, 2]

    def test_what_is_computed_ahead_is_bounded(self, local, monkeypatch):
        submitted = []
        submit = local._client.submit
        monkeypatch.setattr(
            local._client, "submit", lambda *a, **k: submitted.append(a) or submit(*a, **k)
        )
        results = parallel_map(process_stubs.square, range(1000), 2)
        next(results)
        assert len(submitted) <= 4 * 2
        results.close()

    def test_jobs_have_logs_and_failures_of_their_own(self, capsys):
        jobs = [
            stub("good", "record", "good.json"),
            stub("warns", "say", "warning: so it is"),
            stub("bad", "fail"),
        ]
        with pytest.raises(UserError, match=r"bad failed: RuntimeError: size mismatch.*1 of 3"):
            run_jobs(jobs, 1)
        told = capsys.readouterr()
        assert "good: done" in told.out and "bad: failed" in told.out
        assert told.err == "  warns: warning: so it is\n"
        record = json.loads(Path("good.json").read_text())
        assert record["threads"] == "1" and record["gpus"] == ""
        assert sorted(path.name for path in Path("logs").iterdir()) == [
            "bad.log",
            "good.log",
            "warns.log",
        ]

    def test_the_output_of_one_attempt_is_taken_over_once(self):
        output = Path("parts/output.1")
        for name in ("output.1", ".output.1.partial-old"):
            (output.parent / name).mkdir(parents=True)
            (output.parent / name / "stale").touch()
        ended = []
        job = stub(
            "part", "make", output=output, after=lambda: ended.append(list(output.iterdir()))
        )
        run_jobs([job], 1)
        assert ended == [[output / "made"]]
        assert [path.name for path in output.parent.iterdir()] == ["output.1"]

    def test_a_job_that_needs_a_gpu_where_there_is_none(self):
        with pytest.raises(UserError, match=r"local\.yaml: gpus is 0: a job of this stage needs 1"):
            run_jobs([stub("gpu", "say", "x", gpus=1)], 1)


def test_training_stays_on_this_machine():
    for stage in range(1, 16):
        with cluster.used_in(stage, types.SimpleNamespace()):
            assert (CLUSTER.get() is None) == (stage not in (1, 2, 3, 10, 12, 14))
    assert CLUSTER.get() is None


def test_commands_of_one_worker_have_different_gpus(monkeypatch):
    monkeypatch.setattr(cluster_worker, "gpu_names", lambda: ["0", "1"])
    with cluster_worker._gpus(1) as first, cluster_worker._gpus(1) as second:
        assert sorted(first + second) == ["0", "1"]
        with pytest.raises(UserError, match="finds 0 free GPUs"), cluster_worker._gpus(1):
            pass
    with cluster_worker._gpus(2) as both:
        assert both == ["0", "1"]
