"""He-normal weights in a Keras model, and why they are He's: python examples/keras_dense.py [FOLDER]

Builds a small classifier, predicts on dummy input, and draws two pictures into FOLDER: how activations and
gradients spread through 30 ReLU layers under three initialisers, and the weights over their exact density.
"""

import sys
from math import erf, pi, sqrt
from pathlib import Path

import keras
import numpy as np
from keras.layers import Dense

from gpuinit.distributions import TRUNCATED_STD
from gpuinit.keras import GlorotNormal, HeNormal

LAYERS, WIDTH, SAMPLES = 30, 256, 128

# What is compared: label, and the initialiser of one layer. The last is Keras's own, which is not truncated.
INITIALIZERS = {
    "He": lambda layer: HeNormal(seed=layer),
    "Glorot": lambda layer: GlorotNormal(seed=layer),
    "plain normal, std 0.05": lambda layer: keras.initializers.RandomNormal(stddev=0.05, seed=layer),
}


def build_model():
    model = keras.Sequential(
        [
            Dense(64, activation="relu", kernel_initializer=HeNormal(), input_shape=(100,)),
            Dense(10, activation="softmax"),
        ]
    )
    model.summary()
    return model


def spreads(initializer_of):
    """Standard deviations of activations and gradients through ReLU layers of equal width, layer by layer."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((SAMPLES, WIDTH)).astype(np.float32)
    weights, outputs = [], [x]
    for layer in range(LAYERS):
        weights.append(keras.ops.convert_to_numpy(initializer_of(layer)((WIDTH, WIDTH))))
        outputs.append(np.maximum(outputs[-1] @ weights[-1], 0))
    gradient = rng.standard_normal((SAMPLES, WIDTH)).astype(np.float32)
    gradients = [gradient]
    for weight, output in zip(weights[::-1], outputs[:0:-1], strict=True):
        gradient = (gradient * (output > 0)) @ weight.T
        gradients.append(gradient)
    return [a.std() for a in outputs], [g.std() for g in gradients[::-1]]


def draw_spreads(path):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for label, initializer_of in INITIALIZERS.items():
        activations, gradients = spreads(initializer_of)
        left.semilogy(activations, label=label)
        right.semilogy(gradients, label=label)
    left.set(title="activations", xlabel="layer", ylabel="standard deviation")
    right.set(title="gradients of a random loss", xlabel="layer")
    left.legend()
    figure.suptitle(f"{LAYERS} ReLU layers of {WIDTH} units")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def density(w, std):
    """Exact density of a normal truncated at two standard deviations, of standard deviation std then."""
    parent = std / TRUNCATED_STD
    inside = np.exp(-0.5 * (w / parent) ** 2) / (parent * sqrt(2 * pi) * erf(sqrt(2)))
    return np.where(np.abs(w) <= 2 * parent, inside, 0)


def draw_density(path):
    import matplotlib.pyplot as plt

    weights = keras.ops.convert_to_numpy(HeNormal(seed=0)((1024, 1024))).ravel()
    std = sqrt(2 / 1024)
    w = np.linspace(-2.6 * std, 2.6 * std, 1001)
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.hist(weights, 200, density=True, color="#ced4da", label="HeNormal(seed=0)((1024, 1024))")
    axis.plot(w, density(w, std), color="#d9480f", linewidth=1, label="exact density")
    axis.set(xlabel="weight", title=f"std {weights.std():.6f}, expected {std:.6f}")
    axis.legend(loc="upper right")
    axis.set_ylim(top=1.3 * density(np.zeros(1), std)[0])
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    model = build_model()
    prediction = model.predict(np.ones((2, 100), np.float32), verbose=0)
    print("prediction on dummy input:", prediction.shape, "rows sum to", prediction.sum(axis=1))
    draw_spreads(folder / "relu_spread.png")
    draw_density(folder / "density.png")


if __name__ == "__main__":
    main()
