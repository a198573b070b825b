"""Networks of one package with weights of its own making, and their logits: what bench peers --convert compares.

python -I peer_nets.py NAME FOLDER     inside that package's environment

Writes NAME-MODEL-DEPTH.pt, a state_dict, and beside it .npz with x [n_users, n_items] and the logits or their softmax.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

N_ITEMS, LATENT = 50, 6
DEPTHS = {"one": [20], "two": [20, 10]}
# name, network, its logits of x
Case = tuple[str, nn.Module, Callable[[Tensor], Tensor]]


def recbole() -> Iterator[Case]:
    """Its models on a data set of its own, written for it."""
    from recbole.config import Config
    from recbole.data import create_dataset
    from recbole.model.general_recommender.multidae import MultiDAE
    from recbole.model.general_recommender.multivae import MultiVAE

    folder = Path("clicks")
    folder.mkdir()
    lines = [f"{n}\t{n}" for n in range(1, N_ITEMS)]  # and its padding
    Path(folder, "clicks.inter").write_text("user_id:token\titem_id:token\n" + "\n".join(lines))
    for depth, hidden in DEPTHS.items():
        for make, latent in ((MultiVAE, 2 * LATENT), (MultiDAE, LATENT)):
            settings = {
                "data_path": ".", "use_gpu": False, "show_progress": False,
                "load_col": {"inter": ["user_id", "item_id"]}, "eval_args": {"split": {"RS": [1.0]}},
                "mlp_hidden_size": hidden, "latent_dimension": latent,
            }  # fmt: skip
            config = Config(model=make.__name__, dataset="clicks", config_dict=settings)
            net = make(config, create_dataset(config).build()[0])
            is_vae = make is MultiVAE
            yield (
                f"{make.__name__}-{depth}", net, lambda x, net=net, v=is_vae: net(x)[0] if v else net(x)
            )  # fmt: skip


def cornac() -> Iterator[Case]:
    """VAECF's network, by either activation that ours have; it gives a softmax."""
    from cornac.models.vaecf.vaecf import VAE

    for depth, hidden in DEPTHS.items():
        for act in ("tanh", "relu"):
            net = VAE(LATENT, [N_ITEMS, *hidden], act, "mult")
            yield f"VAECF {act}-{depth}", net, lambda x, net=net: net.decode(net.encode(x)[0])


def rectorch() -> Iterator[Case]:
    """Its two networks."""
    from rectorch.nets import MultiDAE_net, MultiVAE_net

    for depth, hidden in DEPTHS.items():
        dims = [LATENT, *hidden[::-1], N_ITEMS]
        vae, dae = MultiVAE_net(dims), MultiDAE_net(dims)
        yield f"MultiVAE-{depth}", vae, lambda x, net=vae: net(x)[0]
        yield f"MultiDAE-{depth}", dae, lambda x, net=dae: net(x)


def recpack() -> Iterator[Case]:
    """MultVAE's network, which has one hidden layer."""
    from recpack.algorithms.mult_vae import MultiVAETorch

    net = MultiVAETorch(N_ITEMS, DEPTHS["one"][0], LATENT)
    yield "MultVAE-one", net, lambda x: net(x)[0]


PACKAGES = {f.__name__: f for f in (recbole, cornac, rectorch, recpack)}


def main(name: str, folder: str) -> None:
    """Write every case's weights and logits."""
    sys.argv = sys.argv[:1]  # RecBole reads it
    torch.manual_seed(0)
    for case, net, logits in PACKAGES[name]():
        net.eval()
        x = (torch.rand(20, N_ITEMS) < 0.2).float()
        if name == "recbole":
            x[:, 0] = 0
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_(std=0.5)
            result = logits(x)
        torch.save(net.state_dict(), Path(folder, f"{case}.pt"))
        np.savez(Path(folder, f"{case}.npz"), x=x.numpy(), logits=result.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
