"""Learning rates that change over the rounds after warm-up.

A rate is its setting times a factor, which is a function of the settings and of the round alone: 1 in the
first round after warm-up, `end` in the last, and between them a straight line or half a cosine wave
(Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, eq. 5).

Clients and server have a schedule each, since theirs do different things. Where clients take several steps on
data of their own kind, the size of these decides which point rounds settle at, and the server's rate only how
fast they get there (Charles and Konecny, "Convergence and Accuracy Trade-Offs in Federated Learning and
Meta-Learning", AISTATS 2021). Adam on the server goes on taking steps of about its rate however small the
clients' are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedpeft_ext.config import ScheduleName


@dataclass(frozen=True)
class Schedule:
    """Factors of a learning rate by round.

    Attributes:
        name: the shape.
        end: factor of the last round, above 0 and at most 1.
        first, last: the 1-based rounds that it goes over.
    """

    name: ScheduleName = "constant"
    end: float = 1.0
    first: int = 1
    last: int = 1

    def factor(self, round: int) -> float:
        """Of the 1-based `round`; before the first one it is 1, after the last one it stays at `end`."""
        if self.name == "constant" or round <= self.first:
            return 1.0
        if round >= self.last:
            return self.end
        done = (round - self.first) / (self.last - self.first)
        left = 1.0 - done if self.name == "linear" else (1.0 + math.cos(math.pi * done)) / 2.0
        return self.end + (1.0 - self.end) * left


CONSTANT = Schedule()
