"""The stages of a job, in the order in which a job passes through them."""

from enum import StrEnum


class Stage(StrEnum):
    """The current activity of a job.

    A job with several target ratios or rounds repeats stages between `loading` and `checking`.
    """

    STARTING = "starting"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    CALIBRATING = "calibrating"
    SEARCHING = "searching"
    SCORING = "scoring"
    TRAINING = "training"
    EVALUATING = "evaluating"
    EXPORTING = "exporting"
    CHECKING = "checking"
    PUBLISHING = "publishing"
    DONE = "done"
