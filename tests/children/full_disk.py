"""Writes a dataset folder or recommendations where no file may be larger than 2,000 bytes; prints the error."""

import resource
import signal
import sys

import torch
from data_helpers import small_dataset

from fastvae.export import write_recommendations
from fastvae.recommend import Recommendations

path = sys.argv[1]
dataset, n_users = small_dataset(), 1000
found = Recommendations(torch.arange(5).repeat(n_users, 1), torch.rand(n_users, 5), list("abcde"))
if path.endswith("parquet"):
    import polars  # noqa: F401
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    if path.endswith("data"):
        dataset.save(path)
    else:
        write_recommendations(path, range(n_users), found)
except OSError as error:
    print(error)
