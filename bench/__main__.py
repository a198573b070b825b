"""python -m bench COMMAND [options]; each command is the module of this folder with its name."""

import importlib
import sys

COMMANDS = {
    "ratio": "training steps of fastvae and of the usual ways, side by side",
    "gpu": "on a GPU: its tests, profile, step times, quality and tile search, within five minutes",
    "tune": "search the launch configurations on a GPU and print the table",
    "report": "write the tables of README.md and docs/measured.md from bench/results",
    "profile": "where a training step spends its time: on a GPU by kernel, on a CPU by operator",
    "memory": "peak memory of training steps by number of items",
    "scale": "steps, bytes and memory of 1, 2 and 4 processes on a CPU, by users and by items",
    "imports": "what `import fastvae` costs beside `import torch`",
    "quality": "NDCG@100 on real data beside the dense reference, and memory; needs FASTVAE_DATA",
    "peers": "epochs of other packages' Mult-VAE, each in an environment of its own; needs FASTVAE_DATA",
    "recbole": "MultiVAE in RecBole's trainer, its own and ours; needs the extra recbole",
    "warm_start": "a training that begins with an older run, beside one from scratch; needs FASTVAE_DATA",
    "dropin": "epochs of public training loops with our class in their model's place",
    "launches": "the launches of one captured training step, by name; needs no GPU",
    "host": "what an eager step costs its host, beside the dense model's; needs no GPU",
    "resources": "registers, shared memory and instructions of every compiled kernel; needs no GPU",
}


def main() -> None:
    """Run the command named by the first argument."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        lines = [f"  {name:12}{text}" for name, text in COMMANDS.items()]
        sys.exit("\n".join(["usage: python -m bench COMMAND [options]", *lines]))
    importlib.import_module(f"bench.{command}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
