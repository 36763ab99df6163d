"""Muon: an optimizer whose steps are momentum, orthogonalized by Newton-Schulz iterations."""

import torch


class Muon(torch.optim.Optimizer):
    """Muon for the kernels of 3x3 convolutions, as matrices (out, in * 9), and Adam for the rest.

    After K. Jordan, https://kellerjordan.github.io/posts/muon/, with steps of the length of Adam's,
    so that learning rates are alike (https://arxiv.org/abs/2502.16982). PyTorch's own takes
    matrices alone.
    """

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        """Take a step along the parameters' gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(self.direction(parameter), alpha=group["lr"])

    def direction(self, parameter):
        """What a learning rate of 1 would take off a parameter; also updates its moments."""
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state["step"] = torch.tensor(0.0)
            state |= {name: torch.zeros_like(parameter) for name in moment_names(parameter)}
        state["step"] += 1
        if is_kernel(parameter):
            momentum = state["exp_avg"].lerp_(gradient, 0.05)
            matrix = orthogonalize(gradient.lerp(momentum, 0.95).flatten(1))
            return matrix.reshape(parameter.shape) * (0.2 * max(matrix.shape) ** 0.5)
        mean = state["exp_avg"].lerp_(gradient, 0.1) / (1 - 0.9 ** state["step"])
        square = state["exp_avg_sq"].lerp_(gradient**2, 0.001) / (1 - 0.999 ** state["step"])
        return mean / (square.sqrt() + 1e-8)


def is_kernel(parameter):
    """Whether it is the kernel of a 3x3 convolution."""
    return parameter.shape[2:] == (3, 3)


def moment_names(parameter):
    """What is kept of a parameter's gradients, by the names of Adam's."""
    return ["exp_avg"] if is_kernel(parameter) else ["exp_avg", "exp_avg_sq"]


def orthogonalize(matrix):
    """A matrix (m, n) with its singular values brought near to 1: five of Newton and Schulz's steps
    with Jordan's coefficients, on its smaller Gram matrix, which takes half the time but needs all
    of float32: in TF32 or bfloat16 they would go astray."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    gram, one = x @ x.T, torch.eye(len(x), device=x.device)
    product = one
    for _ in range(5):
        factor = 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram
        gram, product = factor @ gram @ factor, factor @ product
    return (product @ x).T if tall else product @ x
