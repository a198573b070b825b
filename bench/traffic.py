"""What several processes send one another in a training step, and what each holds, by formula: nothing here is measured.

bench scale counts the bytes and compares; bench report writes the table of docs/distributed.md. fp32, widths
[latent, hidden, n_items] as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

# bytes a second of each process: NCCL's bus bandwidth of an all_reduce over NVLink (H100), and of 100 Gb/s Ethernet
LINKS = {"NVLink": 480e9, "Ethernet": 11e9}
SHAPES = ((20_000, 500), (20_000, 24_576), (1_000_000, 1_024), (10_000_000, 1_024))  # items, batch
SIZES = (2, 4, 8)  # processes


@dataclass(frozen=True)
class Model:
    """Sizes of a MultiVAE and of its batch, which all processes share."""

    n_items: int
    batch_size: int
    hidden: int = 600
    latent: int = 200

    def item_numbers(self) -> int:
        """Weights with a row or a column for each item."""
        return self.n_items * (2 * self.hidden + 1)

    def small_numbers(self) -> int:
        """All other weights."""
        h, latent = self.hidden, self.latent
        return h + (h + 1) * 2 * latent + (latent + 1) * h

    def sent(self, cut: str) -> int:
        """Bytes that a process gives to all_reduce in a step."""
        if cut == "users":
            # each gradient; the two sums of nll and kld in fp64
            return 4 * (self.item_numbers() + self.small_numbers()) + 16
        # the first layer and the gradient of the last hidden one; k, S and T of each user
        return 2 * 4 * self.batch_size * self.hidden + 12 * self.batch_size

    def held(self, cut: str, size: int) -> int:
        """Bytes of a process between two steps and in them: weights, gradients, two moments, and the buffer [users, items]."""
        buffer = 4 * self.batch_size * self.n_items / size
        share = size if cut == "items" else 1
        return round(16 * (self.item_numbers() / share + self.small_numbers()) + buffer)


def ring_ms(n_bytes: int, size: int, bytes_per_second: float) -> float:
    """Milliseconds of an all_reduce by a ring, in which each process sends and receives 2 (P - 1) / P of the bytes."""
    return 2 * (size - 1) / size * n_bytes / bytes_per_second * 1e3


def table() -> str:
    """Bytes and milliseconds of the collectives of a step, and bytes held, for both cuts."""
    names = " / ".join(LINKS)
    cells = [
        f"{cut}: {what}" for cut in ("users", "items") for what in ("sent", f"ms {names}", "held")
    ]
    lines = ["| items | batch | processes | " + " | ".join(cells) + " |"]
    lines.append("| --: | --: | --: |" + " --: |" * len(cells))
    for n_items, batch_size in SHAPES:
        model = Model(n_items, batch_size)
        for size in SIZES:
            lines.append(f"| {n_items:,} | {batch_size:,} | {size} | {_both(model, size)} |")
    links = ", ".join(f"{name} {rate / 1e9:.0f} GB/s" for name, rate in LINKS.items())
    lines += [
        "",
        "Computed from the formulas of bench/traffic.py, not measured: fp32, 600 hidden and 200 latent units. Milliseconds are those",
        f"of a ring over {links} a process, without its latency (four collectives a step by items,",
        "one for some 25 MB of gradients by users), and with nothing going on beside it. Held: weights, gradients, moments and one",
        "[users, items] buffer of each process.",
    ]
    return "\n".join(lines)


def _both(model: Model, size: int) -> str:
    cells = []
    for cut in ("users", "items"):
        sent = model.sent(cut)
        times = " / ".join(_short(ring_ms(sent, size, rate)) for rate in LINKS.values())
        cells += [_bytes(sent), times, _bytes(model.held(cut, size))]
    return " | ".join(cells)


def _bytes(n: float) -> str:
    return f"{_short(n / 1e9)} GB" if n >= 1e9 else f"{_short(n / 1e6)} MB"


def _short(x: float) -> str:
    """Three digits at most before a comma."""
    if x >= 100:
        return f"{x:,.0f}"
    return f"{x:.1f}" if x >= 1 else f"{x:.2f}"
