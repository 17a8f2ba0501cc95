"""ONNX Runtime in a separate process, which reads commands line by line: see `bench.baselines.OnnxCall`.

``python -m bench.onnx_worker FOLDER SETS THREADS`` loads FOLDER/model.onnx and the inputs beside it. It answers
each line: ``ready``; ``output N`` writes FOLDER/output.npy; ``time REPEATS FIRST`` answers seconds per run.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime


def main() -> None:
    """Serve until the input ends."""
    folder, sets, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Its threads spin within a run, but not on into the turns of others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    feeds = [{name: np.load(folder / f"input{number}.npy")} for number in range(sets)]
    for line in sys.stdin:
        task, *numbers = line.split()
        if task == "output":
            np.save(folder / "output.npy", session.run(None, feeds[int(numbers[0])])[0])
        elif task == "time":
            repeats, first = map(int, numbers)
            begin = time.perf_counter()
            for number in range(first, first + repeats):
                session.run(None, feeds[number % sets])
            print((time.perf_counter() - begin) / repeats, flush=True)
            continue
        print("done", flush=True)


if __name__ == "__main__":
    main()
