"""Time and peak memory of stages 3 and 12 on a Dask cluster of this machine, by amount of data.

Utterances are tones of 1.4 to 2.2 s, the model is a Conformer of one small block: what is measured
is how time and memory grow with the data, not how fast a model is.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from espnet_kv.files import commit

REPO = Path(__file__).parents[1]
MB = 1 << 20


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utterances", type=int, nargs="+", default=[100, 400, 1600])
    parser.add_argument("--stages", type=int, nargs="+", default=[3, 12], choices=(3, 12))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where data is made (default: a temporary one)")
    return parser


def main() -> None:
    """Measure each amount of data, print a table and one line of JSON."""
    args = get_parser().parse_args()
    sys.path.insert(0, str(REPO / "tests/support"))
    from tone_recipe import make_tone_recipe

    rows = []
    print(f"commit {commit()}, {args.workers} workers, load {os.getloadavg()[0]:.1f} at the start")
    print("stage utterances hours wall_s cpu_s driver_s driver_MB worker_MB job_MB", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for count in args.utterances:
            here = Path(folder) / str(count)
            options = make_tone_recipe(here, count)
            (here / "local.yaml").write_text(
                f"n_workers: {args.workers}\nthreads_per_worker: 1\nwait: 600\n"
            )
            options += ["--nj", str(args.workers), "--inference_nj", str(args.workers)]
            run(here, *options, "--stop_stage", "2")
            where = ["--cluster", "local", "--cluster_config", "local.yaml"]
            for stage in args.stages:
                found = run(
                    here, *options, *where, "--stage", str(stage), "--stop_stage", str(stage)
                )
                samples = (here / "dump/raw/test/utt2num_samples").read_text().split()[1::2]
                found |= {"stage": stage, "utterances": count}
                found["hours"] = sum(map(int, samples)) / 16000 / 3600
                rows.append(found)
                print(
                    f"{stage:5d} {count:10d} {found['hours']:5.2f} {found['wall_s']:6.1f} "
                    f"{found['cpu_s']:5.1f} {found['driver_s']:8.1f} {found['driver_MB']:9.0f} "
                    f"{found['worker_MB']:9.0f} {found['job_MB']:6.0f}",
                    flush=True,
                )
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    print(json.dumps({"commit": commit(), "workers": args.workers, "rows": rows}))


def run(folder: Path, *options: str) -> dict[str, float]:
    """Run the recipe; wall seconds, CPU seconds, and the largest resident set of each kind."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "espnet_kv.recipe", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    peak = {"driver_MB": 0.0, "worker_MB": 0.0, "job_MB": 0.0}
    seconds: dict[int, float] = {}
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid)]
            family += family[0].children(recursive=True)
        except psutil.Error:
            family = []
        for each in family:
            try:
                size, times, words = each.memory_info().rss, each.cpu_times(), each.cmdline()
            except psutil.Error:
                continue
            seconds[each.pid] = times.user + times.system
            is_job = "espnet_kv.recipe.child" in words
            kind = "driver_MB" if each.pid == process.pid else "job_MB" if is_job else "worker_MB"
            peak[kind] = max(peak[kind], size / MB)
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"the recipe failed in {folder}")
    return {
        "wall_s": time.monotonic() - begun,
        "cpu_s": sum(seconds.values()),
        "driver_s": seconds.get(process.pid, 0.0),
        **peak,
    }


if __name__ == "__main__":
    main()
