"""train.py with the tiny networks, as one of several processes with --compile, without a C++ compiler's time.

What several processes change is the graphs: the compiler cuts them after each stage of the backbone, so that gradients
leave while the backward pass runs. What is made of each graph is left to torch's own kernels; one process shows that
with generated ones.
"""

import json
from functools import partialmethod

import torch

import train
from detection.models import FasterRCNN
from detection.process_exit import leave
from tests.engine.tiny_model import make_known


def main() -> int:
    torch.set_num_threads(1)
    make_known()
    FasterRCNN.compile_dense_parts = partialmethod(FasterRCNN.compile_dense_parts, backend="aot_eager")  # type: ignore[method-assign, assignment]
    status = train.main()
    print(json.dumps({"traced": torch._dynamo.utils.counters["stats"]["unique_graphs"]}))
    return status


if __name__ == "__main__":
    leave(main())
