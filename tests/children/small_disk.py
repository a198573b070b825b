"""Writes a checkpoint to the path given where no file may be larger than 100,000 bytes; prints the error."""

import resource
import signal
import sys

from fastvae import MultiVAE
from fastvae.checkpoint import write_checkpoint

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_checkpoint(sys.argv[1], MultiVAE([10, 10_000]))
except OSError as error:
    print(error)
