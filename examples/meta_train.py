"""Meta-train an optimizer for a model of your own: an autoencoder with orthonormal encoder, under torch.compile."""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import subspace_meta as sm
from subspace_meta.meta.trainer import StreamSettings, Trainer, TrainSettings
from subspace_meta.tasks import Problem, TaskFamily


class Autoencoder(nn.Module):
    def __init__(self, inputs: int, code: int) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.empty(inputs, code))  # lives on Stiefel
        self.decoder = nn.Parameter(torch.empty(code, inputs))  # unconstrained

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.encoder) @ self.decoder


model = Autoencoder(24, 4)
GEOMETRY = sm.Geometry.from_rules(dict(model.named_parameters()), {"encoder": sm.Stiefel()})


def reconstruction(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return (torch.func.functional_call(model, params, (batch["z"],)) - batch["z"]).square().sum(dim=-1).mean()


@dataclass(frozen=True)
class Autoencoding(TaskFamily):
    """Each task has a random covariance of its own."""

    name = "autoencoder 24-4"
    problem = Problem(GEOMETRY, loss=reconstruction, objective=reconstruction)

    def draw(self, generator: torch.Generator, count: int) -> dict[str, Tensor]:
        root = torch.randn(count, 24, 24, generator=generator) * torch.logspace(0, -1.5, 24)
        held_out = torch.randn(count, 128, 24, generator=generator) @ root.mT
        return {"root": root, "z": held_out, "reference": torch.zeros(count)}

    def sample(self, data: dict[str, Tensor], generator: torch.Generator, steps: int) -> dict[str, Tensor]:
        noise = torch.randn(steps, len(data["root"]), 32, 24, generator=generator)
        return {"z": noise @ data["root"].mT}


def progress(weights: dict[str, Tensor], steps: int = 100, count: int = 16) -> float:
    """The mean over new tasks of the logarithm of the loss that is left, the same tasks for all weights."""
    family, generator = Autoencoding(), torch.Generator().manual_seed(1)
    data = family.draw(generator, count)
    batches = family.sample(data, generator, steps)
    params = family.init(data, generator)
    losses = torch.func.vmap(reconstruction)
    first = losses(params, {"z": data["z"]})
    optimizer = sm.SubspaceOptimizer(GEOMETRY.stacked(count), weights)
    state = optimizer.init(params)
    for z in batches["z"]:
        grads = torch.func.grad(lambda p, z=z: losses(p, {"z": z}).sum())(params)
        params, state = optimizer.update(grads, state, params)
    return float((losses(params, {"z": data["z"]}) / first).log().mean())


def main(outer_steps: int = 150, compiled: bool = True) -> list[float]:
    stream = StreamSettings((Autoencoding(),), tasks=16, compiled=compiled)
    trainer = Trainer(TrainSettings((stream,), outer_steps=outer_steps, horizon=(20, 100)))
    losses = []
    for figures in trainer.run(lambda family: print(f"compiling the inner loop of {family!r}; about a minute")):
        losses.append(figures["outer_loss"])
        if trainer.outer_step % 25 == 0:
            print(f"outer step {trainer.outer_step}: mean log relative loss {sum(losses[-25:]) / 25:.3f}")
    # Means over other ages of other tasks do not tell whether it went well; this does.
    untrained = sm.PRESETS["base"].init_weights(torch.Generator().manual_seed(0))
    for name, weights in (("untrained", untrained), ("trained here", trainer.theta), ("shipped", sm.pretrained())):
        print(f"{name}: mean log relative loss {progress(weights):.3f} after 100 steps on new tasks")
    sm.save_weights("autoencoder.safetensors", trainer.theta, sm.PRESETS["base"], {"task": "autoencoder 24-4"})
    return losses


if __name__ == "__main__":
    main(compiled="--eager" not in sys.argv)
