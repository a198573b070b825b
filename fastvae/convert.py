"""Weights of other Mult-VAE code as ours: a row per source says what it calls its layers and what it computes with them.

A source is recognised by its keys alone: all of them must be there, and no other. What keys do not say (a quirk of the
forward, an activation that was chosen) is an argument of load_model.
"""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ._checks import first_of
from .models import MultiDAE, MultiVAE


@dataclass(frozen=True)
class Layers:
    """Consecutive layers by their keys: {n} counts from first by step, {next} is n + 1; without {n} it is one layer."""

    weight: str
    bias: str
    first: int = 0
    step: int = 1

    def keys_in(self, weights: Mapping[str, Tensor]) -> list[tuple[str, str]]:
        """The keys of weight and bias of each layer that is there, in order."""
        found: list[tuple[str, str]] = []
        n = self.first
        while (key := self.weight.format(n=n, next=n + 1)) in weights:
            found.append((key, self.bias.format(n=n, next=n + 1)))
            if "{" not in self.weight:
                break
            n += self.step
        return found


def _layers(key: str, first: int = 0, step: int = 1) -> Layers:
    return Layers(f"{key}.weight", f"{key}.bias", first, step)


@dataclass(frozen=True)
class Source:
    """A code base's Mult-VAE or Mult-DAE; whether it has two heads is seen by the widths.

    encoder  its layers from the items on
    decoder  its layers from the latent on; none: the encoder's go on to the items
    heads    the layers of mu and of logvar, where they are two
    copies   keys that hold a second time what others hold
    in_out   weights are [in, out], not [out, in]
    padding  items in front that stand for none
    """

    name: str
    encoder: tuple[Layers, ...]
    decoder: tuple[Layers, ...] = ()
    heads: tuple[Layers, ...] = ()
    copies: tuple[Layers, ...] = ()
    in_out: bool = False
    padding: int = 0
    normalize_input: bool = True
    activation: str = "tanh"
    # what the keys do not say
    ask: str = ""


SOURCES = (
    Source(
        "fastvae or RecoTour",
        (_layers("encode.q_layers.linear_{n}"),), (_layers("decode.p_layers.linear_{n}"),),
        ask="RecoTour's own forward needs tanh_after_dropout=True",
    ),
    Source("vae-cf-pytorch", (_layers("q_layers.{n}"),), (_layers("p_layers.{n}"),)),
    Source("vae-cf-pytorch", (_layers("layers.{n}"),)),
    Source("RecBole", (_layers("encoder.{n}", step=2),), (_layers("decoder.{n}", step=2),), padding=1),
    Source(
        "RecBole",
        (_layers("encoder.mlp_layers.{n}", first=1, step=3),), (_layers("decoder.{n}", step=2),), padding=1,
    ),
    Source("rectorch", (_layers("enc_layers.{n}"),), (_layers("dec_layers.{n}"),)),
    Source(
        "Cornac",
        (_layers("encoder.fc{n}"),), (_layers("decoder.fc{n}"),), heads=(_layers("enc_mu"), _layers("enc_logvar")),
        normalize_input=False, ask="where act_fn was relu, activation='relu'; no other than it and tanh has an equal here",
    ),
    Source(
        "WarpRec",
        (_layers("encoder.dense_proj.0"),), (_layers("decoder.dense_proj.0"), _layers("decoder.dense_output")),
        heads=(_layers("encoder.dense_mean"), _layers("encoder.dense_log_var")),
    ),
    Source(
        "WarpRec",
        (_layers("encoder.dense_proj.0"), _layers("encoder.dense_mean.0")),
        (_layers("decoder.dense_proj.0"), _layers("decoder.dense_output")),
    ),
    Source("RePlay", (_layers("encoder.{n}"),), (_layers("decoder.{n}"),), activation="relu"),
    Source(
        "RecPack",
        (_layers("q_in_hid_layer"), _layers("q_hid_bn_layer")),
        (_layers("p_bn_hid_layer"), _layers("p_hid_out_layer")),
        copies=(_layers("layers.{n}"),),
    ),
    Source(
        "the paper's TensorFlow code",
        (Layers("weight_q_{n}to{next}", "bias_q_{next}"),), (Layers("weight_p_{n}to{next}", "bias_p_{next}"),),
        in_out=True,
    ),
    Source("the paper's TensorFlow code", (Layers("weight_{n}to{next}", "bias_{next}"),), in_out=True),
)  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """A model on the meta device, the weights to load into it by its own keys, and where they are from."""

    source: Source
    model: MultiVAE | MultiDAE
    weights: dict[str, Tensor]

    def __str__(self) -> str:
        source, model = self.source, self.model
        widths = [*model.q_dims, *model.p_dims[1:]]
        text = f"{type(model).__name__} of {source.name}, widths {'-'.join(map(str, widths))}"
        differs = [f"activation {model.activation!r}"] * (model.activation != "tanh")
        differs += ["input not normalised"] * (not model.normalize_input)
        differs += ["its item 0, which is padding, is left out"] * bool(source.padding)
        differs += ["tanh after each dropout"] * model.tanh_after_dropout
        asked = model.tanh_after_dropout or model.activation != source.activation
        return "; ".join([text, *differs, *[source.ask] * (bool(source.ask) and not asked)])


def converted(
    weights: Mapping[str, Tensor],
    tanh_after_dropout: bool = False,
    activation: str | None = None,
    normalize_input: bool | None = None,
) -> Converted:
    """The model that a state_dict of one of the sources is of, whatever stands in front of all its keys.

    activation, normalize_input  None: as the source computes
    Raises: ValueError where the keys are of no source, or the shapes of no model.
    """
    source, encoder, decoder = _recognised(weights)
    if source.in_out:
        encoder, decoder = ([(w.t(), b) for w, b in part] for part in (encoder, decoder))
    if not source.decoder:
        cut = _latent_of(encoder)
        encoder, decoder = encoder[:cut], encoder[cut:]
    if source.padding:
        (first, bias), (last, last_bias) = encoder[0], decoder[-1]
        encoder[0] = first[:, source.padding :], bias
        decoder[-1] = last[source.padding :], last_bias[source.padding :]
    q_dims, p_dims = _widths(encoder), _widths(decoder)
    two_heads = q_dims[-1] == 2 * p_dims[0]
    if two_heads:
        q_dims[-1] //= 2
    with torch.device("meta"):  # no memory before the shapes have been compared
        model = (MultiVAE if two_heads else MultiDAE)(
            p_dims,
            q_dims=q_dims,
            tanh_after_dropout=tanh_after_dropout,
            normalize_input=source.normalize_input if normalize_input is None else normalize_input,
            activation=source.activation if activation is None else activation,
        )
    tensors = (tensor for layer in (*encoder, *decoder) for tensor in layer)
    return Converted(source, model, dict(zip(model.state_dict(), tensors, strict=True)))


Layer = tuple[Tensor, Tensor]


def _recognised(weights: Mapping[str, Tensor]) -> tuple[Source, list[Layer], list[Layer]]:
    # a counter that AveragedModel keeps beside its module
    weights = {key: value for key, value in weights.items() if key != "n_averaged"}
    for prefix in _prefixes(weights):
        names = {key.removeprefix(prefix): value for key, value in weights.items()}
        for source in SOURCES:
            layers = _take(source, names)
            if layers is not None:
                return source, *layers
    raise ValueError(_unlike(weights))


def _unlike(weights: Mapping[str, Tensor]) -> str:
    """What keeps keys from being a source's: those that one with most of them has not, or lacks."""
    prefix = list(_prefixes(weights))[-1]
    names = {key.removeprefix(p) for p in {"", prefix} for key in weights}
    known = [(source, _named(source, names)) for source in SOURCES]
    source, named = max(known, key=lambda row: len(row[1] & names))
    if len(named & names) < 2:
        sources = ", ".join(dict.fromkeys(source.name for source in SOURCES))
        return f"keys of none of {sources}, such as {first_of(weights)}"
    further = [key for key in weights if key not in named and key.removeprefix(prefix) not in named]
    if further:
        return f"keys of {source.name}, and further ones: {first_of(further)}"
    if missing := sorted(named - names):
        return f"keys of {source.name} without {first_of(missing)}"
    return f"keys of {source.name}, but not all of its layers, such as {first_of(weights)}"


def _named(source: Source, names: set[str]) -> set[str]:
    """The keys of a source's layers of which weight or bias is among the names."""
    rows = (*source.encoder, *source.decoder, *source.heads, *source.copies)
    named: set[str] = set()
    for layers in rows:
        for k in range(min(len(names), 100) if "{" in layers.weight else 1):
            n = layers.first + k * layers.step
            pair = {text.format(n=n, next=n + 1) for text in (layers.weight, layers.bias)}
            named |= pair if pair & names else set()
    return named


def _prefixes(keys: Mapping[str, Any]) -> Iterator[str]:
    """What all keys start with up to a dot, the empty text first: module., model., _orig_mod. in any nesting."""
    yield ""
    prefix = ""
    for part in next(iter(keys), "").split(".")[:8]:
        prefix += f"{part}."
        if not all(key.startswith(prefix) for key in keys):
            return
        yield prefix


def _take(source: Source, weights: Mapping[str, Tensor]) -> tuple[list[Layer], list[Layer]] | None:
    """The encoder's and the decoder's layers, or None where the keys are not the source's."""
    keys = {
        part: [pair for layers in getattr(source, part) for pair in layers.keys_in(weights)]
        for part in ("encoder", "decoder", "heads", "copies")
    }
    named = {key for pairs in keys.values() for pair in pairs for key in pair}
    complete = len(keys["heads"]) == len(source.heads) and bool(keys["encoder"] or keys["heads"])
    complete = complete and bool(keys["decoder"]) == bool(source.decoder)
    if not complete or named != set(weights):
        return None
    encoder, decoder, heads = (
        [(weights[w], weights[b]) for w, b in keys[part]] for part in ("encoder", "decoder", "heads")
    )  # fmt: skip
    if heads:
        weight, bias = zip(*heads, strict=True)
        encoder.append((torch.cat(weight), torch.cat(bias)))
    return encoder, decoder


def _latent_of(layers: Sequence[Layer]) -> int:
    """How many of a chain's layers lead to its narrowest width, the latent."""
    if len(layers) < 2:
        raise ValueError("a single layer")
    widths = [len(weight) for weight, _ in layers[:-1]]
    return 1 + widths.index(min(widths))


def _widths(layers: Sequence[Layer]) -> list[int]:
    shapes = [weight.shape for weight, _ in layers]
    if any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"weights of shapes {', '.join(str(list(s)) for s in shapes)[:120]}")
    return [shapes[0][1], *(shape[0] for shape in shapes)]


# files

# a TensorFlow checkpoint holds them too
_OF_ADAM = re.compile(r"/Adam(_1)?(:0)?$|^beta[12]_power|^global_step")


def is_npz(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an archive of numpy arrays."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npz(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The trainable variables of the paper's TensorFlow code as tensors, by their names without :0."""
    with np.load(path, allow_pickle=False) as arrays:
        names = [name for name in arrays.files if not _OF_ADAM.search(name)]
        return {name.removesuffix(":0"): torch.from_numpy(arrays[name]) for name in names}


def pickled_names(path: str | os.PathLike[str]) -> tuple[list[str], bool]:
    """What a pickle names, module.name in its order, and whether it is a bare one, not in torch's own file format.

    Its opcodes are read, never run: torch's safe reader stops at those of protocol 4, which RecBole and Cornac write.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            names = _names(file)
        return names, bool(names)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith("/data.pkl") and member.compress_type == zipfile.ZIP_STORED:
                with archive.open(member) as file:
                    return _names(file), False
    return [], False


def _names(file: IO[bytes]) -> list[str]:
    names: list[str] = []
    texts: list[str] = []
    memo: dict[int, str] = {}
    value: Any
    for opcode, value, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            names.append(value.replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":
            names.append(".".join(texts[-2:]))
        elif "UNICODE" in opcode.name:
            texts.append(value)
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = texts[-1] if texts else ""
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            texts.append(memo.get(value, ""))
    return names


def line_to_save(path: str | os.PathLike[str], module: str, bare: bool = False) -> str:
    """The line that writes the weights of a pickled object, for where its code is installed.

    bare  the file is pickle's own, as Cornac's are
    """
    name = os.path.basename(path)
    load = f"torch.load('{name}', map_location='cpu', weights_only=False)"
    weights = "m.get('state_dict', m) if isinstance(m, dict) else m.state_dict()"
    if bare:
        load = f"pickle.load(open('{name}', 'rb'))"
    if module == "cornac":
        weights = "m.vae.state_dict()"
    return f"python -c \"import pickle, torch; m = {load}; torch.save({weights}, 'weights.pt')\""
