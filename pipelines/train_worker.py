"""One rank of a training job: each batch goes to every SAE in turn, and they are saved at the same steps.

Knows no Ray: `pipelines.train` runs it under Ray Train, and a test may call it inline.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.training.batches import Batches, of_member
from pipelines.training.calibration import starting_sample
from pipelines.training.heldout import HELDOUT_TOKENS, Heldout, Splicing
from pipelines.training.interruption import Interrupted
from pipelines.training.job import MemberJob, TrainJob
from pipelines.training.member import Evaluate, Member
from pipelines.training.metrics import METRICS_FILE, last_line
from sae.parallel import Group
from sae.trainer import DivergedError, folded
from storage import ActivationStore


def train_worker(
    job: TrainJob,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, Any]]:
    """Train the SAEs of a job on this rank, or its share of them, and save checkpoints and dictionaries.

    Args:
        interrupted: asked after each step; once true on any rank, everything is saved and training ends.
    Returns: the last step's figures of each SAE that this rank trains.
    Raises:
        DivergedError: an SAE diverged, after the others were finished; the message names its last good checkpoint.
        ValueError: a batch cannot be used; every SAE is saved as it was before.
        Interrupted: see `interrupted`.
    """
    torch.set_num_threads(job.n_threads)
    store = ActivationStore.open(job.store, tail=job.consumer is not None)
    layout = job.config.layout
    own = job.members[rank::world_size] if layout == "saes" else job.members
    samples = {
        hooks: starting_sample(store, hooks, job.sinks, job.selection)
        for hooks in dict.fromkeys(member.hooks for member in own)
    }
    writes = layout == "saes" or rank == 0
    evaluate = _evaluations(job, own, store) if writes else {}
    members = [
        Member(each, job, store, samples[each.hooks], evaluate=evaluate.get(each.hooks), writes=writes, device=device)
        for each in own
    ]
    del samples
    group = Group()
    try:
        start = min((member.step for member in members), default=job.n_steps)
        start = int(torch.stack(group.gather(torch.tensor(start))).min())
        if start < job.n_steps:
            reader = (rank, world_size) if layout == "data" else (0, 1)  # a share of each batch, or the whole
            batches = Batches(job, own, store, start, rank=reader[0], world_size=reader[1], device=device)
            _train(job, members, batches, start, interrupted, group)
        for member in members:
            if member.failure is None:
                member.finish()
    finally:
        for member in members:
            member.close()
    failures = {member.job.name: member.failure for member in members if member.failure is not None}
    if failures:
        raise DivergedError(_named(job, failures))
    return {member.job.name: last_line(Path(member.job.checkpoints) / METRICS_FILE) for member in members}


def _train(
    job: TrainJob,
    members: list[Member],
    batches: Batches,
    start: int,
    interrupted: Callable[[], bool],
    group: Group,
) -> None:
    """Every member from its own step to the end. One that was saved later than the others waits for them.

    A member that diverges is stopped; the others go on.
    """
    for step, batch in enumerate(batches, start + 1):
        active = [member for member in members if member.failure is None and member.step == step - 1]
        for member in active:
            try:
                member.train_on(of_member(batch, member.job), batches.expected_same_context(member.job))
            except DivergedError as error:
                member.stop(error)
            except ValueError as error:  # the batch cannot be used, the weights can
                raise ValueError(f"{error} {_saved(job, members)}") from error
        going_on = sum(member.failure is None for member in members)
        n_asked, n_going_on = group.sum(torch.tensor([int(interrupted()), going_on])).tolist()
        if n_asked or step % job.config.checkpoint_every == 0 or step == job.n_steps:
            for member in active:
                if member.failure is None:
                    member.save()
            batches.saved(step, group)
        if n_going_on == 0:
            return
        if n_asked:
            raise Interrupted(f"stopped after step {step} of {job.n_steps}, which is saved")
        if step == job.n_steps:
            return
    raise ValueError(
        f"Training needs {job.n_steps} batches, but they ended after step {max(m.step for m in members)}. "
        "Collect more tokens, or lower train.n_tokens."
    )


def _evaluations(
    job: TrainJob, members: Sequence[MemberJob], store: ActivationStore
) -> dict[tuple[str, ...], Evaluate]:
    """Held-out figures of an SAE in training, by the hooks that it reads."""
    if not job.evaluate_every:
        return {}
    splicing = None
    if job.model is not None:
        splicing = Splicing(store, job.model, job.sinks, job.selection, job.config.evaluate_ce_tokens)

    def of(hooks: tuple[str, ...]) -> Evaluate:
        sample = Heldout(store, hooks, job.sinks, job.selection, HELDOUT_TOKENS)
        return lambda sae, normalisers: (
            sample.figures(sae, normalisers) | (splicing.figures(folded(sae, normalisers), hooks) if splicing else {})
        )

    return {hooks: of(hooks) for hooks in dict.fromkeys(member.hooks for member in members)}


def _saved(job: TrainJob, members: list[Member]) -> str:
    """Save every member where it stands; says where."""
    for member in members:
        if member.step > 0 and member.failure is None:
            member.save()
    return _named(job, {member.job.name: member.last_good() for member in members})


def _named(job: TrainJob, told: dict[str, str]) -> str:
    """What there is to say of each SAE, with its name if the job has several."""
    return " ".join(text if len(job.members) == 1 else f"{name}: {text}" for name, text in told.items())
