"""How the backward pass of a call is spread over the device. Nothing here can change a bit."""

from cuattn.problem import Gradients, Problem, Upstream
from cuattn.schedule import Allocate, Launch, Target


def plan_backward(
    problem: Problem, upstream: Upstream, gradients: Gradients, target: Target, allocate: Allocate
) -> list[Launch]:
    raise NotImplementedError
