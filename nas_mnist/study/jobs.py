"""The job of a trial that does what is known beforehand: a dict, with plain values and perhaps a candidate.

In a database it is JSON, in the form of the version that wrote it; here its candidate is read, so that two are compared
by what they do.
"""

from typing import Any

from optuna.trial import FrozenTrial

from nas_mnist.study.space import Candidate

JOB = "job"  # user attribute of the trial, written when it is queued, before any parameter is drawn

Job = dict[str, Any]


def job_of(trial: FrozenTrial) -> Job | None:
    """The job a trial stands for, whichever version queued it; None if it draws what it does."""
    job = trial.user_attrs.get(JOB)
    return job | {"candidate": Candidate.from_dict(job["candidate"])} if job and "candidate" in job else job


def attributes_of(job: Job) -> dict[str, Job]:
    """The user attributes of a trial that stands for this job; `job_of` is the way back."""
    return {JOB: job | {"candidate": job["candidate"].to_dict()} if "candidate" in job else job}
