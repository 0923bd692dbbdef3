"""The stages of a job, in the order in which a job goes through them."""

from enum import StrEnum


class Stage(StrEnum):
    """What a job is doing. Between ``loading`` and ``checking`` a job with several targets or rounds repeats stages."""

    STARTING = "starting"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    CALIBRATING = "calibrating"
    SCORING = "scoring"
    TRAINING = "training"
    EVALUATING = "evaluating"
    EXPORTING = "exporting"
    CHECKING = "checking"
    PUBLISHING = "publishing"
    DONE = "done"
