"""What accuracy must be: one table, from which every judgment of accuracy takes its limits."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one dtype; errors are relative L2 errors against float64 unless told otherwise."""

    #: One unit in the last place of numbers from 1 to 2.
    epsilon: float
    #: What an output's error may be, in proportion to the peer's.
    ratio: float
    #: What an output's error may be at most, on normal inputs; None: no such limit.
    absolute: float | None
    #: What an element's error may be, in proportion to the peer's largest, before one unit in its last place is added.
    element: float
    #: What an LSE's error may be, in fp32 units in the last place of the row's largest possible |score|.
    lse_units: int
    #: The first and the third for gradients.
    gradient_ratio: float
    gradient_element: float

    @property
    def floor(self) -> float:
        """What the peer's error counts at least: that of rounding normal numbers to nearest."""
        return 0.21 * self.epsilon


LIMITS = {
    "float16": Limits(2.0**-10, 1.1, None, 2.0, 4, 2.0, 3.0),
    "bfloat16": Limits(2.0**-7, 1.1, None, 2.0, 4, 2.0, 3.0),
    "float32": Limits(2.0**-23, 2.0, 3e-6, 2.0, 4, 2.0, 3.0),
}
