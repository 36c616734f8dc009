"""All benchmarks that need a GPU, from scratch: the kernels' tests first, then every result file of this folder.

    python benchmarks/run_all.py --models models --data data --gpus 0 1

``--models`` has the transformers directories SmolLM2-135M and all-MiniLM-L6-v2, ``--data`` what
``quality/prepare.py`` wrote, as ``quality`` and ``quality/imdb``, and the tasks of GLUE in their official layout, as
``glue``. Every GPU takes one job after the other, in the order below; speed is timed on GPUs that do nothing else, but
their host is shared. A job that ends early leaves what it has in its result file, whose other rows stay: call again
with ``--only``. Logs are in ``--logs``.
"""

import argparse
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

from measure import ROOT

HERE = ROOT / "benchmarks"


def jobs(models: Path, data: Path) -> dict[str, list[str]]:
    """Name to command, without Python, of every job, in order: first what says whether numbers mean anything."""
    inputs = ["--model", f"{models}/SmolLM2-135M", "--text", f"{data}/quality/validation.tokens"]
    language = [f"{HERE}/quality/lm_perplexity.py", "--model", f"{models}/SmolLM2-135M", "--text", f"{data}/quality"]
    classes = [f"{HERE}/quality/glue.py", "--model", f"{models}/all-MiniLM-L6-v2", "--glue", f"{data}/glue"]
    classes += ["--imdb", f"{data}/quality/imdb", "--output", _result("glue"), "--parallel", "8"]
    return {
        "tests": ["-m", "pytest", "-q", f"{ROOT}/tests/kernels", f"{ROOT}/tests/attention"],
        "attention_forward": [f"{HERE}/attention_forward.py", *inputs],
        "distillation_step": [f"{HERE}/distillation_step.py", *inputs],
        "prefill": [f"{HERE}/prefill.py"],
        "lm_perplexity": [*language, "--output", _result("lm_perplexity"), "--parallel", "2"],
        "ablations": [*language, *_tuning("ablations"), "--parallel", "2"],
        "rising_k": [*language, *_tuning("rising_k"), "--split", "validation", "--parallel", "2"],
        "designs": [*language, *_tuning("designs"), "--split", "validation", "--parallel", "2"],
        "glue": classes,
    }


def _result(name: str) -> str:
    return f"{HERE}/results/{name}.json"


def _tuning(name: str) -> list[str]:
    return ["--config", f"{HERE}/quality/{name}.yaml", "--output", _result(name)]


def work(waiting: "queue.SimpleQueue[tuple[str, list[str]]]", gpu: str, logs: Path, failed: list[str]) -> None:
    """Do jobs on one GPU until none is left."""
    while True:
        try:
            name, command = waiting.get_nowait()
        except queue.Empty:
            return
        begin = time.perf_counter()
        print(f"{name} on GPU {gpu}, {logs / name}.log", flush=True)
        with (logs / f"{name}.log").open("w") as log:
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
            run = [sys.executable, *command]
            code = subprocess.run(run, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
        print(f"{name}: {'done' if code == 0 else 'FAILED'} in {time.perf_counter() - begin:.0f} s", flush=True)
        if code:
            failed.append(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "models")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--gpus", nargs="+", default=["0"], help="as CUDA_VISIBLE_DEVICES names them")
    parser.add_argument("--logs", type=Path, default=ROOT / "logs/benchmarks")
    parser.add_argument("--only", nargs="+", choices=jobs(Path(), Path()), help="jobs, default all")
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    waiting: queue.SimpleQueue[tuple[str, list[str]]] = queue.SimpleQueue()
    for name, command in jobs(args.models, args.data).items():
        if args.only is None or name in args.only:
            waiting.put((name, command))
    failed: list[str] = []
    threads = [threading.Thread(target=work, args=(waiting, gpu, args.logs, failed)) for gpu in args.gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
