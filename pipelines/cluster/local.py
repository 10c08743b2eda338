"""One Ray session for a run: joined by address, or started on this machine and always shut down."""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.config import RayConfig
from pipelines.errors import RunError

PACKAGE_ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Ray, ready for actors and training; shut down at the end even when the block fails.

    A local session gets explicit CPUs and object store, a fresh token (so that no other user of the machine can submit work
    to it), no dashboard, and no usage reports.
    """
    # Before the import: Ray reads these once. `setdefault` leaves a cluster's own settings alone.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "180")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if config.address is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray
    import torch

    if ray.is_initialized():
        yield
        return
    # Workers import the very packages that the driver runs.
    runtime_env = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}}
    try:
        if config.address is None:
            ray.init(
                address="local",
                num_cpus=config.num_cpus or os.cpu_count(),
                num_gpus=torch.cuda.device_count() if config.num_gpus is None else config.num_gpus,
                object_store_memory=config.object_store_memory_mb * 2**20,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=runtime_env,
            )
        else:
            ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = config.address or "this machine"
        raise RunError(f"Ray could not be started or reached at {where}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
