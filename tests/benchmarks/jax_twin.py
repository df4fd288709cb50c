"""The same meta-gradient in JAX: preset ``base`` on PCA over Stiefel, ``jit(vmap(scan))``.

Written from the formulas for one matrix, as a JAX user would: no packing, no layout. ``tests/meta/test_twins.py`` shows
that both compute the same gradient; ``subspace-meta bench meta`` compares their speed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

# One thread, as for every contestant; a pool would add its own seconds.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import jax.numpy as jnp
from jax import lax

TINY, FLOOR = 1e-30, 1e-6
FAST, SLOW = 0.9, 0.99
MAX_NORM, ROUNDING = 10.0, 64.0
OUTPUTS, LONGEST, RATE, SETTLING, RATE_BOUNDS, DECAY_BOUNDS = 5, 4.0, 0.7, 30.0, (-14.0, 5.0), (-6.0, 7.0)
SPENT, NOISE_SLOPE = 1e-20, 10.0
QUINTIC = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))


def project(x: Any, v: Any) -> Any:
    inner = x.T @ v
    return v - x @ (0.5 * (inner + inner.T))


def riemannian_gradient(x: Any, g: Any) -> Any:
    r = project(x, g)
    lost = jnp.vdot(r, r) <= (ROUNDING * jnp.finfo(r.dtype).eps) ** 2 * jnp.vdot(g, g)
    return jnp.where(lost, jnp.zeros_like(r), r)


def retract(x: Any, v: Any) -> Any:
    """Cholesky QR, steps longer than MAX_NORM shortened."""
    y = x + jnp.sqrt(MAX_NORM**2 / jnp.maximum(jnp.vdot(v, v), MAX_NORM**2)) * v
    factor = jnp.linalg.cholesky(y.T @ y)
    inverse = jax.scipy.linalg.solve_triangular(factor, jnp.eye(x.shape[1], dtype=x.dtype), lower=True)
    return y @ inverse.T


def log_ratio(a: Any, b: Any) -> Any:
    return 0.5 * jnp.log(a / (b + TINY) + FLOOR)


def cosine(ab: Any, a: Any, b: Any) -> Any:
    return ab / (jnp.sqrt(a + TINY) * jnp.sqrt(b + TINY))


def average(decay: float, t: Any, old: Any, new: Any) -> Any:
    return old + (1 - decay) / (1 - decay**t) * (new - old)


def energies(a: Any, b: Any) -> Any:
    product = a * b
    return jnp.concatenate([product.mean(axis=1), product.mean(axis=0)])


def orthonormal_mix(direction: Any, squares: Any, share: Any) -> tuple[Any, Any]:
    """Mix a tall direction with its orthonormal factor (three quintic Newton-Schulz steps on the Gram matrix)."""
    p = direction.shape[1]
    eye = jnp.eye(p, dtype=direction.dtype)
    scale = 1.0 / jnp.sqrt(squares * p + TINY)
    gram = power = direction.T @ direction * scale * scale
    factor = eye
    for iteration, (a, b, c) in enumerate(QUINTIC):
        polynomial = a * eye + power @ (b * eye + c * power)
        factor = factor @ polynomial if iteration else polynomial
        if iteration + 1 < len(QUINTIC):
            power = polynomial @ power @ polynomial

    def column_squares(polynomial: Any) -> Any:
        return (gram * (polynomial @ polynomial)).sum() / p

    factor = factor / jnp.sqrt(column_squares(factor) + 1e-12)
    mixed = (1.0 - share) * p**0.5 * eye + share * factor
    return direction @ (scale * mixed), column_squares(mixed)


def adapt(theta: Any, state: Any, r: Any) -> tuple[Any, Any]:
    """Turn the Riemannian gradient into an update; the formulas of preset ``base`` for one matrix."""
    t, m, fast, slow, peak, first, mass, damping, rate, turn, along, hidden, cell = state
    d, p = r.shape
    settled, t = t, t + 1
    energy, product = energies(r, r), energies(r, m)
    before = energies(m, m) + FLOOR * energy
    decay = jax.nn.sigmoid(jnp.clip(theta["decay.bias"] + damping, *DECAY_BOUNDS))
    mass = decay * mass + (1.0 - decay)
    m = m + (1.0 - decay) / mass * (r - m)
    momentum_energy, agreement = energies(m, m), energies(r, m)
    fast, slow = average(FAST, t, fast, energy), average(SLOW, t, slow, energy)
    means = [values[:d].mean() for values in (energy, fast, slow, momentum_energy, agreement, product, before)]
    peak = jnp.maximum(peak, means[1])
    first = jnp.where(first > 0.0, first, means[0])
    last_turn, turn = turn, cosine(means[5], means[0], means[6])
    small = 1e-3 * jnp.sqrt(means[0] + TINY) * jnp.sqrt(means[3] + TINY)
    bend = (means[5] - along) / (jnp.abs(means[5]) + jnp.abs(along) + small)
    context = jnp.stack(
        [
            log_ratio(means[3], means[1]),
            log_ratio(means[1], means[2]),
            log_ratio(means[0], means[1]),
            log_ratio(means[1], peak),
            *(jnp.tanh(t / scale - 1.0) for scale in (10.0, 100.0, 1000.0)),
            turn,
            last_turn,
            bend,
            0.25 * rate,
            *jnp.zeros(4, r.dtype),  # the number of steps is not known
        ]
    )
    remembered = jnp.stack([hidden[:, :d].mean(axis=1), hidden[:, d:].mean(axis=1)])
    evidence = theta["noise.bias"] + context @ theta["noise.skip"] + (theta["noise.hidden"] * remembered).sum()
    noise = jax.nn.sigmoid(NOISE_SLOPE * evidence)
    context = jnp.append(context, noise)
    relative = jnp.stack(
        [log_ratio(a, b) for a, b in zip((energy, fast, slow, momentum_energy), means[:4], strict=True)]
    )
    features = jnp.concatenate(
        [
            relative,
            cosine(product, energy, before)[None],
            jnp.broadcast_to(context[:, None], (len(context), d + p)),
            jnp.concatenate([jnp.ones(d, r.dtype), -jnp.ones(p, r.dtype)])[None],
        ]
    )
    gates = theta["lstm.weight"] @ jnp.concatenate([features, hidden]) + theta["lstm.bias"]
    enter, forget, candidate, leave = jnp.split(gates, 4)
    cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
    hidden = jax.nn.sigmoid(leave) * jnp.tanh(cell)
    rows = theta["head.weight"][:OUTPUTS] @ hidden[:, :d] + theta["head.bias"][:OUTPUTS]
    columns = theta["head.weight"][OUTPUTS:] @ hidden[:, d:] + theta["head.bias"][OUTPUTS:]
    row_scale = jnp.exp(rows[0] + theta["scale.skip"][0] @ relative[:, :d])
    column_scale = jnp.exp(columns[0] + theta["scale.skip"][1] @ relative[:, d:])
    pooled = rows[1:].mean(axis=1) + columns[1:].mean(axis=1)
    change = jnp.tanh(context @ theta["rate.skip"] + pooled[2]) * (RATE / (1.0 + settled / SETTLING))
    rate = jnp.clip(rate + change, *RATE_BOUNDS)
    damping = context @ theta["decay.skip"]
    mix = jax.nn.sigmoid(theta["mix.bias"] + pooled[1])
    direction = row_scale[:, None] * (r + mix * (m - r)) * column_scale[None]
    squares = (direction**2).sum() / p
    spent = SPENT * d * peak
    missing = spent / (squares + spent + TINY)
    squares = squares + spent
    gauges = jnp.stack(
        [
            0.5 * jnp.log((squares / d + TINY) / (peak + TINY)),
            0.5 * jnp.log((peak + TINY) / (first + TINY)),
            jnp.log(t),
            jnp.log(mass),
            0.5 * jnp.log(1.0 - SLOW**t),
            0.0,
            noise * jnp.log(t),
        ]
    )
    logit = theta["length.bias"] + context @ theta["length.skip"] + pooled[0] + rate + gauges @ theta["length.gauge"]
    share = jax.nn.sigmoid(theta["spectral.bias"] + pooled[3])
    direction, squares = orthonormal_mix(direction, squares, share)
    update = -LONGEST * jax.nn.sigmoid(logit) / jnp.sqrt(squares + missing + TINY) * direction
    return update, (t, m, fast, slow, peak, first, mass, damping, rate, turn, means[4], hidden, cell)


def loss(x: Any, z: Any) -> Any:
    return ((z**2).sum() - ((z @ x) ** 2).sum()) / z.shape[0]


def inner_step(theta: Any, covariance: Any, carry: Any, z: Any) -> tuple[Any, Any]:
    x, state = carry
    update, (t, m, *rest) = adapt(theta, state, riemannian_gradient(x, jax.grad(loss)(x, z)))
    y = retract(x, project(x, update))
    objective = jnp.trace(covariance) - (y * (covariance @ y)).sum()
    return (y, (t, project(y, m), *rest)), objective


def start(x: Any, hidden: int) -> Any:
    d, p = x.shape
    zeros = functools.partial(jnp.zeros, dtype=x.dtype)
    return (
        zeros(()),
        zeros((d, p)),
        zeros(d + p),
        zeros(d + p),
        *(zeros(()) for _ in range(7)),
        zeros((hidden, d + p)),
        zeros((hidden, d + p)),
    )


@functools.cache
def meta_gradient(unroll: int) -> Callable[..., Any]:
    """Return jit of (theta, x0 (B, d, p), z (T, B, n, d), covariance, reference, initial) -> gradient of the loss.

    The loss is the mean of log((f - f*)/(f_0 - f*) + 1e-7), as in the meta-trainer.
    """

    def one(theta: Any, x: Any, z: Any, covariance: Any) -> Any:
        carry = (x, start(x, theta["head.weight"].shape[1]))
        body = functools.partial(inner_step, theta, covariance)
        return lax.scan(body, carry, z, unroll=unroll)[1]

    def outer(theta: Any, x: Any, z: Any, covariance: Any, reference: Any, initial: Any) -> Any:
        objectives = jax.vmap(one, in_axes=(None, 0, 1, 0))(theta, x, z, covariance)
        excess = jnp.maximum(objectives - reference[:, None], 0.0) / (initial - reference)[:, None]
        return jnp.log(excess + 1e-7).mean()

    return jax.jit(jax.grad(outer))


def caller(setting: Any, unroll: int) -> Callable[[], dict[str, Any]]:
    """Return a function that computes the meta-gradient of a ``benchmarks.meta.Setting``, as torch tensors."""
    import numpy
    import torch

    def to_jax(value: Any) -> Any:
        return jnp.asarray(value.numpy())

    function = meta_gradient(unroll)
    arguments = (
        {name: to_jax(value) for name, value in setting.theta.items()},
        *map(
            to_jax,
            (
                setting.params["x"],
                setting.batches["z"],
                setting.data["covariance"],
                setting.reference,
                setting.initial,
            ),
        ),
    )

    def call() -> dict[str, Any]:
        found = jax.block_until_ready(function(*arguments))
        return {name: torch.from_numpy(numpy.array(value)) for name, value in found.items()}

    return call
