"""Muon: an optimizer whose updates are orthogonalized momentum."""

import torch

MOMENTUM = 0.95  # of Muon
BETA1 = 0.9  # of Adam, as PyTorch's defaults
BETA2 = 0.999
EPSILON = 1e-8


class Muon(torch.optim.Optimizer):
    """Muon for the kernels of 3x3 convolutions, Adam for all other parameters.

    A kernel (out, in, 3, 3) is seen as a matrix (out, in * 9). Its update is scaled to the usual
    size of Adam's, so that one learning rate suits both. torch.optim.Muon takes only matrices.

    References:
        K. Jordan et al., Muon, https://kellerjordan.github.io/posts/muon/
        J. Liu et al., Muon is Scalable for LLM Training, https://arxiv.org/abs/2502.16982, for the
            scale.
    """

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(self.update(parameter), alpha=group["lr"])

    def update(self, parameter):
        """The update before the learning rate, of the parameter's shape; advances its state."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            if not is_kernel(parameter):
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        if is_kernel(parameter):
            return muon_update(parameter.grad, state)
        return adam_update(parameter.grad, state)


def is_kernel(parameter):
    """Whether a parameter is the kernel of a 3x3 convolution."""
    return parameter.shape[2:] == (3, 3)


def muon_update(gradient, state):
    """Orthogonalized Nesterov momentum of a kernel's gradients (out, in, 3, 3)."""
    momentum = state["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
    nesterov = gradient.lerp(momentum, MOMENTUM)
    matrix = orthogonalize(nesterov.flatten(1))
    # With singular values of 1, this makes the root mean square 0.2, about that of Adam's updates.
    return matrix.reshape(gradient.shape) * (0.2 * max(matrix.shape) ** 0.5)


def adam_update(gradient, state):
    """The gradients' mean over the root of their mean square, each with its bias corrected."""
    mean = state["exp_avg"].lerp_(gradient, 1 - BETA1) / (1 - BETA1 ** state["step"])
    square = state["exp_avg_sq"].lerp_(gradient**2, 1 - BETA2) / (1 - BETA2 ** state["step"])
    return mean / (square.sqrt() + EPSILON)


def orthogonalize(matrix):
    """The matrix (m, n) with its singular values moved close to 1, its singular vectors kept.

    Five Newton-Schulz iterations X <- (a I + b G + c G^2) X with G = X X^T and Jordan's
    coefficients a, b and c, see the references of Muon. With F = a I + b G + c G^2, which is
    symmetric and commutes with G, the next G is F G F. So it is enough to iterate on the smaller of
    the two Gram matrices and to multiply the product of all F by X once, in half the time. The
    rounding errors of TF32 or bfloat16 would grow from one G to the next: this needs float32.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)  # no singular value is then above 1
    gram = x @ x.T
    identity = torch.eye(len(x), device=x.device)
    product = identity
    for _ in range(5):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        gram = factor @ gram @ factor
        product = factor @ product
    return (product @ x).T if tall else product @ x
