"""Pattern completion: digits of which some pixels are shown, completed by inference.

A network with a prior on its latent input generates digits; the pixels that are shown are clamped,
the others are free and inferred with everything else. For the linear network, whose weights are the
maximum of the likelihood in closed form (probabilistic PCA), the completion is the mean of the
missing pixels given those shown, a formula of Gaussians. The tanh network is the decoder of an
autoencoder that backpropagation has trained, with its latent variables made standard normal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import xarray
from jaxtyping import PyTree
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import pcdyn
from experiments.beyond.generative import ProbabilisticPCA
from experiments.shared.experiment import Experiment
from experiments.shared.measures import within
from experiments.shared.networks import in_float64, load
from pcdyn.theory import Evidence

NAME = "pattern completion"
LINEAR, DEEP = "linear", "tanh"
# Beside random pixels, the upper half of the image.
HALF = "upper half"
SHOWN = 6


@dataclasses.dataclass(frozen=True)
class Config:
    """Digits, latent variables, and which shares of their pixels are shown."""

    dataset: str = "mnist"
    images: int = 10000
    test_images: int = 40
    latent: int = 20
    hidden: int = 100
    hidden_precision: float = 1000.0
    epochs: int = 40
    batch: int = 100
    learning_rate: float = 3e-3
    shares: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
    seeds: int = 3
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Fit both kinds of networks, and complete digits that neither has seen."""
    train, test = load(config.dataset)
    draw = np.random.default_rng(config.seed)
    rows = draw.permutation(len(train.images))[: config.images]
    images = train.images[rows]
    held = test.images[draw.permutation(len(test.images))[: config.test_images]].astype(float)
    pca = ProbabilisticPCA(images.astype(float), config.latent)
    masks = {f"{share:g}": random_masks(draw, held, share) for share in config.shares}
    masks[HALF] = np.broadcast_to(np.arange(held.shape[1]) < held.shape[1] // 2, held.shape)
    linear = pcdyn.Network([pcdyn.Dense(pca.weight, pca.mean)])
    keys = jr.split(jr.key(config.seed), config.seeds)
    deep = [trained(config, images, key) for key in keys]
    kept, exact, completed, errors, away = slice(SHOWN), [], [], [], []
    for mask in masks.values():
        wanted = conditional_means(pca, held, mask)
        made = [completion(linear, [1 / pca.noise], held, mask)]
        for network, noise in deep:
            precisions = [config.hidden_precision, 1 / noise]
            made.append(completion(network, precisions, held, mask))
        away.append(np.max(np.abs(made[0] - wanted)) / np.max(np.abs(wanted)))
        completed.append(np.stack(made[:2])[:, kept])
        exact.append(missing_error(wanted, held, mask))
        errors.append([missing_error(x, held, mask) for x in made])
    by = np.stack(errors)
    mean = np.broadcast_to(pca.mean, held.shape)
    return xarray.Dataset(
        {
            "images": (("drawn", "pixel"), held[kept].astype(np.float32)),
            "is_shown": (("mask", "drawn", "pixel"), [mask[kept] for mask in masks.values()]),
            "completed": (
                ("mask", "network", "drawn", "pixel"), np.stack(completed).astype(np.float32)
            ),
            "off_conditional_mean": ("mask", away),
            "exact_error": (("mask", "image"), np.stack(exact)),
            "linear_error": (("mask", "image"), by[:, 0]),
            "deep_error": (("mask", "seed", "image"), by[:, 1:]),
            "mean_error": (
                ("mask", "image"), [missing_error(mean, held, m) for m in masks.values()]
            ),
        },
        coords={"mask": list(masks), "network": [LINEAR, DEEP]},
        attrs={"source": train.source, "images": len(images), "latent": config.latent,
               "shares": list(config.shares)},
    )  # fmt: skip


def random_masks(draw: np.random.Generator, images: np.ndarray, share: float) -> np.ndarray:
    """Which pixels of each image are shown: as many in each, others in each."""
    count = max(1, round(share * images.shape[1]))
    first = np.arange(images.shape[1]) < count
    return draw.permuted(np.broadcast_to(first, images.shape), axis=1)


def trained(config: Config, images: np.ndarray, key: jax.Array) -> tuple[pcdyn.Network, float]:
    """The decoder of an autoencoder, for latent variables of variance 1, and its error."""
    pixels, keys = images.shape[1], jr.split(key, 3)
    options: dict[str, Any] = {"activation": "tanh", "output_activation": "identity", "bias": True}
    encoder = pcdyn.mlp((pixels, config.hidden, config.latent), key=keys[0], **options)
    decoder = pcdyn.mlp((config.latent, config.hidden, pixels), key=keys[1], **options)
    arrays, static = eqx.partition((encoder, decoder), eqx.is_array)
    data, batch = jnp.asarray(images, decoder.dtype), min(config.batch, len(images))
    shuffled = [jr.permutation(k, len(data)) for k in jr.split(keys[2], config.epochs)]
    rows = jnp.concatenate(shuffled)[: config.epochs * (len(data) // batch) * batch]
    optimiser = optax.adam(optax.cosine_decay_schedule(config.learning_rate, len(rows) // batch))

    def passed(arrays: PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        encode, decode = eqx.combine(arrays, static)
        code = encode.feedforward(x)[-1]
        return code, decode.feedforward(code)[-1]

    def update(carry: PyTree, chosen: jax.Array) -> tuple[Any, None]:
        arrays, moments = carry
        x = data[chosen]
        slope = jax.grad(lambda a: jnp.mean((passed(a, x)[1] - x) ** 2))(arrays)
        change, moments = optimiser.update(slope, moments)
        return (optax.apply_updates(arrays, change), moments), None

    start = arrays, optimiser.init(arrays)
    (arrays, _), _ = jax.jit(lambda carry: jax.lax.scan(update, carry, rows.reshape(-1, batch)))(
        start
    )
    code, made = passed(arrays, data)
    first, last = eqx.combine(arrays, static)[1].layers
    spread = jnp.linalg.cholesky(jnp.cov(code, rowvar=False))
    bias = first.bias + first.weight @ code.mean(0)
    standard = pcdyn.Dense(first.weight @ spread, bias, "tanh")
    return pcdyn.Network([standard, last]), float(jnp.mean((made - data) ** 2))


def completion(
    network: pcdyn.Network, precisions: list[float], images: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """The images at the equilibrium with the pixels of the mask clamped."""
    shown = pcdyn.Partial(np.where(mask, images, np.nan), mask)
    problem = in_float64(
        pcdyn.InferenceProblem(
            network, clamp={network.depth: shown}, energy=pcdyn.Gaussian(precisions),
            prior=pcdyn.Prior(),
        )
    )  # fmt: skip
    return np.asarray(pcdyn.equilibrium(problem).activities[-1])


def conditional_means(pca: ProbabilisticPCA, images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean of the missing pixels given those shown, by the formula for Gaussians."""
    covariance = pca.weight @ pca.weight.T + pca.noise * np.eye(len(pca.weight))
    found = images.copy()
    for image, shown in zip(found, mask, strict=True):
        errors = image[shown] - pca.mean[shown]
        inside, across = covariance[np.ix_(shown, shown)], covariance[np.ix_(~shown, shown)]
        image[~shown] = pca.mean[~shown] + across @ np.linalg.solve(inside, errors)
    return found


def missing_error(completed: np.ndarray, images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean squared error of the missing pixels, per image."""
    return np.sum(np.where(mask, 0, (completed - images) ** 2), axis=1) / np.sum(~mask, axis=1)


def check(data: xarray.Dataset) -> list[Evidence]:
    """What the linear network completes, and how much of the missing pixels is recovered."""
    half, upper = data.sel(mask=f"{0.5:g}"), data.sel(mask=HALF)
    few, most = (_of(data.isel(mask=i), LINEAR) for i in (0, len(data.attrs["shares"]) - 1))
    fewer, error = _ratio(most, few)
    found = [
        Evidence(
            NAME, "linear: inference completes with the mean of the missing pixels given those "
            "shown (largest relative difference)", float(data.off_conditional_mean.max()),
            "at most", 1e-6, oracle="the formula for conditional means of Gaussians in NumPy",
        ),
        Evidence(
            NAME, "linear: the more pixels are shown, the smaller is the error of the others "
            "(ratio of mean squared errors at the largest and the smallest share)", fewer,
            "at most", 1.0, error=error,
        ),
    ]  # fmt: skip
    for kind in (LINEAR, DEEP):
        ratio, error = _ratio(_of(half, kind), half.mean_error.values)
        told = within(*_ratio(_of(upper, kind), upper.mean_error.values))
        claim = Evidence(
            NAME, f"{kind}: shown half of the pixels, at random, the missing ones are nearer than "
            "the mean image (ratio of mean squared errors)", ratio, "at most", 1.0, error=error,
            note=f"shown the upper half {told}",
        )  # fmt: skip
        found.append(claim)
    return found


def _of(data: xarray.Dataset, kind: str) -> np.ndarray:
    """The errors of one kind of network, per image, the mean over those that were trained."""
    errors = data.linear_error if kind == LINEAR else data.deep_error.mean("seed")
    return np.asarray(errors)


def _ratio(errors: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """The ratio of two means over images, and its standard error."""
    ratio = float(errors.mean() / others.mean())
    return ratio, float(np.std(errors - ratio * others) / len(others) ** 0.5 / others.mean())


def plot(data: xarray.Dataset) -> Figure:
    """Completed digits, and the error of missing pixels against the share that is shown."""
    figure = plt.figure(figsize=(9, 4.6), layout="constrained")
    panels: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    left, right = panels
    axes = left.subplots(5, SHOWN)
    side = round(data.sizes["pixel"] ** 0.5)
    shown, few = data.sel(mask=HALF), data.sel(mask=f"{data.attrs['shares'][2]:g}")
    rows = {
        "upper half\nshown": shown.images.where(shown.is_shown),
        "linear": shown.completed.sel(network=LINEAR),
        "tanh": shown.completed.sel(network=DEEP),
        f"{float(few.mask.item()):.0%}\nshown": few.images.where(few.is_shown),
        "tanh ": few.completed.sel(network=DEEP),
    }
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(line, images.values, strict=True):
            ax.imshow(image.reshape(side, side), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[], facecolor="C0")
        line[0].set_ylabel(name.strip(), rotation=0, ha="right", va="center", fontsize=9)
    ax, shares = right.subplots(), np.array(data.attrs["shares"])
    part = data.isel(mask=slice(len(shares)))
    for name, values, color in (
        ("mean image", part.mean_error, "0.5"),
        ("linear, trained exactly", part.linear_error, "C0"),
        ("tanh, trained by backpropagation", part.deep_error.mean("seed"), "C1"),
    ):
        mean, error = values.mean("image"), values.std("image") / values.sizes["image"] ** 0.5
        ax.errorbar(100 * shares, mean, error, color=color, marker="o", ms=4, label=name)
    ax.plot(100 * shares, part.exact_error.mean("image"), "kx", ms=7,
            label="conditional mean (NumPy)")  # fmt: skip
    ax.set(xlabel="pixels shown, at random (%)", ylabel="mean squared error of the others",
           ylim=(0, None))  # fmt: skip
    ax.legend(fontsize=8)
    return figure


EXPERIMENT = Experiment(
    "pattern_completion", "extra: pattern completion", {"paper": Config()},
    {
        "images": 800, "test_images": 8, "epochs": 60, "seeds": 1, "latent": 8, "hidden": 30,
        "shares": (0.1, 0.25, 0.5),
    },
    run, check, plot,
)  # fmt: skip
