"""One dictionary on one model gives equal latents, and edits with equal effect, whichever library holds the model."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    python = ROOT / ".venv-peers" / "bin" / "python"
    if not python.exists():
        pytest.skip("needs transformer_lens and nnsight in .venv-peers; `make peers` builds it")
    done = subprocess.run(
        [str(python), str(Path(__file__).with_name("attach_peers.py"))],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("library", ["nnsight", "hooked", "bridge"])
def test_latents_and_edits_equal_those_on_the_hugging_face_model(
    answer: dict[str, Any], kind: str, library: str
) -> None:
    assert answer[f"{kind}.n_active"] > 10
    assert answer[f"{kind}.edit moves"] > 0.1
    differences = answer[f"{kind}.{library}"]
    if isinstance(differences, str):
        pytest.skip(f"{library} cannot hold this model here: {differences}")
    assert len(differences) == 9
    assert all(difference < 2e-5 for difference in differences.values()), differences
