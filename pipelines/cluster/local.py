"""One Ray session for a run: joined by address, or started on this machine and always shut down."""

import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.config import RayConfig
from pipelines.errors import RunError, UsageError

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_TEMPORARY = Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())
"""Short, because Ray's sockets stand below it and their paths are limited to about a hundred characters."""
_SCRATCH = _TEMPORARY / f"sae-ray-{os.getpid()}-{secrets.token_hex(4)}"
"""Ray's files of this process; not in Ray's shared folder, so that a finished run leaves nothing behind."""


@contextmanager
def ray_scope() -> Iterator[None]:
    """Shuts down, at the end of the block and also when it fails, the Ray that `start_ray` started inside it."""
    began_outside = _is_running()
    try:
        yield
    finally:
        if not began_outside and _is_running():
            sys.modules["ray"].shutdown()
            shutil.rmtree(_SCRATCH, ignore_errors=True)


def _sweep_killed_sessions() -> None:
    """Remove what the Rays of killed drivers left behind."""
    for folder in _TEMPORARY.glob("sae-ray-*-*"):
        try:
            os.kill(int(folder.name.split("-")[2]), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):
            continue  # not ours


def _is_running() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def require_cpus(config: RayConfig, n_cpus: float, keys: str) -> None:
    """Refuse work that a Ray on this machine could never place; a cluster may still grow.

    Raises:
        UsageError: `n_cpus`, which the config's `keys` ask for at once, are more than there are.
    """
    if config.address is None and n_cpus > (available := config.num_cpus or os.cpu_count() or 1):
        raise UsageError(
            f"{keys} ask for {n_cpus:g} CPUs, the local Ray has {available}: lower them, or raise ray.num_cpus"
        )


def start_ray(config: RayConfig) -> None:
    """Make Ray ready for actors and training; does nothing when it already is. Call it inside a `ray_scope`.

    A local session gets explicit CPUs and object store, a token of this process's own (so that no other user of the
    machine can submit work to it), no dashboard, and no usage reports.

    Raises:
        RunError: Ray cannot be started or reached, or was imported too early to learn of the token.
    """
    if _is_running():
        return
    # Before the import: Ray reads these once. `setdefault` leaves a cluster's own settings alone.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "180")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if config.address is None and os.environ.get("RAY_AUTH_MODE") != "token":
        if "ray" in sys.modules:
            raise RunError(
                "ray was imported before the run, too early to protect its session with a token: start the run before "
                "`import ray`, or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN before Python starts"
            )
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if config.address is None:
        _sweep_killed_sessions()
    import ray
    import torch

    # Workers import the very packages that the driver runs.
    runtime_env = {
        "env_vars": {"PYTHONPATH": os.pathsep.join([str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    }
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
                _temp_dir=str(_SCRATCH),
            )
        else:
            ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = config.address or "this machine"
        raise RunError(f"Ray could not be started or reached at {where}: {error}") from error
