"""The generative direction (A.1.1) on Fashion-MNIST: latent inputs, no labels.

A network with a prior on its input learns to generate images. Of a linear one everything is known:
the likelihood, its maximum (probabilistic PCA, Tipping & Bishop 1999), and the best reconstruction
from as many latent variables (PCA). Predictive coding puts all of its posterior at a point; beside
it runs the same with the posterior's Gaussian, which for a linear network is exact.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import xarray
from jaxtyping import Array, PRNGKeyArray, PyTree
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

import pcdyn
from experiments.shared.experiment import Experiment
from experiments.shared.networks import load
from pcdyn import learning
from pcdyn.theory import Evidence

NAME = "generative"
POINT, WIDE, DEEP = "linear, point", "linear, Gaussian", "tanh, point"
MODELS = (POINT, WIDE, DEEP)
SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """Linear and 1-hidden-layer tanh networks, the same latent dimension, some thousand images.

    The precision of the output is that of probabilistic PCA at its maximum, and held; that of the
    hidden layer makes it nearly a function of the latent variables.
    """

    dataset: str = "fashion-mnist"
    images: int = 3000
    test_images: int = 1000
    latent: int = 10
    hidden: int = 64
    hidden_precision: float = 1000.0
    epochs: int = 12
    batch: int = 100
    learning_rate: float = 5e-3
    seeds: int = 5
    seed: int = 0


class GaussianPosterior(learning.Rule):
    """The gradient of F with its log-determinants, the posterior a Gaussian of covariance H⁻¹.

    The activities are those of predictive coding; ½ log det H is what the point leaves out.
    """

    inference: learning.Rule

    @property
    def name(self) -> str:
        return "predictive coding with a Gaussian posterior"

    def check(self, problem: pcdyn.InferenceProblem) -> None:
        self.inference.check(problem)

    def init(self, network: pcdyn.Network, key: PRNGKeyArray) -> PyTree:
        return self.inference.init(network, key)

    def learn(
        self, problem: pcdyn.InferenceProblem, state: PyTree
    ) -> tuple[learning.BatchGradient, PyTree]:
        learned, state = self.inference.learn(problem, state)
        rest = problem.state_of(learned.activities)

        def total(network: pcdyn.Network) -> Array:
            now = eqx.tree_at(lambda p: p.network, problem, network)
            return jnp.sum(learning.variational_free_energy(now, rest))

        gradient = eqx.filter_grad(total)(problem.network)
        gradient = eqx.combine(gradient, problem.network)
        return dataclasses.replace(learned, gradient=gradient), state


def run(config: Config) -> xarray.Dataset:
    """Train every kind of network with several seeds, and look at images that none has seen."""
    train, test = load(config.dataset)
    rows = np.random.default_rng(config.seed).permutation(len(train.images))[: config.images]
    images, held = train.images[rows], test.images[: config.test_images]
    pca = ProbabilisticPCA(images.astype(float), config.latent)
    found = [one_model(model, config, images, held, pca) for model in MODELS]
    data = xarray.concat(found, "model", join="outer", combine_attrs="override")
    return data.assign(
        images=(("image", "pixel"), held[:SHOWN]),
        pca_reconstructions=(("image", "pixel"), pca.reconstructed(held[:SHOWN])),
        pca_error=float(np.mean((pca.reconstructed(held) - held) ** 2)),
        least_surprise=pca.surprise(images),
        least_held_surprise=pca.surprise(held),
    ).assign_coords(model=list(MODELS)).assign_attrs(
        source=train.source, dataset=config.dataset, latent=config.latent, images=len(images),
        precision=1 / pca.noise,
    )  # fmt: skip


class ProbabilisticPCA:
    """The maximum of the likelihood of a linear network with one prediction, in closed form.

    W = U (Λ − σ²)^½ with the first eigenvectors U and eigenvalues Λ of the covariance, and σ² the
    mean of the others (Tipping & Bishop 1999).
    """

    def __init__(self, images: np.ndarray, latent: int):
        self.mean = images.mean(0)
        values, vectors = np.linalg.eigh(np.cov(images, rowvar=False, bias=True))
        self.noise = float(values[:-latent].mean())
        self.vectors = vectors[:, -latent:]
        self.weight = self.vectors * np.sqrt(values[-latent:] - self.noise)

    def reconstructed(self, images: np.ndarray) -> np.ndarray:
        """The nearest point of the principal subspace: PCA."""
        return self.mean + (images - self.mean) @ self.vectors @ self.vectors.T

    def surprise(self, images: np.ndarray) -> float:
        """−log p, the mean over images."""
        return surprise(self.weight, self.mean, self.noise, images)


def surprise(weight: np.ndarray, bias: np.ndarray, noise: float, images: np.ndarray) -> float:
    """−log N(image; b, W Wᵀ + σ² I), the mean over images."""
    covariance = weight @ weight.T + noise * np.eye(len(weight))
    log_determinant = np.linalg.slogdet(2 * np.pi * covariance)[1]
    return least_free_energy(weight, bias, noise, images) + 0.5 * float(log_determinant)


def least_free_energy(
    weight: np.ndarray, bias: np.ndarray, noise: float, images: np.ndarray
) -> float:
    """F after inference, ½ eᵀ (W Wᵀ + σ² I)⁻¹ e, the mean over images."""
    covariance, errors = weight @ weight.T + noise * np.eye(len(weight)), images - bias
    measured = errors.T @ errors / len(errors)
    return 0.5 * float(np.trace(np.linalg.solve(covariance, measured)))


def one_model(
    model: str, config: Config, images: np.ndarray, held: np.ndarray, pca: ProbabilisticPCA
) -> xarray.Dataset:
    """Networks of one kind, trained, and what they make of held-out images."""
    deep, precision = model == DEEP, 1 / pca.noise
    hidden = (config.hidden,) if deep else ()
    keys = jr.split(jr.key(config.seed), config.seeds)
    mean = jnp.asarray(images.mean(0))
    networks = eqx.filter_vmap(
        lambda key: start((config.latent, *hidden, images.shape[1]), mean, key)
    )(keys)
    inference = learning.PredictiveCoding(learning.TruncatedGaussNewton(tolerance=1e-3))
    batch = min(config.batch, len(images))
    steps = config.epochs * (len(images) // batch)
    rate = optax.cosine_decay_schedule(config.learning_rate, steps)
    precisions = [*[config.hidden_precision] * len(hidden), precision]
    training = learning.train(
        networks, None, images, rule=GaussianPosterior(inference) if model == WIDE else inference,
        optimiser=optax.adam(rate), epochs=config.epochs, batch_size=batch, key=keys,
        energy=pcdyn.Gaussian(precisions), prior=pcdyn.Prior(),
        evaluate=None if deep else parameters,
    )  # fmt: skip
    each = [jax.tree.map(lambda x, i=i: x[i] if eqx.is_array(x) else x, training.network)
            for i in range(config.seeds)]  # fmt: skip
    found = [after(network, precisions, held, pca) for network in each]
    stacked = {name: np.stack([one[name] for one in found]) for name in found[0]}
    model_of = problem_of(each[0], None, precisions)
    drawn = pcdyn.generate(model_of, jr.key(config.seed + 1), samples=SHOWN)
    means = each[0].predict(each[0].depth, drawn[-2])
    variables: dict[str, Any] = {
        "free_energy": (("seed", "epoch"), training.history["free_energy"].mean(-1)),
        "unsettled": (("seed", "epoch"), training.history["unsettled"].mean(-1)),
        "samples": (("image", "pixel"), np.asarray(means)),
        "reconstructions": (("image", "pixel"), stacked.pop("reconstructions")[0]),
        **{name: ("seed", values) for name, values in stacked.items()},
    }
    if not deep:
        along = np.reshape([
            surprise(weight, bias, pca.noise, images)
            for weights, biases in zip(
                *(training.evaluations[name] for name in ("weight", "bias")), strict=True)
            for weight, bias in zip(weights.astype(float), biases.astype(float), strict=True)
        ], (config.seeds, -1))  # fmt: skip
        variables["surprise"] = (("seed", "epochs_done"), along)
    return xarray.Dataset(variables)


def parameters(network: pcdyn.Network) -> dict[str, Array]:
    """Weight and bias of a linear network, for `train` to keep after each epoch."""
    layer: Any = network.layers[0]
    return {"weight": layer.weight, "bias": layer.bias}


def problem_of(
    network: pcdyn.Network, images: Array | np.ndarray | None, precisions: Sequence[float] | float
) -> pcdyn.InferenceProblem:
    """Standard normal latent variables, Gaussian noise of these precisions."""
    return pcdyn.InferenceProblem(
        network, output=images, energy=pcdyn.Gaussian(precisions), prior=pcdyn.Prior()
    )


def after(
    network: pcdyn.Network, precisions: Sequence[float], held: np.ndarray, pca: ProbabilisticPCA
) -> dict[str, Any]:
    """Held-out images: their reconstruction, and of linear networks the likelihood in NumPy."""
    problem = problem_of(network, held, list(precisions))
    rest = pcdyn.equilibrium(problem)
    latent = np.asarray(rest.activities[0])
    made = np.asarray(network.feedforward(jnp.asarray(latent))[-1])
    found = {
        "reconstructions": made[:SHOWN],
        "error": np.mean((made - held) ** 2),
        "latent_variance": np.mean(latent**2),
        "posterior_variance": np.nan, "held_surprise": np.nan, "likelihood_gap": np.nan,
        "principal_cosine": np.nan, "weight_size": np.nan, "grown": np.nan,
    }  # fmt: skip
    if network.depth > 1:
        return found
    layer: Any = network.layers[0]
    weight, bias = np.asarray(layer.weight, float), np.asarray(layer.bias, float)
    exact = surprise(weight, bias, pca.noise, held)
    ours = float(np.mean(learning.variational_free_energy(problem, rest.state)))
    covariance = np.linalg.inv(np.eye(weight.shape[1]) + weight.T @ weight / pca.noise)
    cosines = np.linalg.svd(np.linalg.qr(weight)[0].T @ pca.vectors, compute_uv=False)
    return found | {
        "posterior_variance": np.trace(covariance) / len(covariance),
        "held_surprise": exact,
        "likelihood_gap": abs(ours - exact),
        "principal_cosine": cosines[-1],
        "weight_size": np.linalg.norm(weight) / np.linalg.norm(pca.weight),
        "grown": least_free_energy(10 * weight, bias, pca.noise, held)
        / least_free_energy(weight, bias, pca.noise, held),
    }


def start(widths: Sequence[int], mean: Array, key: PRNGKeyArray) -> pcdyn.Network:
    """Weights of fan-in size, those of the images a tenth of it, around the mean image."""
    network = pcdyn.mlp(
        widths, activation="tanh", output_activation="identity", bias=True, key=key,
        dtype=jnp.float32,
    )  # fmt: skip
    last: Any = network.layers[-1]
    return eqx.tree_at(
        lambda n: (n.layers[-1].weight, n.layers[-1].bias), network, (last.weight / 10, mean)
    )


def check(data: xarray.Dataset) -> list[Evidence]:
    """What of the generative model is learned, and how near to what is best."""
    # Attributes read from a file are NumPy's integers.
    settings = {name: int(data.attrs[name]) for name in ("images", "latent")}
    settings["seeds"] = data.sizes["seed"]
    start = data.surprise.isel(epochs_done=0) - data.least_surprise
    gap = data.surprise.isel(epochs_done=-1) - data.least_surprise
    error = data.error / data.pca_error
    rise = (
        data.free_energy.diff("epoch").max()
        / (data.free_energy.isel(epoch=0) - data.free_energy.min("epoch")).min()
    )
    variance = data.latent_variance + data.posterior_variance
    best = "probabilistic PCA in closed form (NumPy)"

    def spread(values: xarray.DataArray, digits: int = 2) -> str:
        return f"{float(values.mean()):.{digits}f} ± {float(values.std(ddof=1)):.{digits}f}"

    entry = functools.partial(Evidence, NAME, settings=settings)
    return [
        entry(
            "F falls with learning, E-step by E-step and M-step by M-step (largest rise from one "
            "epoch to the next, as a share of its fall)", float(rise), "at most", 0.0, 0.01,
        ),
        entry(
            "F with log-determinants and a Gaussian posterior is −log p of held-out images for the "
            "linear networks (largest difference of means, nats)",
            float(data.likelihood_gap.max()), "at most", 0.0, 0.2,
            oracle="log of the marginal Gaussian in NumPy",
        ),
        entry(
            "with a Gaussian posterior learning comes near the maximum of the likelihood in the "
            "epochs that it has (largest gap, as a share of that at the start)",
            float((gap / start).sel(model=WIDE).max()),
            "at most", 0.0, 0.03, oracle=best,
            note=f"{spread(gap.sel(model=WIDE))} nats above {float(data.least_surprise):.1f}, "
            f"{spread(gap.sel(model=POINT))} with the posterior at a point",
        ),
        entry(
            "with the posterior at a point, as in the paper, F has a minimum over the weights (F "
            "with weights ten times as large, over F)", float(data.grown.sel(model=POINT).max()),
            "at least", 1.0, oracle="½ tr (W Wᵀ + σ² I)⁻¹ C in NumPy", expected_to_hold=False,
            note="it falls towards the reconstruction error alone: the prior costs nothing then",
        ),
        entry(
            "with the posterior at a point latent variables have the prior's variance (mean over "
            "images and posterior)", float(variance.sel(model=POINT).mean()), "equal", 1.0, 0.1,
            expected_to_hold=False, note=f"{spread(variance.sel(model=POINT))}; with a Gaussian "
            f"posterior {spread(variance.sel(model=WIDE))}",
        ),
        entry(
            "a linear network reconstructs held-out images as well as PCA of the same dimension "
            "(squared error, as a multiple of PCA's)",
            float(error.sel(model=POINT).max()), "at most", 1.0, 0.02, oracle="PCA in NumPy",
            note=f"{spread(error.sel(model=POINT), 3)}; PCA {float(data.pca_error):.4f} per pixel",
        ),
        entry(
            "a hidden layer reconstructs better than PCA of the same dimension (squared error, as "
            "a multiple of PCA's)", float(error.sel(model=DEEP).max()), "below", 1.0,
            oracle="PCA in NumPy", note=spread(error.sel(model=DEEP), 3),
        ),
    ]  # fmt: skip


def plot(data: xarray.Dataset) -> Figure:
    """F and −log p in training, reconstruction errors; reconstructions and samples."""
    figure = plt.figure(figsize=(11.5, 7.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    upper, lower = parts
    axes = upper.subplots(1, 3)
    for color, model in enumerate(MODELS):
        part = data.sel(model=model)
        band(axes[0], data.epoch + 1, part.free_energy, f"C{color}", model)
        if model != DEEP:
            band(axes[1], data.epochs_done, part.surprise - data.least_surprise, f"C{color}", model)
        places = color + 0.08 * (np.arange(data.sizes["seed"]) - (data.sizes["seed"] - 1) / 2)
        axes[2].plot(places, part.error / data.pca_error, "o", color=f"C{color}")
    axes[0].set(xlabel="epoch", ylabel="F per image (nats)", title="free energy")
    axes[0].legend()
    axes[1].set(xlabel="epoch", ylabel="−log p above its minimum (nats)", yscale="log",
                title="likelihood of linear networks")  # fmt: skip
    axes[1].legend()
    axes[2].axhline(1.0, color="k", ls="--", lw=1, label="PCA")
    axes[2].legend(loc="lower left")
    axes[2].set_xticks(range(len(MODELS)), MODELS)
    axes[2].set(xlim=(-0.5, 2.5), ylabel="squared error / that of PCA",
                title="reconstruction of held-out images,\neach seed")  # fmt: skip
    left, right = lower.subfigures(1, 2)
    made = data.reconstructions
    draw_images(left, "reconstructions", {
        "image": data.images, "PCA": data.pca_reconstructions,
        "linear": made.sel(model=POINT), "tanh": made.sel(model=DEEP),
    })  # fmt: skip
    draw_images(right, "samples", {
        model.replace(", ", "\n"): data.samples.sel(model=model) for model in MODELS
    })  # fmt: skip
    name = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}[data.attrs["dataset"]]
    figure.suptitle(
        f"{name} without labels: {data.attrs['latent']} latent variables, "
        f"{data.attrs['images']} images, {data.sizes['seed']} seeds (line: median, band: all)"
    )
    return figure


def band(axes: Axes, x: xarray.DataArray, values: xarray.DataArray, color: str, name: str) -> None:
    """The median over seeds, and the range of all."""
    axes.plot(x, values.median("seed"), color=color, label=name)
    axes.fill_between(x, values.min("seed"), values.max("seed"), color=color, alpha=0.25, lw=0)


def draw_images(figure: SubFigure, title: str, rows: dict[str, xarray.DataArray]) -> None:
    """A strip of images for each row, black to white from 0 to 1."""
    figure.suptitle(title)
    for axes, (name, images) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        squares = images.values.reshape(len(images), 28, 28)
        axes.imshow(np.concatenate(list(squares), axis=1), cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center")


EXPERIMENT = Experiment(
    NAME, "extra: generative direction", {"paper": Config()},
    {"dataset": "mnist", "images": 500, "test_images": 200, "latent": 3, "hidden": 16,
     "epochs": 20, "batch": 50, "learning_rate": 1e-2, "seeds": 2},
    run, check, plot,
)  # fmt: skip
