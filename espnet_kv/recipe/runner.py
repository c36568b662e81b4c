"""Running the unfinished steps of a stage; their jobs run in parallel."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from espnet_kv.errors import UserError
from espnet_kv.files import locked
from espnet_kv.recipe.jobs import Job, run_jobs
from espnet_kv.recipe.steps import State, Step, Steps


def run_steps(steps: Sequence[Step], judge: Steps, parallel: int, command: str) -> None:
    """Run the unfinished steps of one stage.

    Args:
        steps: steps of the stage; dependencies come first.
        parallel: number of parallel jobs.
        command: the recipe's command line, for messages.

    Raises:
        UserError: an earlier step is not done, a precious output would be overwritten, another run
            is writing an output, or the work failed.
    """
    waiting = list(steps)
    while waiting:
        # steps of a stage that do not depend on each other run in parallel
        wave = [s for s in waiting if not any(u in waiting for u in s.after)]
        waiting = [s for s in waiting if s not in wave]
        _run_wave([s for s in wave if _has_to_run(s, judge)], judge, parallel, command)


def _has_to_run(step: Step, judge: Steps) -> bool:
    state = judge.state(step)
    if state.kind == "skipped":
        print(f"  {step.name}: skipped ({state.reason})", flush=True)
    elif _is_refused(step, state):
        raise UserError(refusal(step, state.reason))
    elif state.kind == "done" or (state.kind == "given" and step.keep_given):
        print(f"  {step.stamp_file.parent} is up to date", flush=True)
    else:
        step.ready()
        _check_before(step, judge)
        if state.reason not in ("not made yet", "always done"):
            print(f"  {step.name}: {state.reason}", flush=True)
        return True
    return False


def _is_refused(step: Step, state: State) -> bool:
    """Whether running `step` would overwrite a precious output."""
    return state.kind == "refused" or (state.kind == "given" and step.precious)


def refusal(step: Step, reason: str) -> str:
    """The message that a precious output would be overwritten, and how to avoid it."""
    remedy = f", or {step.remedy}" if step.remedy else ""
    return (
        f"{step.output} was made from other inputs ({reason}): "
        f"give the options it was made with, remove it{remedy}"
    )


def _check_before(step: Step, judge: Steps) -> None:
    for before in step.after:
        state = judge.state(before)
        if state.kind == "refused":
            raise UserError(refusal(before, state.reason))
        if state.kind == "todo" and not before.always:
            raise UserError(
                f"{step.name} needs {before.name}, which is not done ({state.reason}): "
                f"run stage {before.stage} first (--stage {before.stage})"
            )


def _run_wave(steps: Sequence[Step], judge: Steps, parallel: int, command: str) -> None:
    with ExitStack() as locks:
        for output in dict.fromkeys(step.output for step in steps):
            short = all(step.always for step in steps if step.output == output)
            locks.enter_context(locked(output, command, wait=short))
        jobs: list[Job] = []
        for step in steps:
            judge.begin(step)
            own = list(step.jobs())
            finish = _Finish(step, judge, len(own))
            for job in own:
                job.after = finish.job_ended
            if not own:
                finish()
            jobs += own
        run_jobs(jobs, parallel)


class _Finish:
    """Builds and stamps a step after all of its jobs have succeeded."""

    def __init__(self, step: Step, judge: Steps, jobs: int) -> None:
        self._step, self._judge, self._jobs = step, judge, jobs

    def job_ended(self) -> None:
        self._jobs -= 1
        if self._jobs == 0:
            self()

    def __call__(self) -> None:
        self._step.build()
        self._judge.end(self._step)


def forecast(steps: Sequence[Step], judge: Steps, stages: range) -> Iterator[tuple[Step, str]]:
    """State what a run of `stages` would do, without running it.

    Yields:
        A step and "up to date", "would run: REASON", "would be refused: REASON", "skipped: REASON"
        or "cannot run: REASON".
    """
    for step in steps:
        if step.stage not in stages:
            continue
        state = judge.state(step)
        missing = [
            before
            for before in step.after
            if before.stage not in stages
            and not before.always
            and judge.state(before).kind in ("todo", "refused")
        ]
        if state.kind == "skipped":
            yield step, f"skipped: {state.reason}"
        elif _is_refused(step, state):
            yield step, f"would be refused: {state.reason}"
        elif state.kind == "done" or (state.kind == "given" and step.keep_given):
            yield step, "up to date"
        elif missing:
            yield step, f"cannot run: {missing[0].name} (stage {missing[0].stage}) is not done"
        else:
            yield step, f"would run: {state.reason}"
