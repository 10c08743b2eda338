"""Errors that the command line turns into one sentence and an exit code.

    PipelineError
    ├── UsageError   the request cannot be right (config, hook, concept, path): exit code 2
    ├── RunError     the request is right, the work failed or is incomplete: exit code 1
    └── StoppedError the work was asked to stop, by SIGTERM, and saved: exit code 143, as of a process that it ends

`storage.errors.StorageError` counts as a failure (1), except a store made with another config, which is bad usage (2).
"""


class PipelineError(Exception):
    """Base of the errors that are shown without a traceback."""

    exit_code = 1


class UsageError(PipelineError, ValueError):
    """The caller's mistake: the message says what was received and what to change."""

    exit_code = 2


class RunError(PipelineError, RuntimeError):
    """A stage failed or has not run yet: the message says which, and the command that mends it."""

    exit_code = 1


class StoppedError(PipelineError, RuntimeError):
    """A stage saved its state and ended because it was asked to: the message says where it goes on from."""

    exit_code = 143
