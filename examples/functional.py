"""The learned optimizer in a functional training loop: the leading subspace of a covariance, no learning rate."""

import torch

import subspace_meta as sm


def main(steps: int = 100) -> float:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, 65, dtype=torch.float32) ** -0.7
    params = {"basis": torch.randn(64, 6, generator=generator)}

    def loss_fn(params: dict[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        return batch.square().sum(1).mean() - (batch @ params["basis"]).square().sum(1).mean()

    geometry = sm.Geometry.from_rules(params, {"basis": sm.Stiefel()})
    optimizer = sm.SubspaceOptimizer(geometry, sm.pretrained())
    params = geometry.project(params)
    state = optimizer.init(params)
    for _ in range(steps):
        batch = torch.randn(64, 64, generator=generator) * spectrum.sqrt()
        grads, loss = torch.func.grad_and_value(loss_fn)(params, batch)
        params, state = optimizer.update(grads, state, params, loss)

    captured = (params["basis"].square().sum(1) * spectrum).sum()
    share = float(captured / spectrum[:6].sum())
    print(geometry.summary())
    print(f"captured {share:.1%} of the variance that six directions can; violation {geometry.violation(params)}")
    return share


if __name__ == "__main__":
    main()
