"""A process that labels made-up latents, to be killed: python llm_worker_process.py URL FOLDER N_LATENTS."""

import json
import sys
from pathlib import Path

from pipelines.labels.llm.budget import Budget
from pipelines.labels.llm.questions import Passage
from pipelines.labels.llm.settings import BudgetConfig, EndpointConfig, LLMConfig
from pipelines.labels.llm.worker import Task, Worker


def tasks(n: int) -> list[Task]:
    """Latents with made-up texts."""

    def window(latent: int, i: int, marked: tuple[int, ...] = ()) -> Passage:
        return Passage((f"latent {latent}", " window", f" {i}"), marked)

    return [
        Task(
            latent,
            None,
            tuple(window(latent, i, (1,)) for i in range(3)),
            (),
            tuple(window(latent, 10 + i) for i in range(6)),
            tuple(window(latent, 20 + i, (2,)) for i in range(4)),
            tuple(window(latent, 30 + i) for i in range(4)),
        )
        for latent in range(n)
    ]


def config(url: str | None, **settings) -> LLMConfig:
    endpoint = EndpointConfig(base_url=url, model="m", concurrency=2, timeout_s=120, max_tokens=60)
    return LLMConfig(explainer=endpoint, windows_per_call=4, **settings)


def main() -> None:
    url, folder, n = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    with Worker(config(url), folder) as worker:
        for outcome in worker.run(tasks(n), Budget(BudgetConfig())):
            print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
