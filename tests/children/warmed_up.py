"""Compiles a training's kernels without a GPU, then makes its steps; prints what the steps still had to compile.

Arguments: the precision, and --counts for clicks with values.
"""

import json
import sys
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from bench.host import nothing_launched
from fastvae import Clicks, MultiVAE
from fastvae.synthetic import synthetic_clicks
from fastvae.trainer import Settings, Trainer
from fastvae.warmup import warm_up

precision, counts = sys.argv[1], "--counts" in sys.argv
P_DIMS, SIZES = [4, 8, 129], [6, 5, 1]
clicks = synthetic_clicks(sum(SIZES), P_DIMS[-1], 60)
if counts:
    clicks = Clicks(clicks.indptr, clicks.indices, torch.full((clicks.nnz,), 2.0), P_DIMS[-1])

with torch.device("meta"):
    twin = MultiVAE(P_DIMS)
n_kernels = warm_up(twin, SIZES, precision=precision, counts=counts, capability=90)

late = []
compile_now = JITFunction._do_compile


def noted(kernel, *arguments):
    late.append(kernel.__name__)
    return compile_now(kernel, *arguments)


torch.manual_seed(0)
trainer = Trainer(
    MultiVAE(P_DIMS), clicks, None, Settings(6, 1e-3, 0.2, 0, False, precision, 0), None, False
)
trainer.model.train()
with mock.patch.object(JITFunction, "_do_compile", noted), nothing_launched():
    for ids in torch.randperm(sum(SIZES)).split(SIZES) * 2:
        trainer.step._compute(clicks.rows(ids))
    trainer.model.eval()
    with torch.no_grad():
        trainer.model(clicks.rows(torch.arange(6)))
print(json.dumps({"warm": n_kernels, "late": late}))
