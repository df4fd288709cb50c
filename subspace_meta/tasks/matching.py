"""Graphs: embedded on a sphere, and matched with each other.

*Embedding.* Nodes are unit vectors, and an edge has the probability sigmoid(s (x_i^T x_j - c)): minimise the mean
cross-entropy over pairs of nodes. Sources: Hoff, Raftery, Handcock, "Latent space approaches to social network
analysis", JASA 97 (2002); on spheres: Wilson, Hancock, Pekalska, Duin, "Spherical and hyperbolic embeddings of data",
IEEE Trans. Pattern Anal. Mach. Intell. 36 (2014).

*Matching.* minimise |A - Q B Q^T|^2 / (|A|^2 + |B|^2) over O(n), permutations relaxed to orthogonal matrices. Its
minimum is the sum of the squared differences of the eigenvalues in order. Sources: Umeyama, "An eigendecomposition
approach to weighted graph matching problems", IEEE Trans. Pattern Anal. Mach. Intell. 10 (1988); Finke, Burkard, Rendl,
"Quadratic assignment problems", Annals of Discrete Mathematics 31 (1987); the bound: Hoffman and Wielandt 1953.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Orthogonal, Sphere
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_indices, repeat
from subspace_meta.tasks.references import reference_by_descent

STEEPNESS = 8.0
COSINE = 0.5


def pair_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of pairs: one-hot ``left`` and ``right`` ``(B, n)``, ``joined`` ``(B,)``."""
    x = params["x"][..., 0]
    logits = STEEPNESS * (((batch["left"] @ x) * (batch["right"] @ x)).sum(dim=-1) - COSINE)
    return (F.softplus(logits) - batch["joined"] * logits).mean()


def graph_likelihood(params: Params, data: Data) -> Tensor:
    """Return the mean cross-entropy of all pairs; ``graph`` ``(n, n)`` is symmetric."""
    x = params["x"][..., 0]
    n = x.shape[0]
    logits = STEEPNESS * (x @ x.mT - COSINE)
    entropies = F.softplus(logits) - data["graph"] * logits
    return (entropies.sum() - entropies.diagonal().sum()) / (n * (n - 1))


def cosine_error(params: Params, data: Data) -> Tensor:
    """Return the root mean square error of the cosines of all pairs: it does not see a common rotation."""
    x, truth = params["x"][..., 0], data["truth"][..., 0]
    return (x @ x.mT - truth @ truth.mT).square().mean().sqrt()


@functools.cache
def embedding_problem(n: int, d: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"x": torch.empty(n, d, 1, device="meta")}, {"x": Sphere()})
    return Problem(geometry, pair_loss, graph_likelihood, cosine_error)


@dataclass(frozen=True)
class SphericalEmbedding(TaskFamily):
    """A graph drawn from n random places on the sphere of R^d, embedded there; mini-batches are pairs of nodes.

    The reference is what descent in float64 reaches from the true places: the best known value. The metric is the root
    mean square error of the cosines of all pairs.
    """

    n: int
    d: int = 3
    batch_size: int = 128

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"graph embedding of {self.n} nodes on S({self.d})"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return embedding_problem(self.n, self.d)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw places and edges."""
        truth = Sphere().random_point((count, self.n, self.d, 1), generator)
        x = truth[..., 0]
        probability = torch.sigmoid(STEEPNESS * (x @ x.mT - COSINE))
        upper = torch.triu((torch.rand(probability.shape, generator=generator) < probability).float(), diagonal=1)
        data = {"graph": upper + upper.mT}
        return {**data, "truth": truth, "reference": reference_by_descent(self.problem, {"x": truth}, data).float()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw pairs of different nodes, with replacement."""
        count = len(data["reference"])
        shape = (steps, count, self.batch_size)
        left = draw_indices(self.n, shape, generator)
        right = (left + 1 + draw_indices(self.n - 1, shape, generator)) % self.n
        joined = data["graph"][torch.arange(count)[:, None], left, right]
        return {
            "left": F.one_hot(left, self.n).float(),
            "right": F.one_hot(right, self.n).float(),
            "joined": joined,
        }


def matching_loss(params: Params, batch: Batch) -> Tensor:
    """Return |A - Q B Q^T|^2 / (|A|^2 + |B|^2)."""
    a, b, q = batch["a"], batch["b"], params["q"]
    return (a - q @ b @ q.mT).square().sum() / (a.square().sum() + b.square().sum())


def graph_distance(params: Params, data: Data) -> Tensor:
    """Return the root of the loss: the distance of the graphs relative to their size."""
    return matching_loss(params, data).sqrt()


@functools.cache
def matching_problem(n: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"q": torch.empty(n, n, device="meta")}, {"q": Orthogonal()})
    return Problem(geometry, matching_loss, matching_loss, graph_distance)


@dataclass(frozen=True)
class GraphMatching(TaskFamily):
    """A weighted graph of random places in the square, and the same with its nodes in another order and noise added.

    Weights fall with the squared distance of the places. The reference is the sum of the squared differences of the
    eigenvalues in order; it is attained up to the signs of eigenvectors. The metric is the distance of the graphs.
    """

    n: int
    noise: float = 0.02

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"graph matching {self.n}x{self.n}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return matching_problem(self.n)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw places, orders and noise."""
        place = torch.rand(count, self.n, 2, generator=generator, dtype=torch.float64)
        distance = (place[:, :, None] - place[:, None]).square().sum(dim=-1)
        a = torch.exp(-distance / 0.1)
        order = F.one_hot(torch.rand(count, self.n, generator=generator).argsort(dim=-1), self.n).double()
        noise = self.noise * torch.randn(a.shape, generator=generator, dtype=torch.float64)
        b = order.mT @ a @ order + (noise + noise.mT) / 2**0.5
        apart = torch.linalg.eigvalsh(a) - torch.linalg.eigvalsh(b)
        size = a.square().sum(dim=(1, 2)) + b.square().sum(dim=(1, 2))
        return {"a": a.float(), "b": b.float(), "reference": (apart.square().sum(dim=-1) / size).float()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return both graphs at every step."""
        return repeat(data, ("a", "b"), steps)
