"""The YAML of --cluster_config: the options of Dask's cluster classes, and a few of our own."""

import importlib
import inspect
import logging
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espnet_kv.config import load_yaml
from espnet_kv.errors import UserError, one_line

CLASSES = {
    "local": ("distributed", "LocalCluster"),
    "ssh": ("distributed", "SSHCluster"),
    "slurm": ("dask_jobqueue", "SLURMCluster"),
    "pbs": ("dask_jobqueue", "PBSCluster"),
    "sge": ("dask_jobqueue", "SGECluster"),
    "lsf": ("dask_jobqueue", "LSFCluster"),
    "htcondor": ("dask_jobqueue", "HTCondorCluster"),
    "oar": ("dask_jobqueue", "OARCluster"),
    "moab": ("dask_jobqueue", "MoabCluster"),
}
"""--cluster -> module and name of the class that starts it."""
OWN = ("n_workers", "adapt", "gpus", "wait", "threads_per_job")
# what this module or the cluster itself sets, and what has been renamed or has no effect
_REFUSED = {"self", "loop", "asynchronous", "start", "ip", "scheduler", "name", "silence_logs"}
_REFUSED |= {"job_cls", "scheduler_cls", "worker_class", "extra", "job_extra", "env_extra"}
_REFUSED |= {"header_skip", "project", "config_name", "blocked_handlers"}
_WAIT = {"local": 60.0}


def nothing() -> None:
    """Does nothing; unlike a lambda it can be sent to a worker."""


@dataclass(frozen=True)
class Options:
    """What a cluster is started with.

    kind: one of CLASSES. where: the file, as messages name it. start: starts it.
    gpus: of each worker. wait: seconds for which there may be no worker.
    threads_per_job: torch threads of a command. refused: why the scheduler takes no jobs, as soon
    as that is known.
    """

    kind: str
    where: str
    start: Callable[[], Any] = field(repr=False)
    gpus: int = 0
    wait: float = 600.0
    threads_per_job: int = 1
    refused: list[str] = field(default_factory=list)


def read(kind: str, file: Path | None) -> Options:
    """Read and check the options of a cluster.

    Raises:
        UserError: Dask is missing, the file is, or one of its keys is unknown or has a wrong value.
    """
    make = _class(kind)
    where = str(file) if file else f"--cluster {kind} without --cluster_config"
    given = load_yaml(file) if file else {}
    known = _known(kind, make)
    if unknown := [key for key in given if key not in known]:
        raise UserError(
            f"{where}: {unknown[0]}: unknown key of --cluster {kind} (see docs/cluster.md)"
        )
    number = _Numbers(where, given)
    gpus = number.whole("gpus", 0, 0)
    adapt = given.get("adapt")
    if adapt is not None:
        if not (isinstance(adapt, dict) and adapt.keys() == {"minimum", "maximum"}):
            raise UserError(f"{where}: adapt: write {{minimum: 0, maximum: 8}}")
        bounds = _Numbers(f"{where}: adapt", adapt)
        bounds.whole("maximum", max(1, bounds.whole("minimum", 0, 0)), 1)
    elif "n_workers" in given:
        number.whole("n_workers", 1, 1)
    elif kind not in ("local", "ssh"):
        raise UserError(f"{where}: n_workers is missing (or adapt: {{minimum: 0, maximum: 8}})")
    side_by_side = max(
        given.get("n_workers") or 1 if kind == "local" else 1, given.get("processes") or 1
    )
    if gpus and side_by_side > 1:
        raise UserError(
            f"{where}: gpus: several workers on one machine would use the same GPU: make it one "
            "worker of several threads"
        )
    rest = {key: value for key, value in given.items() if key not in OWN}
    refused: list[str] = []
    options = Options(
        kind,
        where,
        lambda: _start(kind, make, where, rest, gpus, given.get("n_workers"), adapt, refused),
        gpus,
        number.above_zero("wait", _WAIT.get(kind, 600.0)),
        number.whole("threads_per_job", 1, 1),
        refused,
    )
    if kind not in ("local", "ssh"):
        _check_job(make, where, arguments(kind, rest, gpus))
    return options


def _class(kind: str) -> Any:
    module, name = CLASSES[kind]
    needed = [module, *(["asyncssh"] if kind == "ssh" else [])]
    try:
        made = [getattr(importlib.import_module(each), name, None) for each in needed]
    except ImportError as error:
        raise UserError(
            f"--cluster {kind} needs {error.name}: pip install espnet_kv[cluster]"
        ) from error
    return made[0]


def _known(kind: str, make: Any) -> set[str]:
    """Keys that a file of this kind may have."""
    if kind == "local":
        own, makers = {*OWN, "memory_limit", "local_directory"}, [make]
    elif kind == "ssh":
        own, makers = {"gpus", "wait", "threads_per_job"}, [make]
    else:
        own, makers = set(OWN), [*make.__mro__, *make.job_cls.__mro__]
    refused = _REFUSED | ({"processes", "adapt"} if kind == "local" else set())
    names = {
        name
        for maker in makers
        if maker is not object
        for name, parameter in inspect.signature(maker).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    return (names | own) - refused


def arguments(kind: str, given: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """The arguments of Dask's class: those given, and those that the recipe needs."""
    made = dict(given)
    path = os.environ.get("PYTHONPATH", "")
    # relative to where the run is, which a worker does not know when it starts
    path = os.pathsep.join(os.path.abspath(part) for part in path.split(os.pathsep) if part)
    if kind == "local":
        made |= {"processes": True, "silence_logs": logging.CRITICAL}
        # without an address Dask takes port 8787, which another run on this machine may have
        made.setdefault("dashboard_address", "127.0.0.1:0")
        made |= {"resources": {"GPU": gpus}} if gpus else {}
    elif kind == "ssh":
        if path:
            python = f"env {shlex.quote(f'PYTHONPATH={path}')} {shlex.quote(sys.executable)}"
            made.setdefault("remote_python", python)
        worker = {"resources": {"GPU": gpus}} if gpus else {}
        made["worker_options"] = worker | (given.get("worker_options") or {})
    else:
        lines = [f"cd {shlex.quote(os.getcwd())}"]
        lines += [f"export PYTHONPATH={shlex.quote(path)}"] if path else []
        made["job_script_prologue"] = [*lines, *(given.get("job_script_prologue") or [])]
        scheduler = {"dashboard": False, "dashboard_address": ":0"}
        made["scheduler_options"] = scheduler | (given.get("scheduler_options") or {})
        if gpus:
            more = given.get("worker_extra_args") or []
            made.setdefault("processes", 1)  # Dask would make several of many cores
            made["worker_extra_args"] = [*more, "--resources", f"GPU={gpus}"]
        made["silence_logs"] = logging.CRITICAL
    return made


def _check_job(make: Any, where: str, given: Mapping[str, Any]) -> None:
    """Let Dask make the script of a job, which checks the values, before any work."""
    of_job = set().union(*(inspect.signature(c).parameters for c in make.job_cls.__mro__[:-2]))
    try:
        make.job_cls(
            "tcp://scheduler",
            "worker",
            **{k: v for k, v in given.items() if k in of_job - {"security"}},
        ).job_script()
    except Exception as error:
        raise UserError(f"{where}: {_first_line(error)}") from error


def _start(
    kind: str,
    make: Any,
    where: str,
    given: Mapping[str, Any],
    gpus: int,
    n_workers: int | None,
    adapt: Mapping[str, int] | None,
    refused: list[str],
) -> Any:
    """Start a cluster.

    Raises:
        UserError: it cannot be started.
    """
    options = arguments(kind, given, gpus)
    if kind == "local":
        options["n_workers"] = n_workers
    command = kind not in ("local", "ssh") and shlex.split(make.job_cls.submit_command)[0]
    if command and shutil.which(command) is None:
        raise UserError(
            f"--cluster {kind} needs the command {command}, which is not here: start the recipe on "
            "a machine from which jobs are submitted"
        )
    if command:
        options["job_cls"] = _telling(make.job_cls, refused)
    cluster = None
    try:
        cluster = make(**options)
        if adapt is not None:
            cluster.adapt(**adapt)
        elif command:
            cluster.scale(n_workers)
        return cluster
    except Exception as error:
        if cluster is not None:
            cluster.close()
        raise UserError(f"{where}: the cluster cannot be started: {one_line(error)}") from error


def _telling(job_cls: Any, refused: list[str]) -> Any:
    """A class of jobs that adds to `refused` what the scheduler says against one; Dask drops it."""

    class Telling(job_cls):
        async def _submit_job(self, script: str) -> Any:
            try:
                return await super()._submit_job(script)
            except Exception as error:
                refused.append(one_line(str(error).rpartition("stderr:")[2]))
                raise

    return Telling


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" :") if lines else type(error).__name__


@dataclass(frozen=True)
class _Numbers:
    """Reads numbers out of a mapping; `where` names it in messages."""

    where: str
    given: Mapping[str, Any]

    def whole(self, key: str, least: int, default: int) -> int:
        value = self.given.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{self.where}: {key} {value}: not a whole number of {least} or more")
        return value

    def above_zero(self, key: str, default: float) -> float:
        value = self.given.get(key, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value > 0):
            raise UserError(f"{self.where}: {key} {value}: not a number of seconds")
        return float(value)
