"""train.py with the tiny networks, as one of several processes with --compile, without a C++ compiler's time.

What several processes change is the graphs: inside DistributedDataParallel the compiler cuts them where a bucket of
gradients is full, so that buckets leave while the backward pass goes on. Buckets are made small enough for that here.
What is made of each graph is left to torch's own kernels; one process shows that with generated ones.
"""

import json
from functools import partialmethod

import torch
from torch.nn.parallel import DistributedDataParallel

import train
from detection.models import FasterRCNN
from detection.process_exit import leave
from tests.engine.tiny_model import make_known


def main() -> int:
    torch.set_num_threads(1)
    make_known()
    FasterRCNN.compile_dense_parts = partialmethod(FasterRCNN.compile_dense_parts, backend="aot_eager")  # type: ignore[method-assign, assignment]
    DistributedDataParallel.__init__ = partialmethod(DistributedDataParallel.__init__, bucket_cap_mb=1)  # type: ignore[method-assign, assignment]
    status = train.main()
    counters = torch._dynamo.utils.counters
    print(json.dumps({"traced": counters["stats"]["unique_graphs"], "parts": counters["aot_autograd"]["total"]}))
    return status


if __name__ == "__main__":
    leave(main())
